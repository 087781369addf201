#include "select/head_counts.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/debug.h"
#include "common/on_device.h"

namespace kvc {
namespace {

constexpr const char* kOp = "head_counts";
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxHeads = 1024;

void check_per_head(const char* argument, const std::optional<Tensor>& t, const Tensor& scores) {
  if (!t.has_value()) return;
  check_rank(kOp, argument, *t, 2, "[batch, heads]");
  check_dtype(kOp, argument, *t, ScalarType::Int);
  check_same_device(kOp, argument, *t, scores, "scores");
  require(t->size(0) == scores.size(0) && t->size(1) == scores.size(1), kOp, argument,
          "[" + text(scores.size(0)) + ", " + text(scores.size(1)) + "]", shape_string(*t));
  require(t->is_contiguous(), kOp, argument, "contiguous", "strides that are not");
}

void check_values(const char* argument, const std::optional<Tensor>& t, int64_t high,
                  const char* must) {
  if (t.has_value()) check_index_values(kOp, argument, *t, {.low = 0, .high = high}, must);
}

Tensor head_counts(const Tensor& scores, const Tensor& totals, const std::optional<Tensor>& floors,
                   const std::optional<Tensor>& caps, const std::optional<Tensor>& seq_start,
                   const std::optional<Tensor>& seq_end) {
  check_rank(kOp, "scores", scores, 3, "[batch, heads, seq_len]");
  check_dtype(kOp, "scores", scores, ScalarType::Float);
  check_last_contiguous(kOp, "scores", scores);
  const int64_t batch = scores.size(0), heads = scores.size(1), seq_len = scores.size(2);
  require(heads <= kMaxHeads, kOp, "scores", "of at most 1024 heads", text(heads));
  require(heads * seq_len <= kMaxInt32, kOp, "scores", "of at most 2147483647 entries a row",
          text(heads * seq_len));
  check_row_vector(kOp, "totals", totals, batch, scores, "scores");
  check_per_head("floors", floors, scores);
  check_per_head("caps", caps, scores);
  check_row_vector(kOp, "seq_start", seq_start, batch, scores, "scores");
  check_row_vector(kOp, "seq_end", seq_end, batch, scores, "scores");
  if (debug_enabled()) [[unlikely]] {
    check_values("totals", totals, kMaxInt32 + 1, "at least 0");
    check_values("floors", floors, kMaxInt32 + 1, "at least 0");
    check_values("caps", caps, kMaxInt32 + 1, "at least 0");
    check_values("seq_start", seq_start, seq_len + 1, "in [0, seq_len]");
    check_values("seq_end", seq_end, seq_len + 1, "in [0, seq_len]");
  }

  Tensor counts = torch::stable::new_empty(scores, {batch, heads}, ScalarType::Int);
  if (batch == 0 || heads == 0) return counts;
  const HeadCountsParams params{
      .scores = scores.const_data_ptr<float>(),
      .totals = totals.const_data_ptr<int32_t>(),
      .floors = optional_int32(floors),
      .caps = optional_int32(caps),
      .seq_start = optional_int32(seq_start),
      .seq_end = optional_int32(seq_end),
      .counts = counts.mutable_data_ptr<int32_t>(),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .batch_stride = scores.stride(0),
      .head_stride = scores.stride(1),
  };
  KVC_LAUNCH(head_counts, scores, params);
  return counts;
}

KVC_REGISTER(head_counts, head_counts)

}  // namespace
}  // namespace kvc
