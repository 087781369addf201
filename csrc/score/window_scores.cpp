#include "score/window_scores.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "common/on_device.h"

namespace kvc {
namespace {

constexpr const char* kOp = "window_scores";
constexpr const char* kQueryLayout = "[batch, num_q_heads, window, head_dim]";
constexpr const char* kKeyLayout = "[batch, num_kv_heads, seq_len, head_dim]";

// An optional float32 companion [d0, d1, d2] of q or k.
void check_companion(const char* name, const std::optional<Tensor>& t, const std::string& layout,
                     int64_t d0, int64_t d1, int64_t d2, const Tensor& q) {
  if (!t.has_value()) return;
  const std::string wanted = layout + " [" + text(d0) + ", " + text(d1) + ", " + text(d2) + "]";
  const bool ok = t->dim() == 3 && t->size(0) == d0 && t->size(1) == d1 && t->size(2) == d2;
  require(ok, kOp, name, wanted, text(t->dim()) + "D " + shape_string(*t));
  check_dtype(kOp, name, *t, ScalarType::Float);
  check_same_device(kOp, name, *t, q, "q");
  check_last_contiguous(kOp, name, *t);
}

void check_code(const char* name, int64_t code, int64_t count, const char* must) {
  require(code >= 0 && code < count, kOp, name, must, text(code));
}

Tensor window_scores(const Tensor& q, const Tensor& k, const std::optional<Tensor>& lse,
                     const std::optional<Tensor>& weights, const std::optional<Tensor>& seq_start,
                     int64_t first_query, int64_t num_scored, int64_t kernel_size,
                     int64_t window_reduce, int64_t group_reduce, int64_t pool,
                     double softmax_scale, bool pool_first) {
  check_rank(kOp, "q", q, 4, kQueryLayout);
  check_rank(kOp, "k", k, 4, kKeyLayout);
  const DType dtype = float_dtype(kOp, "q", q);
  check_same_dtype(kOp, "k", k, q, "q");
  check_same_device(kOp, "k", k, q, "q");
  const int64_t batch = q.size(0), num_q_heads = q.size(1), window = q.size(2);
  const int64_t num_kv_heads = k.size(1), seq_len = k.size(2), head_dim = q.size(3);
  require(k.size(0) == batch, kOp, "k", "of the batch of q (" + text(batch) + ")", text(k.size(0)));
  require(k.size(3) == head_dim, kOp, "k", "of the head_dim of q (" + text(head_dim) + ")",
          text(k.size(3)));
  require(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, kOp, "head_dim",
          "a multiple of 8 from 8 to 256", text(head_dim));
  require(num_kv_heads >= 1, kOp, "num_kv_heads", "at least 1", text(num_kv_heads));
  require(num_q_heads >= 1 && num_q_heads % num_kv_heads == 0, kOp, "num_q_heads",
          "a multiple of num_kv_heads (" + text(num_kv_heads) + ")", text(num_q_heads));
  require(window >= 1, kOp, "window", "at least 1", text(window));
  check_last_contiguous(kOp, "q", q);
  check_last_contiguous(kOp, "k", k);
  check_companion("lse", lse, "[batch, num_q_heads, window]", batch, num_q_heads, window, q);
  check_companion("weights", weights, "[batch, num_kv_heads, seq_len]", batch, num_kv_heads,
                  seq_len, q);
  check_row_vector(kOp, "seq_start", seq_start, batch, q, "q");
  require(first_query >= 0, kOp, "first_query", "at least 0", text(first_query));
  require(num_scored >= 0 && num_scored <= seq_len, kOp, "num_scored",
          "from 0 to seq_len (" + text(seq_len) + ")", text(num_scored));
  require(kernel_size >= 1 && kernel_size % 2 == 1, kOp, "kernel_size", "odd and at least 1",
          text(kernel_size));
  check_code("window_reduce", window_reduce, 3, "0 (sum), 1 (mean) or 2 (max)");
  check_code("group_reduce", group_reduce, 4, "0 (none), 1 (mean), 2 (max) or 3 (sum)");
  check_code("pool", pool, 3, "0 (none), 1 (avg) or 2 (max)");
  require(std::isfinite(softmax_scale) && softmax_scale > 0, kOp, "softmax_scale",
          "finite and above 0", std::to_string(softmax_scale));

  WindowScoresParams params{
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .lse = lse ? lse->const_data_ptr<float>() : nullptr,
      .weights = weights ? weights->const_data_ptr<float>() : nullptr,
      .seq_start = optional_int32(seq_start),
      .batch = batch,
      .num_q_heads = num_q_heads,
      .num_kv_heads = num_kv_heads,
      .window = window,
      .seq_len = seq_len,
      .head_dim = head_dim,
      .first_query = first_query,
      .num_scored = num_scored,
      .kernel_size = kernel_size,
      .q_batch_stride = q.stride(0),
      .q_head_stride = q.stride(1),
      .q_row_stride = q.stride(2),
      .k_batch_stride = k.stride(0),
      .k_head_stride = k.stride(1),
      .k_row_stride = k.stride(2),
      .lse_batch_stride = lse ? lse->stride(0) : 0,
      .lse_head_stride = lse ? lse->stride(1) : 0,
      .weights_batch_stride = weights ? weights->stride(0) : 0,
      .weights_head_stride = weights ? weights->stride(1) : 0,
      .scale_log2 = static_cast<float>(softmax_scale * kLog2e),
      .window_reduce = static_cast<WindowReduce>(window_reduce),
      .group_reduce = static_cast<GroupReduce>(group_reduce),
      .pool = static_cast<Pool>(pool),
      .pool_first = pool_first,
      .dtype = dtype,
  };
  Tensor out = torch::stable::new_empty(q, {batch, params.out_heads(), seq_len}, ScalarType::Float);
  if (batch == 0 || seq_len == 0) return out;
  const int64_t row_tiles = (params.q_per_kv() * window + kRowTile - 1) / kRowTile;
  const int64_t wanted = lse ? 1 : kMaxRowItems / (row_tiles * batch * num_kv_heads);
  params.max_chunks = std::clamp<int64_t>(wanted, 1, (seq_len + kMinChunk - 1) / kMinChunk);
  Tensor row_stats = torch::stable::new_empty(q, {params.max_chunks, batch, num_q_heads, window, 2},
                                              ScalarType::Float);
  const int64_t vote_rows = std::max(params.vote_heads(), num_kv_heads * params.row_groups());
  Tensor votes = torch::stable::new_empty(q, {batch, vote_rows, seq_len}, ScalarType::Float);
  params.row_stats = row_stats.mutable_data_ptr<float>();
  params.votes = votes.mutable_data_ptr<float>();
  params.out = out.mutable_data_ptr<float>();
  KVC_LAUNCH(window_scores, q, params);
  return out;
}

KVC_REGISTER(window_scores, window_scores)

}  // namespace
}  // namespace kvc
