#include "select/topk.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/debug.h"
#include "common/on_device.h"
#include "select/topk_scratch.h"

namespace kvc {
namespace {

constexpr const char* kOp = "topk";
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

void check_vector_values(const char* argument, const std::optional<Tensor>& t, int64_t high,
                         const char* must) {
  if (t.has_value()) check_index_values(kOp, argument, *t, {.low = 0, .high = high}, must);
}

Tensor topk(const Tensor& scores, const std::optional<Tensor>& counts,
            const std::optional<Tensor>& seq_start, const std::optional<Tensor>& seq_end, int64_t k,
            int64_t sink, int64_t window) {
  check_rank(kOp, "scores", scores, 3, "[batch, heads, seq_len]");
  check_dtype(kOp, "scores", scores, ScalarType::Float);
  check_last_contiguous(kOp, "scores", scores);
  const int64_t batch = scores.size(0), heads = scores.size(1), seq_len = scores.size(2);
  require(seq_len <= kMaxInt32, kOp, "scores", "of at most 2147483647 entries a head",
          text(seq_len));
  check_row_vector(kOp, "counts", counts, batch, scores, "scores");
  check_row_vector(kOp, "seq_start", seq_start, batch, scores, "scores");
  check_row_vector(kOp, "seq_end", seq_end, batch, scores, "scores");
  require(k >= 0 && k <= seq_len, kOp, "k", "in [0, seq_len] ([0, " + text(seq_len) + "])",
          text(k));
  require(sink >= 0, kOp, "sink", "at least 0", text(sink));
  require(window >= 0, kOp, "window", "at least 0", text(window));
  require(sink <= k && window <= k - sink, kOp, "window",
          "at most k - sink (" + text(k - sink) + ")", text(window));
  if (debug_enabled()) [[unlikely]] {
    check_vector_values("counts", counts, kMaxInt32 + 1, "at least 0");
    check_vector_values("seq_start", seq_start, seq_len + 1, "in [0, seq_len]");
    check_vector_values("seq_end", seq_end, seq_len + 1, "in [0, seq_len]");
  }

  Tensor index = torch::stable::new_empty(scores, {batch, heads, k}, ScalarType::Int);
  if (batch == 0 || heads == 0 || k == 0) return index;
  TopkParams params{
      .scores = scores.const_data_ptr<float>(),
      .counts = optional_int32(counts),
      .seq_start = optional_int32(seq_start),
      .seq_end = optional_int32(seq_end),
      .index = index.mutable_data_ptr<int32_t>(),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .k = k,
      .sink = sink,
      .window = window,
      .batch_stride = scores.stride(0),
      .head_stride = scores.stride(1),
      .counts_batch_stride = 1,
  };
  const std::optional<Tensor> scratch = topk_scratch(scores, params);
  KVC_LAUNCH(topk, scores, params);
  return index;
}

KVC_REGISTER(topk, topk)

}  // namespace
}  // namespace kvc
