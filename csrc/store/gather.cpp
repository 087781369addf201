#include "store/gather.h"

#include <torch/csrc/stable/ops.h>

#include "common/debug.h"
#include "common/on_device.h"
#include "store/row_list.h"

namespace kvc {
namespace {

// What both ops check and fill in: everything but where the kept rows go.
GatherParams checked(const char* op, const std::vector<Tensor>& tensors, const Tensor& index) {
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
  if (debug_enabled()) [[unlikely]] {
    check_index_values(op, "index", index, {.low = -1, .high = seq_len}, "-1 or in [0, seq_len)");
  }
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
    params.outs[params.num_tensors++] = params.row_start == nullptr
                                            ? rows_of(outs[i], /*is_written=*/true)
                                            : packed_rows_of(outs[i], /*is_written=*/true);
  }
  if (params.num_tensors > 0) KVC_LAUNCH(gather, index, params);
}

std::vector<Tensor> gather(const std::vector<Tensor>& tensors, const Tensor& index,
                           int64_t capacity) {
  GatherParams params = checked("gather", tensors, index);
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
                                  const Tensor& row_start, int64_t total) {
  constexpr const char* kOp = "gather_ragged";
  GatherParams params = checked(kOp, tensors, index);
  const int64_t heads = params.batch * params.heads;
  require(row_start.dim() == 1 && row_start.size(0) == heads, kOp, "row_start",
          "[batch * heads] (" + text(heads) + ")",
          std::to_string(row_start.dim()) + "D " + shape_string(row_start));
  check_dtype(kOp, "row_start", row_start, ScalarType::Long);
  check_same_device(kOp, "row_start", row_start, index, "index");
  check_last_contiguous(kOp, "row_start", row_start);
  require(total >= 0, kOp, "total", "at least 0", text(total));
  params.row_start = static_cast<const int64_t*>(row_start.const_data_ptr());
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
