// The torch side of TopkParams::scratch: what topk and topk_ragged allocate.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/check.h"
#include "common/on_device.h"
#include "select/topk.h"

namespace kvc {

// Sets params.scratch; keep what comes back until the launch.
inline std::optional<Tensor> topk_scratch([[maybe_unused]] const Tensor& scores,
                                          [[maybe_unused]] TopkParams& params) {
  std::optional<Tensor> scratch;
#ifdef KVC_WITH_CUDA
  if (scores.is_cuda()) {
    int64_t bytes = 0;
    on_device(scores, [&](Stream) { bytes = topk_cuda_scratch(params); });
    if (bytes > 0) {
      scratch = torch::stable::new_empty(scores, {bytes}, ScalarType::Byte);
      params.scratch = scratch->mutable_data_ptr();
    }
  }
#endif
  return scratch;
}

}  // namespace kvc
