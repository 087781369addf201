#include "score/history_scores.h"

#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "common/on_device.h"
#include "common/unit_counts.h"

namespace kvc {
namespace {

constexpr const char* kOp = "history_scores";

Tensor history_scores(const Tensor& history, const Tensor& positions, const Tensor& lengths,
                      const Tensor& seen, int64_t window, int64_t fuse) {
  check_rank(kOp, "history", history, 4, "[batch, heads, capacity, width]");
  check_rank(kOp, "positions", positions, 3, "[batch, units, capacity]");
  check_dtype(kOp, "history", history, ScalarType::Float);
  check_dtype(kOp, "positions", positions, ScalarType::Int);
  check_same_device(kOp, "positions", positions, history, "history");
  check_last_contiguous(kOp, "history", history);
  check_last_contiguous(kOp, "positions", positions);
  const int64_t batch = history.size(0), heads = history.size(1), capacity = history.size(2);
  const int64_t units = positions.size(1), width = history.size(3);
  require(positions.size(0) == batch && positions.size(2) == capacity &&
              (heads == 0 ? units == 0 : units > 0 && heads % units == 0),
          kOp, "positions",
          "of the batch (" + text(batch) + ") and capacity (" + text(capacity) +
              ") of history and of units that divide its heads (" + text(heads) + ")",
          shape_string(positions));
  require(width >= 1 && width <= kHistoryMaxWidth, kOp, "width", "from 1 to 1024", text(width));
  HistoryScoresParams params{
      .history = static_cast<const float*>(history.const_data_ptr()),
      .batch_stride = history.stride(0),
      .head_stride = history.stride(1),
      .row_stride = history.stride(2),
      .positions = static_cast<const int32_t*>(positions.const_data_ptr()),
      .positions_batch_stride = positions.stride(0),
      .positions_unit_stride = positions.stride(1),
      .lengths = unit_counts<const int32_t>(kOp, "lengths", lengths, positions, false),
      .seen = unit_counts<const int32_t>(kOp, "seen", seen, positions, false),
      .batch = batch,
      .heads = heads,
      .units = units,
      .capacity = capacity,
      .width = width,
      .window = window,
      .heads_a_unit = static_cast<int32_t>(units == 0 ? 1 : heads / units),
  };
  require(window >= 0, kOp, "window", "at least 0", text(window));
  require(fuse == 0 || fuse == 1, kOp, "fuse", "0 (sum) or 1 (max)", text(fuse));
  params.fuse = static_cast<HistoryFuse>(fuse);
  Tensor scores = torch::stable::new_empty(history, {batch, heads, capacity});
  params.scores = scores.mutable_data_ptr<float>();
  if (batch * heads * capacity > 0) KVC_LAUNCH(history_scores, history, params);
  return scores;
}

KVC_REGISTER(history_scores, history_scores)

}  // namespace
}  // namespace kvc
