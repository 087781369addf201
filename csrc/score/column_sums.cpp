#include "score/column_sums.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/check.h"
#include "common/debug.h"
#include "common/on_device.h"
#include "score/attention_rows_check.h"

namespace kvc {
namespace {

constexpr const char* kOp = "column_sums";

// v or output: there exactly if the statistic asks for it, and shaped like k or q.
void check_output_aware(const char* name, const std::optional<Tensor>& t, bool wanted,
                        const Tensor& like, const char* like_name) {
  require(t.has_value() == wanted, kOp, name,
          wanted ? "given for a change of the output" : "absent without a change of the output",
          wanted ? "None" : "a tensor");
  if (!wanted) return;
  require(shape_string(*t) == shape_string(like), kOp, name,
          std::string("of the shape of ") + like_name + " " + shape_string(like), shape_string(*t));
  check_same_dtype(kOp, name, *t, like, like_name);
  check_same_device(kOp, name, *t, like, like_name);
  check_last_contiguous(kOp, name, *t);
}

void check_positions(const std::optional<Tensor>& positions, const AttentionRows& rows,
                     const Tensor& q) {
  if (!positions) return;
  const bool ok = positions->dim() == 2 && positions->size(0) == rows.batch &&
                  positions->size(1) == rows.window;
  require(ok, kOp, "query_positions",
          "[batch, window] [" + text(rows.batch) + ", " + text(rows.window) + "]",
          text(positions->dim()) + "D " + shape_string(*positions));
  check_dtype(kOp, "query_positions", *positions, ScalarType::Int);
  check_same_device(kOp, "query_positions", *positions, q, "q");
  check_last_contiguous(kOp, "query_positions", *positions);
  if (debug_enabled()) {
    check_index_values(kOp, "query_positions", *positions,
                       {.low = -1, .high = std::numeric_limits<int32_t>::max(), .sorted = true},
                       "at least -1 and ascending");
  }
}

Tensor column_sums(const Tensor& q, const Tensor& k, const std::optional<Tensor>& lse,
                   const std::optional<Tensor>& query_weights,
                   const std::optional<Tensor>& query_positions,
                   const std::optional<Tensor>& seq_start, const std::optional<Tensor>& v,
                   const std::optional<Tensor>& output, int64_t first_query, int64_t statistic,
                   int64_t group_reduce, double softmax_scale) {
  const AttentionRows rows = checked_rows(kOp, q, k, lse, seq_start, first_query, softmax_scale);
  check_companion(kOp, "query_weights", query_weights, "[batch, num_q_heads, window]", rows.batch,
                  rows.num_q_heads, rows.window, q);
  require(statistic >= 0 && statistic < kNumStatistics, kOp, "statistic", "a code from 0 to 6",
          text(statistic));
  require(group_reduce >= 0 && group_reduce < 4, kOp, "group_reduce",
          "0 (none), 1 (mean), 2 (max) or 3 (sum)", text(group_reduce));
  const auto kind = static_cast<ColumnStatistic>(statistic);
  const bool output_aware =
      visit_statistic(kind, [](auto functor) { return decltype(functor)::kOutputAware; });
  check_output_aware("v", v, output_aware, k, "k");
  check_output_aware("output", output, output_aware, q, "q");
  check_positions(query_positions, rows, q);

  ColumnSumsParams params{rows};
  params.row_weights = query_weights ? query_weights->const_data_ptr<float>() : nullptr;
  params.row_weights_batch_stride = query_weights ? query_weights->stride(0) : 0;
  params.row_weights_head_stride = query_weights ? query_weights->stride(1) : 0;
  params.positions = optional_int32(query_positions);
  params.positions_stride = query_positions ? query_positions->stride(0) : 0;
  params.statistic = kind;
  params.group_reduce = static_cast<GroupReduce>(group_reduce);
  const int64_t batch = rows.batch, num_q_heads = rows.num_q_heads, seq_len = rows.seq_len;
  Tensor out = torch::stable::new_empty(q, {batch, params.out_heads(), seq_len}, ScalarType::Float);
  if (batch == 0 || seq_len == 0) return out;
  const bool in_place = params.group_reduce == GroupReduce::kNone;
  Tensor row_stats = new_row_stats(params, q);
  Tensor sums = torch::stable::new_empty(
      q, {in_place ? 0 : batch, num_q_heads, in_place ? 0 : seq_len}, ScalarType::Float);
  Tensor output_squares = torch::stable::new_empty(
      q, {output_aware ? batch : 0, num_q_heads, rows.window}, ScalarType::Float);
  params.out = out.mutable_data_ptr<float>();
  params.sums = in_place ? params.out : sums.mutable_data_ptr<float>();
  if (output_aware) {
    params.v = v->const_data_ptr();
    params.v_batch_stride = v->stride(0);
    params.v_head_stride = v->stride(1);
    params.v_row_stride = v->stride(2);
    params.output = output->const_data_ptr();
    params.output_batch_stride = output->stride(0);
    params.output_head_stride = output->stride(1);
    params.output_row_stride = output->stride(2);
    params.output_squares = output_squares.mutable_data_ptr<float>();
  }
  KVC_LAUNCH(column_sums, q, params);
  return out;
}

KVC_REGISTER(column_sums, column_sums)

}  // namespace
}  // namespace kvc
