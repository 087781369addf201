#include "budget/cosine_importance.h"

#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "common/on_device.h"

namespace kvc {
namespace {

constexpr const char* kOp = "cosine_importance";

Tensor cosine_importance(const Tensor& before, const Tensor& after,
                         const std::optional<Tensor>& seq_start, bool is_update) {
  check_rank(kOp, "before", before, 3, "[batch, seq_len, hidden]");
  check_rank(kOp, "after", after, 3, "[batch, seq_len, hidden]");
  const DType dtype = float_dtype(kOp, "before", before);
  check_same_dtype(kOp, "after", after, before, "before");
  check_same_device(kOp, "after", after, before, "before");
  require(shape_string(after) == shape_string(before), kOp, "after",
          "of the shape of before " + shape_string(before), shape_string(after));
  check_last_contiguous(kOp, "before", before);
  check_last_contiguous(kOp, "after", after);
  const int64_t batch = before.size(0), seq_len = before.size(1);
  check_row_vector(kOp, "seq_start", seq_start, batch, before, "before");

  const int64_t num_tiles = (seq_len + kCosineTile - 1) / kCosineTile;
  Tensor out = torch::stable::new_empty(before, {batch}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(before, {batch, num_tiles}, ScalarType::Float);
  if (batch == 0) return out;
  const CosineImportanceParams params{
      .before = before.const_data_ptr(),
      .after = after.const_data_ptr(),
      .seq_start = optional_int32(seq_start),
      .partial = partial.mutable_data_ptr<float>(),
      .out = out.mutable_data_ptr<float>(),
      .batch = batch,
      .seq_len = seq_len,
      .hidden = before.size(2),
      .num_tiles = num_tiles,
      .before_batch_stride = before.stride(0),
      .before_seq_stride = before.stride(1),
      .after_batch_stride = after.stride(0),
      .after_seq_stride = after.stride(1),
      .dtype = dtype,
      .is_update = is_update,
  };
  KVC_LAUNCH(cosine_importance, before, params);
  return out;
}

KVC_REGISTER(cosine_importance, cosine_importance)

}  // namespace
}  // namespace kvc
