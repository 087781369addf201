// Launches that may begin before the one in front of them has ended ("programmatic dependent
// launch", sm_90 and later): prologues then overlap the tail of the previous kernel.
#pragma once

#include <cuda_runtime.h>

#include "device/check.cuh"

namespace kvc {

// In an early-launched kernel, before the first access to what earlier launches write: waits until
// they are complete. Elsewhere nothing.
__device__ __forceinline__ void launch_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch may begin once every block has come here or ended.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launch(blocks, threads, shared_bytes, stream).early(yes)(op, kernel, arguments...)
class Launch {
 public:
  Launch(unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream) {
    config_.gridDim = dim3(blocks);
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
  }
  // Only for a kernel that calls launch_wait, on devices of sm_90 and later.
  Launch& early(bool yes) {
    attribute_.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute_.val.programmaticStreamSerializationAllowed = 1;
    config_.attrs = &attribute_;
    config_.numAttrs = yes ? 1 : 0;
    return *this;
  }
  template <typename Kernel, typename... Args>
  void operator()(const char* op, Kernel kernel, const Args&... args) {
    cuda_check(cudaLaunchKernelEx(&config_, kernel, args...), op);
  }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

}  // namespace kvc
