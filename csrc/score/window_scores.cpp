#include "score/window_scores.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/check.h"
#include "common/on_device.h"
#include "score/attention_rows_check.h"

namespace kvc {
namespace {

constexpr const char* kOp = "window_scores";

void check_code(const char* name, int64_t code, int64_t count, const char* must) {
  require(code >= 0 && code < count, kOp, name, must, text(code));
}

Tensor window_scores(const Tensor& q, const Tensor& k, const std::optional<Tensor>& lse,
                     const std::optional<Tensor>& weights, const std::optional<Tensor>& seq_start,
                     int64_t first_query, int64_t num_scored, int64_t kernel_size,
                     int64_t window_reduce, int64_t group_reduce, int64_t pool,
                     double softmax_scale, bool pool_first) {
  const AttentionRows rows = checked_rows(kOp, q, k, lse, seq_start, first_query, softmax_scale);
  const int64_t batch = rows.batch, num_kv_heads = rows.num_kv_heads, seq_len = rows.seq_len;
  check_companion(kOp, "weights", weights, "[batch, num_kv_heads, seq_len]", batch, num_kv_heads,
                  seq_len, q);
  require(num_scored >= 0 && num_scored <= seq_len, kOp, "num_scored",
          "from 0 to seq_len (" + text(seq_len) + ")", text(num_scored));
  require(kernel_size >= 1 && kernel_size % 2 == 1, kOp, "kernel_size", "odd and at least 1",
          text(kernel_size));
  check_code("window_reduce", window_reduce, 3, "0 (sum), 1 (mean) or 2 (max)");
  check_code("group_reduce", group_reduce, 4, "0 (none), 1 (mean), 2 (max) or 3 (sum)");
  check_code("pool", pool, 3, "0 (none), 1 (avg) or 2 (max)");

  WindowScoresParams params{rows};
  params.weights = weights ? weights->const_data_ptr<float>() : nullptr;
  params.weights_batch_stride = weights ? weights->stride(0) : 0;
  params.weights_head_stride = weights ? weights->stride(1) : 0;
  params.num_scored = num_scored;
  params.kernel_size = kernel_size;
  params.window_reduce = static_cast<WindowReduce>(window_reduce);
  params.group_reduce = static_cast<GroupReduce>(group_reduce);
  params.pool = static_cast<Pool>(pool);
  params.pool_first = pool_first;
  Tensor out = torch::stable::new_empty(q, {batch, params.out_heads(), seq_len}, ScalarType::Float);
  if (batch == 0 || seq_len == 0) return out;
  Tensor row_stats = new_row_stats(params, q);
  const int64_t vote_rows = std::max(params.vote_heads(), num_kv_heads * params.row_groups());
  Tensor votes = torch::stable::new_empty(q, {batch, vote_rows, seq_len}, ScalarType::Float);
  params.votes = votes.mutable_data_ptr<float>();
  params.out = out.mutable_data_ptr<float>();
  KVC_LAUNCH(window_scores, q, params);
  return out;
}

KVC_REGISTER(window_scores, window_scores)

}  // namespace
}  // namespace kvc
