// The one door to the kernels: device guard, the caller's stream, and the answer of a build without
// CUDA.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <utility>

namespace kvc {

using Stream = void*;  // cudaStream_t without the CUDA headers; null is the legal default stream

// The caller's current stream on `device`. Fails with what to do if this torch has no CUDA.
Stream current_stream(int32_t device);
[[noreturn]] void fail_without_cuda(const char* op);

// Runs f(stream) with the device of `anchor` current.
template <typename F>
void on_device(const torch::stable::Tensor& anchor, F&& f) {
  const int32_t device = anchor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::forward<F>(f)(current_stream(device));
}

}  // namespace kvc

// Calls <op>_cpu(params) or <op>_cuda(params, stream), by the device of `anchor`.
#ifdef KVC_WITH_CUDA
#define KVC_LAUNCH(op, anchor, params)                                                    \
  do {                                                                                    \
    if ((anchor).is_cuda()) {                                                             \
      ::kvc::on_device(anchor, [&](::kvc::Stream stream) { op##_cuda(params, stream); }); \
    } else {                                                                              \
      op##_cpu(params);                                                                   \
    }                                                                                     \
  } while (false)
#else
#define KVC_LAUNCH(op, anchor, params)                     \
  do {                                                     \
    if ((anchor).is_cuda()) ::kvc::fail_without_cuda(#op); \
    op##_cpu(params);                                      \
  } while (false)
#endif

// Registers `function` as the CPU and the CUDA kernel of kvcompress::<op>.
#define KVC_REGISTER(op, function)                       \
  STABLE_TORCH_LIBRARY_IMPL(kvcompress, CPU, library) {  \
    library.impl(#op, TORCH_BOX(&function));             \
  }                                                      \
  STABLE_TORCH_LIBRARY_IMPL(kvcompress, CUDA, library) { \
    library.impl(#op, TORCH_BOX(&function));             \
  }
