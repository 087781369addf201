#include "attend/decode_attention.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/debug.h"
#include "common/on_device.h"

namespace kvc {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr const char* kQueryLayout = "[batch, num_q_heads, num_queries, head_dim]";
constexpr const char* kStoreLayout = "[batch, num_kv_heads, capacity, head_dim]";
constexpr const char* kPackedLayout = "[total, head_dim]";

using Result = std::tuple<Tensor, Tensor, Tensor>;

// What both ops ask of q, k and v; k and v are of `rank` dimensions.
DType check_tensors(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, int64_t rank,
                    const char* layout) {
  check_rank(op, "q", q, 4, kQueryLayout);
  check_rank(op, "k", k, rank, layout);
  check_rank(op, "v", v, rank, layout);
  const DType dtype = float_dtype(op, "q", q);
  check_same_dtype(op, "k", k, q, "q");
  check_same_dtype(op, "v", v, q, "q");
  check_same_device(op, "k", k, q, "q");
  check_same_device(op, "v", v, q, "q");
  require(shape_string(v) == shape_string(k), op, "v", "of the shape of k " + shape_string(k),
          shape_string(v));
  const int64_t head_dim = q.size(3);
  require(k.size(rank - 1) == head_dim, op, "k", "of the head_dim of q (" + text(head_dim) + ")",
          text(k.size(rank - 1)));
  require(head_dim >= 8 && head_dim <= kAttendMaxHeadDim && head_dim % 8 == 0, op, "head_dim",
          "a multiple of 8 from 8 to 256", text(head_dim));
  require(q.size(2) >= 1 && q.size(2) <= kAttendMaxQueries, op, "num_queries", "from 1 to 8",
          text(q.size(2)));
  return dtype;
}

void check_heads(const char* op, int64_t num_q_heads, int64_t num_kv_heads) {
  require(num_kv_heads >= 1, op, "num_kv_heads", "at least 1", text(num_kv_heads));
  require(num_q_heads >= 1 && num_q_heads % num_kv_heads == 0, op, "num_q_heads",
          "a multiple of num_kv_heads (" + text(num_kv_heads) + ")", text(num_q_heads));
}

void check_strides(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_last_contiguous(op, "q", q);
  check_last_contiguous(op, "k", k);
  check_last_contiguous(op, "v", v);
}

void check_scale(const char* op, double softmax_scale) {
  require(std::isfinite(softmax_scale) && softmax_scale > 0, op, "softmax_scale",
          "finite and above 0", std::to_string(softmax_scale));
}

// One number a store, ragged.
void check_per_store(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                     int64_t stores, const Tensor& q) {
  require(t.dim() == 1 && t.size(0) == stores, op, name,
          "[batch * num_kv_heads] (" + text(stores) + ")", text(t.dim()) + "D " + shape_string(t));
  check_dtype(op, name, t, dtype);
  check_same_device(op, name, t, q, "q");
  check_last_contiguous(op, name, t);
}

// One number a row of the batch or a (row, kv head), dense.
UnitCounts<const int32_t> row_counts(const char* op, const char* name,
                                     const std::optional<Tensor>& t, int64_t num_kv_heads,
                                     const Tensor& q) {
  if (!t.has_value()) return {};
  const int64_t batch = q.size(0), dims = t->dim();
  require(dims >= 1 && dims <= 2 && t->size(0) == batch &&
              (dims == 1 || t->size(1) == 1 || t->size(1) == num_kv_heads),
          op, name,
          "[batch] (" + text(batch) + "), [batch, 1] or [batch, num_kv_heads] (" +
              text(num_kv_heads) + ")",
          text(dims) + "D " + shape_string(*t));
  check_dtype(op, name, *t, ScalarType::Int);
  check_same_device(op, name, *t, q, "q");
  return {static_cast<const int32_t*>(t->const_data_ptr()), t->stride(0),
          dims == 2 && t->size(1) > 1 ? t->stride(1) : 0};
}

// Under the debug switch: no length exceeds `most`.
void check_lengths(const char* op, const Tensor& lengths, int64_t most, const char* name_of_most) {
  if (debug_enabled()) [[unlikely]] {
    check_index_values(op, "lengths", lengths, {.low = 0, .high = most + 1},
                       std::string("from 0 to ") + name_of_most + " (" + text(most) + ")");
  }
}

// Allocates what comes out and the scratch, and runs. `params` holds everything else.
Result attend(const Tensor& q, double softmax_scale, bool return_logits,
              DecodeAttentionParams& params) {
  const int64_t batch = q.size(0), num_q_heads = q.size(1), num_queries = q.size(2);
  const ScalarType f32 = ScalarType::Float;
  Tensor out = torch::stable::new_empty(q, {batch, num_q_heads, num_queries, q.size(3)});
  Tensor lse = torch::stable::new_empty(q, {batch, num_q_heads, num_queries}, f32);
  Tensor logits =
      return_logits || params.observed.any()
          ? torch::stable::new_empty(q, {batch, num_q_heads, num_queries, params.width}, f32)
          : torch::stable::new_empty(q, {0}, f32);
  if (batch == 0) return {out, lse, logits};

  params.q = q.const_data_ptr();
  params.batch = batch;
  params.num_q_heads = num_q_heads;
  params.num_queries = num_queries;
  params.head_dim = q.size(3);
  params.q_batch_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.q_row_stride = q.stride(2);
  params.plan();
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.scale_log2 = static_cast<float>(softmax_scale * kLog2e);
  const int64_t most_tiles = params.num_rows() * ((params.width + kStepKeys - 1) / kStepKeys);
  params.max_workers = std::min(kAttendMaxWorkers, most_tiles);
  const int64_t slots = params.max_workers + params.num_rows();
  Tensor partial_out = torch::stable::new_empty(q, {slots, params.slice(), params.head_dim}, f32);
  Tensor partial_stats = torch::stable::new_empty(q, {slots, params.slice(), 2}, f32);
  Tensor owners = torch::stable::new_empty(q, {params.num_rows(), 2}, ScalarType::Int);
  params.partial_out = partial_out.mutable_data_ptr<float>();
  params.partial_stats = partial_stats.mutable_data_ptr<float>();
  params.owners = owners.mutable_data_ptr<int32_t>();
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  params.logits = return_logits ? logits.mutable_data_ptr<float>() : nullptr;
  params.fill_logits = return_logits;
  std::optional<Tensor> scratch;
  if (params.observed.any()) {
    scratch = torch::stable::new_empty(q, {params.observed_floats()}, f32);
    params.observed_scratch = scratch->mutable_data_ptr<float>();
  }
  KVC_LAUNCH(decode_attention, q, params);
  return {out, lse, logits};
}

// Fills what a dense and an observed call share; the caller adds the rest.
DecodeAttentionParams dense(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& lengths, double softmax_scale) {
  const DType dtype = check_tensors(op, q, k, v, 4, kStoreLayout);
  require(k.size(0) == q.size(0), op, "k", "of the batch of q (" + text(q.size(0)) + ")",
          text(k.size(0)));
  check_heads(op, q.size(1), k.size(1));
  check_strides(op, q, k, v);
  const auto counts = row_counts(op, "lengths", lengths, k.size(1), q);
  check_scale(op, softmax_scale);
  if (lengths.has_value()) check_lengths(op, *lengths, k.size(2), "the capacity");
  return {
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .lengths = counts,
      .num_kv_heads = k.size(1),
      .width = k.size(2),
      .k_batch_stride = k.stride(0),
      .k_head_stride = k.stride(1),
      .k_row_stride = k.stride(2),
      .v_batch_stride = v.stride(0),
      .v_head_stride = v.stride(1),
      .v_row_stride = v.stride(2),
      .dtype = dtype,
  };
}

DecodeAttentionParams ragged(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& row_start, const Tensor& lengths, int64_t max_length,
                             double softmax_scale) {
  const DType dtype = check_tensors(op, q, k, v, 2, kPackedLayout);
  const int64_t batch = q.size(0), stores = lengths.dim() == 1 ? lengths.size(0) : -1;
  require(stores >= 0 && (batch == 0 ? stores == 0 : stores % batch == 0), op, "lengths",
          "[batch * num_kv_heads], a multiple of the batch of q (" + text(batch) + ")",
          text(lengths.dim()) + "D " + shape_string(lengths));
  const int64_t num_kv_heads = batch == 0 ? 1 : stores / batch;
  check_heads(op, q.size(1), num_kv_heads);
  check_strides(op, q, k, v);
  check_per_store(op, "lengths", lengths, ScalarType::Int, stores, q);
  check_per_store(op, "row_start", row_start, ScalarType::Long, stores, q);
  require(max_length >= 0 && max_length <= k.size(0), op, "max_length",
          "from 0 to the rows of k (" + text(k.size(0)) + ")", text(max_length));
  check_scale(op, softmax_scale);
  check_lengths(op, lengths, max_length, "max_length");
  return {
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .row_start = static_cast<const int64_t*>(row_start.const_data_ptr()),
      .lengths = {static_cast<const int32_t*>(lengths.const_data_ptr()), num_kv_heads, 1},
      .num_kv_heads = num_kv_heads,
      .width = max_length,
      .total = k.size(0),
      .k_row_stride = k.stride(0),
      .v_row_stride = v.stride(0),
      .dtype = dtype,
  };
}

// A float32 tensor of one number a slot, or of `width` numbers a slot.
struct Watched {
  float* data;
  int64_t batch_stride, head_stride, row_stride, width;
  bool by_head;
};

// Dense: [batch, heads, capacity] or [batch, heads, capacity, width], heads those of kv or, where
// `may_be_by_head`, of queries. Ragged: [total] or [total, width].
Watched watched(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& q,
                const Tensor& k, int64_t num_kv_heads, bool is_history, bool may_be_by_head,
                bool is_written) {
  if (!t.has_value()) return {};
  const bool is_ragged = k.dim() == 2;
  const int64_t rank = (is_ragged ? 1 : 3) + is_history, dims = t->dim();
  const char* layout =
      is_ragged ? (is_history ? "[total, width]" : "[total]")
                : (is_history ? "[batch, heads, capacity, width]" : "[batch, heads, capacity]");
  check_rank(op, name, *t, rank, layout);
  check_dtype(op, name, *t, ScalarType::Float);
  check_same_device(op, name, *t, q, "q");
  if (is_ragged) {
    require(t->size(0) == k.size(0), op, name, "of the rows of k (" + text(k.size(0)) + ")",
            shape_string(*t));
  } else {
    const int64_t heads = t->size(1), num_q_heads = q.size(1);
    const bool heads_fit = heads == num_kv_heads || (may_be_by_head && heads == num_q_heads);
    require(t->size(0) == q.size(0) && heads_fit && t->size(2) == k.size(2), op, name,
            "of the batch (" + text(q.size(0)) + "), " + text(num_kv_heads) +
                (may_be_by_head ? " or " + text(num_q_heads) : std::string()) +
                " heads and the capacity (" + text(k.size(2)) + ") of k",
            shape_string(*t));
  }
  require(!is_history || t->size(rank - 1) >= 1, op, name, "of a width of at least 1",
          shape_string(*t));
  check_last_contiguous(op, name, *t);
  bool overlaps = false;
  for (int64_t dim = 0; is_written && dim < dims; ++dim) {
    overlaps |= t->size(dim) > 1 && t->stride(dim) == 0;
  }
  require(!overlaps, op, name, "free of overlaps", "a stride of 0");
  return {.data = static_cast<float*>(is_written ? t->mutable_data_ptr()
                                                 : const_cast<void*>(t->const_data_ptr())),
          .batch_stride = is_ragged ? 0 : t->stride(0),
          .head_stride = is_ragged ? 0 : t->stride(1),
          .row_stride = is_history ? t->stride(rank - 2) : 1,
          .width = is_history ? t->size(rank - 1) : 1,
          .by_head = !is_ragged && t->size(1) != num_kv_heads};
}

// The observed part of params but for `seen`; sums, weights and history as both ops take them.
ObservedParams observed(const char* op, const Tensor& q, const Tensor& k, int64_t num_kv_heads,
                        const std::optional<Tensor>& sums, const std::optional<Tensor>& weights,
                        const std::optional<Tensor>& history, bool has_seen, double decay,
                        int64_t power, int64_t group_reduce) {
  require(sums.has_value() || history.has_value(), op, "sums", "there unless history is",
          "neither");
  require(sums.has_value() || !weights.has_value(), op, "weights", "absent without sums",
          "weights");
  require(has_seen || !history.has_value(), op, "seen", "there with history", "none");
  const Watched s = watched(op, "sums", sums, q, k, num_kv_heads, false, true, true);
  const Watched w = watched(op, "weights", weights, q, k, num_kv_heads, false, false, false);
  const Watched h = watched(op, "history", history, q, k, num_kv_heads, true, true, true);
  require(decay >= 0 && decay <= 1, op, "decay", "from 0 to 1", std::to_string(decay));
  require(power == 1 || power == 2, op, "power", "1 or 2", text(power));
  require(group_reduce >= 1 && group_reduce <= 3, op, "group_reduce",
          "1 (mean), 2 (max) or 3 (sum)", text(group_reduce));
  const int64_t rows = q.size(1) / num_kv_heads * q.size(2);
  require(rows <= kObservedMaxRows, op, "q",
          "of at most 1024 queries a kv head, num_queries times q_per_kv", text(rows));
  return {.sums = s.data,
          .sums_batch_stride = s.batch_stride,
          .sums_head_stride = s.head_stride,
          .weights = w.data,
          .weights_batch_stride = w.batch_stride,
          .weights_head_stride = w.head_stride,
          .history = h.data,
          .history_batch_stride = h.batch_stride,
          .history_head_stride = h.head_stride,
          .history_row_stride = h.row_stride,
          .history_width = h.width,
          .sums_by_head = s.by_head,
          .history_by_head = h.by_head,
          .decay = static_cast<float>(decay),
          .power = static_cast<int32_t>(power),
          .reduce = static_cast<GroupReduce>(group_reduce)};
}

Result decode_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& lengths, double softmax_scale,
                        bool return_logits) {
  DecodeAttentionParams params = dense("decode_attention", q, k, v, lengths, softmax_scale);
  return attend(q, softmax_scale, return_logits, params);
}

Result ragged_decode_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& row_start, const Tensor& lengths, int64_t max_length,
                               double softmax_scale, bool return_logits) {
  DecodeAttentionParams params =
      ragged("ragged_decode_attention", q, k, v, row_start, lengths, max_length, softmax_scale);
  return attend(q, softmax_scale, return_logits, params);
}

std::tuple<Tensor, Tensor> observed_decode_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& sums, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& history, const std::optional<Tensor>& seen, double softmax_scale,
    double decay, int64_t power, int64_t group_reduce) {
  constexpr const char* kOp = "observed_decode_attention_";
  DecodeAttentionParams params = dense(kOp, q, k, v, lengths, softmax_scale);
  params.observed = observed(kOp, q, k, params.num_kv_heads, sums, weights, history,
                             seen.has_value(), decay, power, group_reduce);
  params.observed.seen = row_counts(kOp, "seen", seen, params.num_kv_heads, q);
  const auto [out, lse, logits] = attend(q, softmax_scale, false, params);
  return {out, lse};
}

std::tuple<Tensor, Tensor> observed_ragged_decode_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_start,
    const Tensor& lengths, const std::optional<Tensor>& sums, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& history, const std::optional<Tensor>& seen, int64_t max_length,
    double softmax_scale, double decay, int64_t power, int64_t group_reduce) {
  constexpr const char* kOp = "observed_ragged_decode_attention_";
  DecodeAttentionParams params =
      ragged(kOp, q, k, v, row_start, lengths, max_length, softmax_scale);
  params.observed = observed(kOp, q, k, params.num_kv_heads, sums, weights, history,
                             seen.has_value(), decay, power, group_reduce);
  if (seen.has_value()) {
    check_per_store(kOp, "seen", *seen, ScalarType::Int, lengths.size(0), q);
    params.observed.seen = {static_cast<const int32_t*>(seen->const_data_ptr()),
                            params.num_kv_heads, 1};
  }
  const auto [out, lse, logits] = attend(q, softmax_scale, false, params);
  return {out, lse};
}

KVC_REGISTER(decode_attention, decode_attention)
KVC_REGISTER(ragged_decode_attention, ragged_decode_attention)
KVC_REGISTER(observed_decode_attention_, observed_decode_attention)
KVC_REGISTER(observed_ragged_decode_attention_, observed_ragged_decode_attention)

}  // namespace
}  // namespace kvc
