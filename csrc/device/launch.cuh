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
  Launch(dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream) {
    config_.gridDim = blocks;
    config_.blockDim = threads;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
  }
  // Blocks of a cluster, neighbours in the grid. More than 1 on sm_90 and later only, more than 8
  // where fitting_clusters says that there is room.
  Launch& cluster(unsigned blocks) {
    cluster_ = blocks;
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
    prepare(op, kernel);
    cuda_check(cudaLaunchKernelEx(&config_, kernel, args...), op);
  }
  // Clusters of this launch that run at once; 0 where the device has none of that size.
  template <typename Kernel>
  int fitting_clusters(const char* op, Kernel kernel) {
    prepare(op, kernel);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config_) != cudaSuccess) {
      cudaGetLastError();
      return 0;
    }
    return clusters;
  }

 private:
  // What is more than a kernel gets unasked.
  template <typename Kernel>
  void prepare(const char* op, Kernel kernel) {
    config_.attrs = attributes_;
    if (config_.dynamicSmemBytes > 48 << 10) {
      cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(config_.dynamicSmemBytes)),
                 op);
    }
    if (cluster_ > 8) {
      cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 op);
    }
  }

  unsigned cluster_ = 1;
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};

}  // namespace kvc
