#include "attend/decode_attention.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
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
  Tensor logits = return_logits ? torch::stable::new_empty(
                                      q, {batch, num_q_heads, num_queries, params.width}, f32)
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
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.scale_log2 = static_cast<float>(softmax_scale * kLog2e);
  const int64_t tile = params.shape().tile;
  const int64_t most_tiles = params.num_rows() * ((params.width + tile - 1) / tile);
  params.max_workers = std::min(kAttendMaxWorkers, most_tiles);
  const int64_t slots = params.max_workers + params.num_rows();
  Tensor partial_out = torch::stable::new_empty(q, {slots, params.slice(), params.head_dim}, f32);
  Tensor partial_stats = torch::stable::new_empty(q, {slots, params.slice(), 2}, f32);
  Tensor tile_start = torch::stable::new_empty(q, {params.num_stores() + 1}, ScalarType::Long);
  params.partial_out = partial_out.mutable_data_ptr<float>();
  params.partial_stats = partial_stats.mutable_data_ptr<float>();
  params.tile_start = tile_start.mutable_data_ptr<int64_t>();
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  params.logits = return_logits ? logits.mutable_data_ptr<float>() : nullptr;
  KVC_LAUNCH(decode_attention, q, params);
  return {out, lse, logits};
}

Result decode_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& lengths, double softmax_scale,
                        bool return_logits) {
  constexpr const char* kOp = "decode_attention";
  const DType dtype = check_tensors(kOp, q, k, v, 4, kStoreLayout);
  require(k.size(0) == q.size(0), kOp, "k", "of the batch of q (" + text(q.size(0)) + ")",
          text(k.size(0)));
  check_heads(kOp, q.size(1), k.size(1));
  check_strides(kOp, q, k, v);
  check_row_vector(kOp, "lengths", lengths, q.size(0), q, "q");
  check_scale(kOp, softmax_scale);
  if (lengths.has_value()) check_lengths(kOp, *lengths, k.size(2), "the capacity");
  DecodeAttentionParams params{
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .lengths = optional_int32(lengths),
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
  return attend(q, softmax_scale, return_logits, params);
}

Result ragged_decode_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& row_start, const Tensor& lengths, int64_t max_length,
                               double softmax_scale, bool return_logits) {
  constexpr const char* kOp = "ragged_decode_attention";
  const DType dtype = check_tensors(kOp, q, k, v, 2, kPackedLayout);
  const int64_t batch = q.size(0), stores = lengths.dim() == 1 ? lengths.size(0) : -1;
  require(stores >= 0 && (batch == 0 ? stores == 0 : stores % batch == 0), kOp, "lengths",
          "[batch * num_kv_heads], a multiple of the batch of q (" + text(batch) + ")",
          text(lengths.dim()) + "D " + shape_string(lengths));
  const int64_t num_kv_heads = batch == 0 ? 1 : stores / batch;
  check_heads(kOp, q.size(1), num_kv_heads);
  check_strides(kOp, q, k, v);
  check_per_store(kOp, "lengths", lengths, ScalarType::Int, stores, q);
  check_per_store(kOp, "row_start", row_start, ScalarType::Long, stores, q);
  require(max_length >= 0 && max_length <= k.size(0), kOp, "max_length",
          "from 0 to the rows of k (" + text(k.size(0)) + ")", text(max_length));
  check_scale(kOp, softmax_scale);
  check_lengths(kOp, lengths, max_length, "max_length");
  DecodeAttentionParams params{
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .row_start = static_cast<const int64_t*>(row_start.const_data_ptr()),
      .lengths = static_cast<const int32_t*>(lengths.const_data_ptr()),
      .num_kv_heads = num_kv_heads,
      .width = max_length,
      .k_row_stride = k.stride(0),
      .v_row_stride = v.stride(0),
      .dtype = dtype,
  };
  return attend(q, softmax_scale, return_logits, params);
}

KVC_REGISTER(decode_attention, decode_attention)
KVC_REGISTER(ragged_decode_attention, ragged_decode_attention)

}  // namespace
}  // namespace kvc
