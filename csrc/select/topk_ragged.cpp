// topk_ragged: topk with a count a head and packed rows; kernels and contract in topk.h.
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "common/debug.h"
#include "common/on_device.h"
#include "select/topk_scratch.h"

namespace kvc {
namespace {

constexpr const char* kOp = "topk_ragged";
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

std::tuple<Tensor, Tensor> topk_ragged(const Tensor& scores, const Tensor& counts,
                                       const std::optional<Tensor>& seq_start,
                                       const std::optional<Tensor>& seq_end, int64_t total,
                                       int64_t sink, int64_t window) {
  check_rank(kOp, "scores", scores, 3, "[batch, heads, seq_len]");
  check_dtype(kOp, "scores", scores, ScalarType::Float);
  check_last_contiguous(kOp, "scores", scores);
  const int64_t batch = scores.size(0), heads = scores.size(1), seq_len = scores.size(2);
  require(seq_len <= kMaxInt32, kOp, "scores", "of at most 2147483647 entries a head",
          text(seq_len));
  check_rank(kOp, "counts", counts, 2, "[batch, heads]");
  check_dtype(kOp, "counts", counts, ScalarType::Int);
  check_same_device(kOp, "counts", counts, scores, "scores");
  require(counts.size(0) == batch && counts.size(1) == heads, kOp, "counts",
          "[" + text(batch) + ", " + text(heads) + "]", shape_string(counts));
  check_row_vector(kOp, "seq_start", seq_start, batch, scores, "scores");
  check_row_vector(kOp, "seq_end", seq_end, batch, scores, "scores");
  require(total >= 0 && total <= kMaxInt32, kOp, "total", "in [0, 2147483647]", text(total));
  require(sink >= 0, kOp, "sink", "at least 0", text(sink));
  require(window >= 0, kOp, "window", "at least 0", text(window));
  if (debug_enabled()) [[unlikely]] {
    check_index_values(kOp, "counts", counts, {.low = 0, .high = kMaxInt32 + 1}, "at least 0");
    const auto check_bound = [&](const char* argument, const std::optional<Tensor>& t) {
      if (t.has_value())
        check_index_values(kOp, argument, *t, {.low = 0, .high = seq_len + 1}, "in [0, seq_len]");
    };
    check_bound("seq_start", seq_start);
    check_bound("seq_end", seq_end);
  }

  Tensor index = torch::stable::new_empty(scores, {total}, ScalarType::Int);
  Tensor indptr = torch::stable::new_empty(scores, {batch * heads + 1}, ScalarType::Int);
  if (batch == 0 || heads == 0 || seq_len == 0) {
    torch::stable::fill_(index, -1);
    torch::stable::zero_(indptr);
    return {index, indptr};
  }
  TopkParams params{
      .scores = scores.const_data_ptr<float>(),
      .counts = counts.const_data_ptr<int32_t>(),
      .seq_start = optional_int32(seq_start),
      .seq_end = optional_int32(seq_end),
      .index = total > 0 ? index.mutable_data_ptr<int32_t>() : nullptr,
      .indptr = indptr.mutable_data_ptr<int32_t>(),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .k = seq_len,
      .total = total,
      .sink = sink,
      .window = window,
      .batch_stride = scores.stride(0),
      .head_stride = scores.stride(1),
      .counts_batch_stride = counts.stride(0),
      .counts_head_stride = counts.stride(1),
  };
  const std::optional<Tensor> scratch = topk_scratch(scores, params);
  KVC_LAUNCH(topk, scores, params);
  return {index, indptr};
}

KVC_REGISTER(topk_ragged, topk_ragged)

}  // namespace
}  // namespace kvc
