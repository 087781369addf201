#include "store/gather.h"

#include <torch/csrc/stable/ops.h>

#include "common/debug.h"
#include "common/on_device.h"
#include "store/row_list.h"

namespace kvc {
namespace {

constexpr const char* kOp = "gather";

std::vector<Tensor> gather(const std::vector<Tensor>& tensors, const Tensor& index,
                           int64_t capacity) {
  check_index(kOp, index);
  check_row_list(kOp, "tensors", tensors, "seq_len", index, "index", /*is_written=*/false);
  const int64_t batch = index.size(0), heads = index.size(1), k = index.size(2);
  const int64_t seq_len = tensors[0].size(2);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    require(t.size(0) == batch && t.size(2) == seq_len, kOp, "tensors",
            "of the batch of index (" + text(batch) + ") and the seq_len of tensors[0] (" +
                text(seq_len) + ")",
            shape_string(t) + at(i));
    require(t.size(1) == 0 ? heads == 0 : heads % t.size(1) == 0, kOp, "index",
            "of a multiple of " + text(t.size(1)) + " heads", text(heads) + at(i));
  }
  require(capacity >= k, kOp, "capacity", "at least k (" + text(k) + ")", text(capacity));
  if (debug_enabled()) [[unlikely]] {
    check_index_values(kOp, "index", index, {.low = -1, .high = seq_len}, "-1 or in [0, seq_len)");
  }

  GatherParams params{
      .index = static_cast<const int32_t*>(index.const_data_ptr()),
      .index_batch_stride = index.stride(0),
      .index_head_stride = index.stride(1),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .k = k,
      .capacity = capacity,
  };
  std::vector<Tensor> outs;
  outs.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    outs.push_back(t.dim() == 4 ? torch::stable::new_empty(t, {batch, heads, capacity, t.size(3)})
                                : torch::stable::new_empty(t, {batch, heads, capacity}));
    if (outs.back().numel() == 0) continue;
    params.sources[params.num_tensors] = rows_of(t, /*is_written=*/false);
    params.outs[params.num_tensors++] = rows_of(outs.back(), /*is_written=*/true);
  }
  if (params.num_tensors == 0) return outs;
  KVC_LAUNCH(gather, index, params);
  return outs;
}

KVC_REGISTER(gather, gather)

}  // namespace
}  // namespace kvc
