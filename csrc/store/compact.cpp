#include "store/compact.h"

#include <torch/csrc/stable/ops.h>

#include "common/debug.h"
#include "common/on_device.h"
#include "store/row_list.h"

namespace kvc {
namespace {

constexpr const char* kOp = "compact_";

void compact(const std::vector<Tensor>& tensors, const Tensor& index) {
  check_index(kOp, index);
  check_row_list(kOp, "tensors", tensors, "seq_len", index, "index", /*is_written=*/true);
  const int64_t batch = tensors[0].size(0), heads = tensors[0].size(1);
  const int64_t seq_len = tensors[0].size(2), k = index.size(2);
  for (size_t i = 1; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    require(t.size(0) == batch && t.size(1) == heads && t.size(2) == seq_len, kOp, "tensors",
            "of the batch, heads and seq_len of tensors[0] " + shape_string(tensors[0]),
            shape_string(t) + at(i));
  }
  require(index.size(0) == batch && index.size(1) == heads, kOp, "index",
          "[" + text(batch) + ", " + text(heads) + ", k]", shape_string(index));
  require(k <= seq_len, kOp, "index", "of at most seq_len (" + text(seq_len) + ") entries a head",
          text(k));
  if (batch == 0 || heads == 0 || k == 0) return;
  if (debug_enabled()) [[unlikely]] {
    check_index_values(kOp, "index", index, {.low = -1, .high = seq_len, .ascending = true},
                       "ascending in [0, seq_len) with -1 at the end");
  }

  CompactParams params{
      .index = static_cast<const int32_t*>(index.const_data_ptr()),
      .index_batch_stride = index.stride(0),
      .index_head_stride = index.stride(1),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .k = k,
  };
  for (const Tensor& t : tensors) {
    const Rows rows = rows_of(t, /*is_written=*/true);
    if (rows.bytes > 0) params.tensors[params.num_tensors++] = rows;
  }
  if (params.num_tensors == 0) return;
  KVC_LAUNCH(compact, index, params);
}

KVC_REGISTER(compact_, compact)

}  // namespace
}  // namespace kvc
