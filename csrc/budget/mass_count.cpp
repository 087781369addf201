#include "budget/mass_count.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/check.h"
#include "common/on_device.h"

namespace kvc {
namespace {

constexpr const char* kOp = "mass_count";
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

Tensor mass_count(const Tensor& mass, double share) {
  check_rank(kOp, "mass", mass, 3, "[batch, heads, seq_len]");
  check_dtype(kOp, "mass", mass, ScalarType::Float);
  check_last_contiguous(kOp, "mass", mass);
  const int64_t batch = mass.size(0), heads = mass.size(1), seq_len = mass.size(2);
  require(seq_len <= kMaxInt32, kOp, "mass", "of at most 2147483647 entries a head", text(seq_len));
  require(share > 0 && share <= 1, kOp, "share", "in (0, 1]", std::to_string(share));

  Tensor counts = torch::stable::new_empty(mass, {batch, heads}, ScalarType::Int);
  if (batch == 0 || heads == 0) return counts;
  if (seq_len == 0) return torch::stable::zero_(counts);
  const MassCountParams params{
      .mass = mass.const_data_ptr<float>(),
      .counts = counts.mutable_data_ptr<int32_t>(),
      .batch = batch,
      .heads = heads,
      .seq_len = seq_len,
      .batch_stride = mass.stride(0),
      .head_stride = mass.stride(1),
      .share = share,
  };
  KVC_LAUNCH(mass_count, mass, params);
  return counts;
}

KVC_REGISTER(mass_count, mass_count)

}  // namespace
}  // namespace kvc
