#include "store/gather.h"

#include <torch/csrc/stable/ops.h>

#include "common/debug.h"
#include "common/on_device.h"
#include "store/row_list.h"

namespace kvc {
namespace {

void check_index_debug(const char* op, const Tensor& index, int64_t seq_len) {
  if (debug_enabled()) [[unlikely]] {
    check_index_values(op, "index", index, {.low = -1, .high = seq_len}, "-1 or in [0, seq_len)");
  }
}

GatherParams checked(const std::vector<Tensor>& tensors, const Tensor& index) {
  constexpr const char* op = "gather";
  check_index(op, index);
  check_row_list(op, "tensors", tensors, {"batch, heads, seq_len"}, index, "index",
                 /*is_written=*/false);
  const int64_t batch = index.size(0), heads = index.size(1);
  const int64_t seq_len = tensors[0].size(2);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    require(t.size(0) == batch && t.size(2) == seq_len, op, "tensors",
            "of the batch of index (" + text(batch) + ") and the seq_len of tensors[0] (" +
                text(seq_len) + ")",
            shape_string(t) + at(i));
    require(t.size(1) == 0 ? heads == 0 : heads % t.size(1) == 0, op, "index",
            "of a multiple of " + text(t.size(1)) + " heads", text(heads) + at(i));
  }
  check_index_debug(op, index, seq_len);
  return GatherParams{
      .index = static_cast<const int32_t*>(index.const_data_ptr()),
      .index_batch_stride = index.stride(0),
      .index_head_stride = index.stride(1),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .k = index.size(2),
  };
}

void launch(const Tensor& index, const std::vector<Tensor>& tensors,
            const std::vector<Tensor>& outs, GatherParams params) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (outs[i].numel() == 0) continue;
    params.sources[params.num_tensors] = rows_of(tensors[i], /*is_written=*/false);
    params.outs[params.num_tensors++] = params.indptr == nullptr
                                            ? rows_of(outs[i], /*is_written=*/true)
                                            : packed_rows_of(outs[i], /*is_written=*/true);
  }
  if (params.num_tensors > 0) KVC_LAUNCH(gather, index, params);
}

std::vector<Tensor> gather(const std::vector<Tensor>& tensors, const Tensor& index,
                           int64_t capacity) {
  GatherParams params = checked(tensors, index);
  require(capacity >= params.k, "gather", "capacity", "at least k (" + text(params.k) + ")",
          text(capacity));
  params.capacity = capacity;
  std::vector<Tensor> outs;
  outs.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    const int64_t batch = params.batch, heads = params.heads;
    outs.push_back(t.dim() == 4 ? torch::stable::new_empty(t, {batch, heads, capacity, t.size(3)})
                                : torch::stable::new_empty(t, {batch, heads, capacity}));
  }
  launch(index, tensors, outs, params);
  return outs;
}

std::vector<Tensor> gather_ragged(const std::vector<Tensor>& tensors, const Tensor& index,
                                  const Tensor& indptr, const Tensor& row_start, int64_t total) {
  constexpr const char* kOp = "gather_ragged";
  const auto got = [](const Tensor& t) { return text(t.dim()) + "D " + shape_string(t); };
  check_rank(kOp, "index", index, 1, "[entries]");
  check_dtype(kOp, "index", index, ScalarType::Int);
  check_last_contiguous(kOp, "index", index);
  check_row_list(kOp, "tensors", tensors, {"batch, heads, seq_len"}, index, "index",
                 /*is_written=*/false);
  const int64_t batch = tensors[0].size(0), seq_len = tensors[0].size(2);
  const int64_t rows = indptr.dim() == 1 ? indptr.size(0) - 1 : -1;
  require(rows >= 0 && (batch == 0 ? rows == 0 : rows % batch == 0), kOp, "indptr",
          "[batch * heads + 1] for a batch of " + text(batch), got(indptr));
  check_dtype(kOp, "indptr", indptr, ScalarType::Int);
  check_same_device(kOp, "indptr", indptr, index, "index");
  check_last_contiguous(kOp, "indptr", indptr);
  const int64_t heads = batch == 0 ? 0 : rows / batch;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    require(t.size(0) == batch && t.size(2) == seq_len, kOp, "tensors",
            "of the batch (" + text(batch) + ") and seq_len (" + text(seq_len) + ") of tensors[0]",
            shape_string(t) + at(i));
    require(t.size(1) == 0 ? heads == 0 : heads % t.size(1) == 0, kOp, "indptr",
            "of a multiple of " + text(t.size(1)) + " heads", text(heads) + at(i));
  }
  require(row_start.dim() == 1 && row_start.size(0) == rows, kOp, "row_start",
          "[batch * heads] (" + text(rows) + ")", got(row_start));
  check_dtype(kOp, "row_start", row_start, ScalarType::Long);
  check_same_device(kOp, "row_start", row_start, index, "index");
  check_last_contiguous(kOp, "row_start", row_start);
  require(total >= 0, kOp, "total", "at least 0", text(total));
  check_index_debug(kOp, index, seq_len);
  if (debug_enabled()) [[unlikely]] {
    check_index_values(kOp, "indptr", indptr, {.low = 0, .high = index.size(0) + 1},
                       "in [0, entries]");
  }
  GatherParams params{
      .index = static_cast<const int32_t*>(index.const_data_ptr()),
      .indptr = static_cast<const int32_t*>(indptr.const_data_ptr()),
      .row_start = static_cast<const int64_t*>(row_start.const_data_ptr()),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .k = index.size(0),
  };
  std::vector<Tensor> outs;
  outs.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    outs.push_back(t.dim() == 4 ? torch::stable::new_zeros(t, {total, t.size(3)})
                                : torch::stable::new_zeros(t, {total}));
  }
  launch(index, tensors, outs, params);
  return outs;
}

KVC_REGISTER(gather, gather)
KVC_REGISTER(gather_ragged, gather_ragged)

}  // namespace
}  // namespace kvc
