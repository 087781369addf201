#include "store/compact.h"

#include <torch/csrc/stable/ops.h>

#include "common/debug.h"
#include "common/on_device.h"
#include "store/row_list.h"

namespace kvc {
namespace {

void launch(const std::vector<Tensor>& tensors, const Tensor& index, CompactParams params) {
  for (const Tensor& t : tensors) {
    const Rows rows = params.row_start == nullptr ? rows_of(t, /*is_written=*/true)
                                                  : packed_rows_of(t, /*is_written=*/true);
    if (rows.bytes > 0) params.tensors[params.num_tensors++] = rows;
  }
  if (params.num_tensors > 0) KVC_LAUNCH(compact, index, params);
}

void compact(const std::vector<Tensor>& tensors, const Tensor& index) {
  constexpr const char* kOp = "compact_";
  check_index(kOp, index);
  check_row_list(kOp, "tensors", tensors, {"batch, heads, seq_len"}, index, "index",
                 /*is_written=*/true);
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
  launch(tensors, index,
         {
             .index = static_cast<const int32_t*>(index.const_data_ptr()),
             .index_batch_stride = index.stride(0),
             .index_head_stride = index.stride(1),
             .batch = batch,
             .heads = heads,
             .seq_len = seq_len,
             .k = k,
         });
}

void compact_ragged(const std::vector<Tensor>& tensors, const Tensor& index, const Tensor& indptr,
                    const Tensor& row_start) {
  constexpr const char* kOp = "compact_ragged_";
  check_rank(kOp, "index", index, 1, "[total]");
  check_dtype(kOp, "index", index, ScalarType::Int);
  check_last_contiguous(kOp, "index", index);
  check_row_list(kOp, "tensors", tensors, {"slots", 1}, index, "index", /*is_written=*/true);
  const int64_t slots = tensors[0].size(0), total = index.size(0);
  for (size_t i = 1; i < tensors.size(); ++i) {
    require(tensors[i].size(0) == slots, kOp, "tensors",
            "of the slots of tensors[0] (" + text(slots) + ")", shape_string(tensors[i]) + at(i));
  }
  check_rank(kOp, "row_start", row_start, 1, "[batch * heads]");
  check_dtype(kOp, "row_start", row_start, ScalarType::Long);
  check_same_device(kOp, "row_start", row_start, index, "index");
  check_last_contiguous(kOp, "row_start", row_start);
  const int64_t heads = row_start.size(0);
  require(indptr.dim() == 1 && indptr.size(0) == heads + 1, kOp, "indptr",
          "[batch * heads + 1] (" + text(heads + 1) + ")",
          text(indptr.dim()) + "D " + shape_string(indptr));
  check_dtype(kOp, "indptr", indptr, ScalarType::Int);
  check_same_device(kOp, "indptr", indptr, index, "index");
  check_last_contiguous(kOp, "indptr", indptr);
  if (heads == 0 || slots == 0 || total == 0) return;
  if (debug_enabled()) [[unlikely]] {
    check_index_values(kOp, "indptr", indptr, {.low = 0, .high = total + 1, .sorted = true},
                       "from 0 to total (" + text(total) + "), never descending");
    check_index_values(kOp, "index", index,
                       {.low = -1, .high = slots, .ascending = true, .indptr = &indptr},
                       "ascending in [0, slots) with -1 at the end, head by head");
  }
  launch(tensors, index,
         {
             .index = static_cast<const int32_t*>(index.const_data_ptr()),
             .row_start = static_cast<const int64_t*>(row_start.const_data_ptr()),
             .indptr = static_cast<const int32_t*>(indptr.const_data_ptr()),
             .batch = 1,
             .heads = heads,
             .seq_len = slots,
             .k = total,
         });
}

KVC_REGISTER(compact_, compact)
KVC_REGISTER(compact_ragged_, compact_ragged)

}  // namespace
}  // namespace kvc
