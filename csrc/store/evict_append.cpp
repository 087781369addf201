#include "store/evict_append.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/debug.h"
#include "common/on_device.h"
#include "common/unit_counts.h"
#include "store/evict_append_check.h"
#include "store/row_list.h"

namespace kvc {
namespace {

constexpr const char* kOp = "evict_append_";

int32_t heads_a_unit(int64_t heads, int64_t units) {
  return static_cast<int32_t>(units == 0 ? 0 : heads / units);
}

// Scores [batch, heads, capacity], or history with one dimension more.
EntryFloats entry_floats(const char* name, const std::optional<Tensor>& t, const Tensor& positions,
                         int64_t rank, const char* layout) {
  if (!t.has_value()) return {};
  check_rank(kOp, name, *t, rank, layout);
  check_dtype(kOp, name, *t, ScalarType::Float);
  check_same_device(kOp, name, *t, positions, "positions");
  const int64_t batch = positions.size(0), units = positions.size(1), capacity = positions.size(2);
  const int64_t heads = t->size(1);
  require(t->size(0) == batch && t->size(2) == capacity &&
              (units == 0 ? heads == 0 : heads >= units && heads % units == 0),
          kOp, name,
          "of the batch (" + text(batch) + ") and capacity (" + text(capacity) +
              ") of positions and a multiple of " + text(units) + " heads",
          shape_string(*t));
  check_last_contiguous(kOp, name, *t);
  bool overlaps = false;
  for (int64_t dim = 0; dim + 1 < rank; ++dim) overlaps |= t->size(dim) > 1 && t->stride(dim) == 0;
  require(!overlaps, kOp, name, "free of overlaps", "a stride of 0");
  return {.data = static_cast<float*>(t->mutable_data_ptr()),
          .batch_stride = t->stride(0),
          .head_stride = t->stride(1),
          .row_stride = t->stride(2),
          .heads = heads,
          .width = rank == 4 ? t->size(3) : 1,
          .heads_a_unit = heads_a_unit(heads, units)};
}

void check_pair(const Tensor& buffer, const Tensor& rows, const Tensor& positions, int64_t n,
                size_t i) {
  const int64_t batch = positions.size(0), units = positions.size(1), capacity = positions.size(2);
  check_same_dtype(kOp, "rows", rows, buffer, "buffers");
  const auto to = buffer.sizes(), from = rows.sizes();
  require(to[0] == batch && to[2] == capacity &&
              (units == 0 ? to[1] == 0 : to[1] >= units && to[1] % units == 0),
          kOp, "buffers",
          "of the batch (" + text(batch) + ") and capacity (" + text(capacity) +
              ") of positions and a multiple of " + text(units) + " heads",
          shape_string(buffer) + at(i));
  require(from.size() == to.size() && from[0] == to[0] && from[1] == to[1] && from[2] == n &&
              (to.size() == 3 || from[3] == to[3]),
          kOp, "rows",
          "of the shape of buffers " + shape_string(buffer) + " with n (" + text(n) +
              ") for the capacity",
          shape_string(rows) + at(i));
}

void set_sinks(EvictAppendParams& params, const std::optional<Tensor>& sinks,
               const std::optional<Tensor>& inv_freq, const Tensor& keys) {
  require(sinks.has_value() == inv_freq.has_value(), kOp, "inv_freq", "there with sinks alone",
          inv_freq.has_value() ? "no sinks" : "none");
  if (!sinks.has_value()) return;
  check_rank(kOp, "sinks", *sinks, 4, "[batch, heads, num_sinks, head_dim]");
  params.sink_dtype = float_dtype(kOp, "sinks", *sinks);
  check_same_dtype(kOp, "sinks", *sinks, keys, "buffers[0]");
  check_same_device(kOp, "sinks", *sinks, keys, "buffers[0]");
  require(keys.dim() == 4 && sinks->size(0) == keys.size(0) && sinks->size(1) == keys.size(1) &&
              sinks->size(3) == keys.size(3) && sinks->size(2) <= keys.size(2),
          kOp, "sinks",
          "of the shape of buffers[0] " + shape_string(keys) + " but for fewer entries",
          shape_string(*sinks));
  check_last_contiguous(kOp, "sinks", *sinks);
  check_rank(kOp, "inv_freq", *inv_freq, 1, "[rotary_dim / 2]");
  check_dtype(kOp, "inv_freq", *inv_freq, ScalarType::Float);
  check_same_device(kOp, "inv_freq", *inv_freq, keys, "buffers[0]");
  check_last_contiguous(kOp, "inv_freq", *inv_freq);
  require(2 * inv_freq->size(0) <= keys.size(3), kOp, "inv_freq",
          "[at most " + text(keys.size(3) / 2) + "]", shape_string(*inv_freq));
  if (sinks->numel() == 0 || inv_freq->size(0) == 0) return;
  params.sinks = rows_of(*sinks, /*is_written=*/false);
  params.sinks_a_unit = heads_a_unit(sinks->size(1), params.units);
  params.num_sinks = sinks->size(2);
  params.inv_freq = static_cast<const float*>(inv_freq->const_data_ptr());
  params.half = inv_freq->size(0);
}

Tensor evict_append(const std::vector<Tensor>& buffers, const std::vector<Tensor>& rows,
                    const Tensor& positions, const Tensor& lengths, const Tensor& seen,
                    const std::optional<Tensor>& scores, const std::optional<Tensor>& history,
                    const std::optional<Tensor>& limits, const std::optional<Tensor>& sinks,
                    const std::optional<Tensor>& inv_freq, int64_t sink, int64_t window,
                    double fresh, int64_t fuse) {
  check_rank(kOp, "positions", positions, 3, "[batch, units, capacity]");
  check_dtype(kOp, "positions", positions, ScalarType::Int);
  check_last_contiguous(kOp, "positions", positions);
  const int64_t batch = positions.size(0), units = positions.size(1), capacity = positions.size(2);
  require(!((batch > 1 && positions.stride(0) == 0) || (units > 1 && positions.stride(1) == 0)),
          kOp, "positions", "free of overlaps", "a stride of 0");
  check_row_list(kOp, "buffers", buffers, {"batch, heads, capacity"}, positions, "positions",
                 /*is_written=*/true);
  check_row_list(kOp, "rows", rows, {"batch, heads, n"}, positions, "positions",
                 /*is_written=*/false);
  require(rows.size() == buffers.size(), kOp, "rows",
          "as many tensors as buffers (" + std::to_string(buffers.size()) + ")",
          std::to_string(rows.size()));
  const int64_t n = rows[0].size(2);
  for (size_t i = 0; i < buffers.size(); ++i) check_pair(buffers[i], rows[i], positions, n, i);
  EvictAppendParams params{
      .positions = static_cast<int32_t*>(positions.mutable_data_ptr()),
      .positions_batch_stride = positions.stride(0),
      .positions_unit_stride = positions.stride(1),
      .lengths = unit_counts<int32_t>(kOp, "lengths", lengths, positions, true),
      .seen = unit_counts<int32_t>(kOp, "seen", seen, positions, true),
      .scores = entry_floats("scores", scores, positions, 3, "[batch, heads, capacity]"),
      .history = entry_floats("history", history, positions, 4, "[batch, heads, capacity, width]"),
      .batch = batch,
      .units = units,
      .capacity = capacity,
      .n = n,
      .sink = sink,
      .window = window,
      .fresh = static_cast<float>(fresh),
  };
  if (limits.has_value()) {
    params.limits = unit_counts<const int32_t>(kOp, "limits", *limits, positions, false);
  }
  set_sinks(params, sinks, inv_freq, buffers[0]);
  check_eviction(kOp, params, "capacity", fuse, scores.has_value(), history);
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (rows[i].numel() == 0) continue;
    const int32_t to = params.num_tensors++;
    params.buffers[to] = rows_of(buffers[i], /*is_written=*/true);
    params.rows[to] = rows_of(rows[i], /*is_written=*/false);
    params.heads_a_unit[to] = heads_a_unit(rows[i].size(1), units);
    params.word_bytes[to] = static_cast<int32_t>(
        std::min(access_width(params.buffers[to]), access_width(params.rows[to])));
  }
  if (debug_enabled()) [[unlikely]] {
    check_index_values(kOp, "lengths", lengths, {.low = 0, .high = capacity + 1},
                       "from 0 to the capacity (" + text(capacity) + ")");
  }
  Tensor slots = torch::stable::new_empty(positions, {batch, units, n});
  params.slots = slots.mutable_data_ptr<int32_t>();
  const Tensor ranks = rank_scratch(params, fuse, positions);
  if (batch * units > 0) KVC_LAUNCH(evict_append, positions, params);
  return slots;
}

KVC_REGISTER(evict_append_, evict_append)

}  // namespace
}  // namespace kvc
