// Thread-block clusters (sm_90 and later): barriers and reads of the other blocks' shared memory. A
// cluster of one block is an ordinary block and compiles for every architecture.
#pragma once

#include <cstdint>

namespace kvc {

// All threads of the cluster; what any of them wrote to shared memory before is seen by all after.
template <int kBlocks>
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (kBlocks > 1) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
    __trap();  // never launched here
#endif
  }
}

// Orders nothing: only says that this thread has come here.
template <int kBlocks>
__device__ __forceinline__ void cluster_arrive_relaxed() {
  if constexpr (kBlocks > 1) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
    __trap();  // never launched here
#endif
  }
}

template <int kBlocks>
__device__ __forceinline__ void cluster_wait() {
  if constexpr (kBlocks > 1) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
  } else {
    __syncthreads();
  }
}

template <int kBlocks>
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive<kBlocks>();
  cluster_wait<kBlocks>();
}

// *shared as block `rank` of the cluster holds it.
template <int kBlocks>
__device__ __forceinline__ uint32_t cluster_load(const uint32_t* shared,
                                                 [[maybe_unused]] int rank) {
  uint32_t value = 0;
  if constexpr (kBlocks > 1) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote) : "memory");
#endif
  } else {
    value = *shared;
  }
  return value;
}

// *shared = value as block `rank` of the cluster holds it; seen by its threads after the next
// cluster barrier. The block must have started: arrive early, wait before the first store.
template <int kBlocks>
__device__ __forceinline__ void cluster_store(uint32_t* shared, [[maybe_unused]] int rank,
                                              uint32_t value) {
  if constexpr (kBlocks > 1) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
#endif
  } else {
    *shared = value;
  }
}

template <int kBlocks>
__device__ __forceinline__ uint2 cluster_load2(const uint32_t* shared, [[maybe_unused]] int rank) {
  uint2 value{};
  if constexpr (kBlocks > 1) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "r"(remote)
                 : "memory");
#endif
  } else {
    value = *reinterpret_cast<const uint2*>(shared);
  }
  return value;
}

}  // namespace kvc
