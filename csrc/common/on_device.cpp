#include "common/on_device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Lives in libtorch_cuda.so only; weak, so that the same library loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace kvc {

Stream current_stream(int32_t device) {
  static const bool available = aoti_torch_get_current_cuda_stream != nullptr;
  STD_TORCH_CHECK(available,
                  "kvcompress: a CUDA tensor came, but this torch has no CUDA; install a CUDA "
                  "build of torch");
  Stream stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
  STD_TORCH_CHECK(error == 0, "kvcompress: torch gave no current stream for cuda:", device);
  return stream;
}

void fail_without_cuda(const char* op) {
  STD_TORCH_CHECK(false, op,
                  ": a CUDA tensor came, but this kvcompress was built without CUDA; rebuild it "
                  "where nvcc is found, or move the tensors to the CPU");
  __builtin_unreachable();
}

}  // namespace kvc
