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

// Launch(blocks, threads, shared_bytes, stream).cluster(size).early(yes)(op, kernel, arguments...)
class Launch {
 public:
  Launch(dim3 blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream) {
    config_.gridDim = blocks;
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
  }
  // Blocks of a cluster, neighbours in the grid. More than 1 on sm_90 and later only.
  Launch& cluster(unsigned blocks) {
    if (blocks > 1) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {blocks, 1, 1};
    }
    return *this;
  }
  // Only for a kernel that calls launch_wait, on devices of sm_90 and later.
  Launch& early(bool yes) {
    if (yes) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    return *this;
  }
  template <typename Kernel, typename... Args>
  void operator()(const char* op, Kernel kernel, const Args&... args) {
    if (config_.dynamicSmemBytes > 48 << 10) {
      cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(config_.dynamicSmemBytes)),
                 op);
    }
    cuda_check(cudaLaunchKernelEx(&config_, kernel, args...), op);
  }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};

}  // namespace kvc
