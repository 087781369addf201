// evict_append_ over packed heads, each with a room of its own: the same launch.
#include <torch/csrc/stable/ops.h>

#include "common/debug.h"
#include "common/on_device.h"
#include "store/evict_append.h"
#include "store/evict_append_check.h"
#include "store/row_list.h"

namespace kvc {
namespace {

constexpr const char* kOp = "ragged_evict_append_";

void check_slots(const char* name, const Tensor& t, int64_t slots, const std::string& where) {
  require(t.size(0) == slots, kOp, name, "of the slots of positions (" + text(slots) + ")",
          shape_string(t) + where);
}

// One number a head.
void check_counter(const char* name, const Tensor& t, ScalarType dtype, int64_t heads,
                   const Tensor& positions) {
  require(t.dim() == 1 && t.size(0) == heads, kOp, name, "[batch * heads] (" + text(heads) + ")",
          text(t.dim()) + "D " + shape_string(t));
  check_dtype(kOp, name, t, dtype);
  check_same_device(kOp, name, t, positions, "positions");
  check_last_contiguous(kOp, name, t);
}

EntryFloats entry_floats(const char* name, const std::optional<Tensor>& t, const Tensor& positions,
                         int64_t heads, int64_t rank, const char* layout) {
  if (!t.has_value()) return {};
  check_rank(kOp, name, *t, rank, layout);
  check_dtype(kOp, name, *t, ScalarType::Float);
  check_same_device(kOp, name, *t, positions, "positions");
  check_slots(name, *t, positions.size(0), "");
  check_last_contiguous(kOp, name, *t);
  require(rank == 1 || t->size(0) <= 1 || t->stride(0) != 0, kOp, name, "free of overlaps",
          "a stride of 0");
  return {.data = static_cast<float*>(t->mutable_data_ptr()),
          .row_stride = t->stride(0),
          .heads = heads,
          .width = rank == 2 ? t->size(1) : 1,
          .heads_a_unit = 1};
}

Tensor ragged_evict_append(const std::vector<Tensor>& buffers, const std::vector<Tensor>& rows,
                           const Tensor& positions, const Tensor& row_start, const Tensor& lengths,
                           const Tensor& seen, const Tensor& limits,
                           const std::optional<Tensor>& scores,
                           const std::optional<Tensor>& history, int64_t max_length, int64_t sink,
                           int64_t window, double fresh, int64_t fuse) {
  check_rank(kOp, "positions", positions, 1, "[slots]");
  check_dtype(kOp, "positions", positions, ScalarType::Int);
  check_last_contiguous(kOp, "positions", positions);
  const int64_t slots = positions.size(0);
  check_row_list(kOp, "buffers", buffers, {"slots", 1}, positions, "positions",
                 /*is_written=*/true);
  check_row_list(kOp, "rows", rows, {"batch, heads, n"}, positions, "positions",
                 /*is_written=*/false);
  require(rows.size() == buffers.size(), kOp, "rows",
          "as many tensors as buffers (" + std::to_string(buffers.size()) + ")",
          std::to_string(rows.size()));
  const int64_t batch = rows[0].size(0), heads = rows[0].size(1), n = rows[0].size(2);
  for (size_t i = 0; i < buffers.size(); ++i) {
    check_same_dtype(kOp, "rows", rows[i], buffers[i], "buffers");
    check_slots("buffers", buffers[i], slots, at(i));
    const auto from = rows[i].sizes();
    const bool is_row = buffers[i].dim() == 2;
    require(from[0] == batch && from[1] == heads && from[2] == n &&
                from.size() == (is_row ? 4u : 3u) && (!is_row || from[3] == buffers[i].size(1)),
            kOp, "rows",
            "[" + text(batch) + ", " + text(heads) + ", " + text(n) + "] and the row of buffers " +
                shape_string(buffers[i]),
            shape_string(rows[i]) + at(i));
  }
  check_counter("row_start", row_start, ScalarType::Long, batch * heads, positions);
  check_counter("lengths", lengths, ScalarType::Int, batch * heads, positions);
  check_counter("seen", seen, ScalarType::Int, batch * heads, positions);
  check_counter("limits", limits, ScalarType::Int, batch * heads, positions);
  EvictAppendParams params{
      .positions = static_cast<int32_t*>(positions.mutable_data_ptr()),
      .lengths = {static_cast<int32_t*>(lengths.mutable_data_ptr()), heads, 1},
      .seen = {static_cast<int32_t*>(seen.mutable_data_ptr()), heads, 1},
      .limits = {static_cast<const int32_t*>(limits.const_data_ptr()), heads, 1},
      .scores = entry_floats("scores", scores, positions, batch * heads, 1, "[slots]"),
      .history = entry_floats("history", history, positions, batch * heads, 2, "[slots, width]"),
      .row_start = static_cast<const int64_t*>(row_start.const_data_ptr()),
      .batch = batch,
      .units = heads,
      .capacity = max_length,
      .n = n,
      .sink = sink,
      .window = window,
      .fresh = static_cast<float>(fresh),
  };
  require(max_length >= 0 && max_length <= slots, kOp, "max_length",
          "from 0 to the slots of positions (" + text(slots) + ")", text(max_length));
  check_eviction(kOp, params, "max_length", fuse, scores.has_value(), history);
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (rows[i].numel() == 0) continue;
    const int32_t to = params.num_tensors++;
    params.buffers[to] = packed_rows_of(buffers[i], /*is_written=*/true);
    params.rows[to] = rows_of(rows[i], /*is_written=*/false);
    params.heads_a_unit[to] = 1;
    params.word_bytes[to] = static_cast<int32_t>(
        std::min(access_width(params.buffers[to]), access_width(params.rows[to])));
  }
  if (debug_enabled()) [[unlikely]] {
    const IndexRule rule{.low = 0, .high = max_length + 1};
    const std::string must = "from 0 to max_length (" + text(max_length) + ")";
    check_index_values(kOp, "lengths", lengths, rule, must);
    check_index_values(kOp, "limits", limits, rule, must);
  }
  Tensor placed = torch::stable::new_empty(positions, {batch, heads, n});
  params.slots = placed.mutable_data_ptr<int32_t>();
  const Tensor ranks = rank_scratch(params, fuse, positions);
  if (batch * heads > 0) KVC_LAUNCH(evict_append, positions, params);
  return placed;
}

KVC_REGISTER(ragged_evict_append_, ragged_evict_append)

}  // namespace
}  // namespace kvc
