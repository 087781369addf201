#include "score/attention_rows_check.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

namespace kvc {

void check_companion(const char* op, const char* name, const std::optional<Tensor>& t,
                     const std::string& layout, int64_t d0, int64_t d1, int64_t d2,
                     const Tensor& q) {
  if (!t.has_value()) return;
  const std::string wanted = layout + " [" + text(d0) + ", " + text(d1) + ", " + text(d2) + "]";
  const bool ok = t->dim() == 3 && t->size(0) == d0 && t->size(1) == d1 && t->size(2) == d2;
  require(ok, op, name, wanted, text(t->dim()) + "D " + shape_string(*t));
  check_dtype(op, name, *t, ScalarType::Float);
  check_same_device(op, name, *t, q, "q");
  check_last_contiguous(op, name, *t);
}

AttentionRows checked_rows(const char* op, const Tensor& q, const Tensor& k,
                           const std::optional<Tensor>& lse, const std::optional<Tensor>& seq_start,
                           int64_t first_query, double softmax_scale) {
  check_rank(op, "q", q, 4, "[batch, num_q_heads, window, head_dim]");
  check_rank(op, "k", k, 4, "[batch, num_kv_heads, seq_len, head_dim]");
  const DType dtype = float_dtype(op, "q", q);
  check_same_dtype(op, "k", k, q, "q");
  check_same_device(op, "k", k, q, "q");
  const int64_t batch = q.size(0), num_q_heads = q.size(1), window = q.size(2);
  const int64_t num_kv_heads = k.size(1), seq_len = k.size(2), head_dim = q.size(3);
  require(k.size(0) == batch, op, "k", "of the batch of q (" + text(batch) + ")", text(k.size(0)));
  require(k.size(3) == head_dim, op, "k", "of the head_dim of q (" + text(head_dim) + ")",
          text(k.size(3)));
  require(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, op, "head_dim",
          "a multiple of 8 from 8 to 256", text(head_dim));
  require(num_kv_heads >= 1, op, "num_kv_heads", "at least 1", text(num_kv_heads));
  require(num_q_heads >= 1 && num_q_heads % num_kv_heads == 0, op, "num_q_heads",
          "a multiple of num_kv_heads (" + text(num_kv_heads) + ")", text(num_q_heads));
  require(window >= 1, op, "window", "at least 1", text(window));
  check_last_contiguous(op, "q", q);
  check_last_contiguous(op, "k", k);
  check_companion(op, "lse", lse, "[batch, num_q_heads, window]", batch, num_q_heads, window, q);
  check_row_vector(op, "seq_start", seq_start, batch, q, "q");
  require(first_query >= 0, op, "first_query", "at least 0", text(first_query));
  require(std::isfinite(softmax_scale) && softmax_scale > 0, op, "softmax_scale",
          "finite and above 0", std::to_string(softmax_scale));
  return {
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .lse = lse ? lse->const_data_ptr<float>() : nullptr,
      .seq_start = optional_int32(seq_start),
      .batch = batch,
      .num_q_heads = num_q_heads,
      .num_kv_heads = num_kv_heads,
      .window = window,
      .seq_len = seq_len,
      .head_dim = head_dim,
      .first_query = first_query,
      .q_batch_stride = q.stride(0),
      .q_head_stride = q.stride(1),
      .q_row_stride = q.stride(2),
      .k_batch_stride = k.stride(0),
      .k_head_stride = k.stride(1),
      .k_row_stride = k.stride(2),
      .lse_batch_stride = lse ? lse->stride(0) : 0,
      .lse_head_stride = lse ? lse->stride(1) : 0,
      .scale_log2 = static_cast<float>(softmax_scale * kLog2e),
      .dtype = dtype,
  };
}

Tensor new_row_stats(AttentionRows& rows, const Tensor& q) {
  rows.max_chunks = rows.chunks_wanted();
  Tensor row_stats = torch::stable::new_empty(
      q, {rows.max_chunks, rows.batch, rows.num_q_heads, rows.window, 2}, ScalarType::Float);
  rows.row_stats = row_stats.mutable_data_ptr<float>();
  return row_stats;
}

}  // namespace kvc
