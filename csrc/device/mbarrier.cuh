// mbarrier: a shared-memory barrier that also counts the bytes of asynchronous copies (sm_90 and
// later). A phase ends when all expected arrivals and bytes are in; phase n has parity n % 2.
//
// A ring of kStages buffers between a producer and its consumers takes two barriers a stage:
//   full   1 arrival: the producer's expect_bytes; the copies bring the bytes
//   empty  1 arrival per consuming warp
// Item i uses stage i % kStages: consumers wait for full with parity i / kStages % 2, the producer
// for empty with the other parity, which the first round passes at once.
#pragma once

#include <cstdint>

namespace kvc {

using Mbarrier = uint64_t;  // in shared memory, 8-byte aligned

__device__ __forceinline__ uint32_t mbarrier_address(const Mbarrier* barrier) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
}

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After all inits of a thread and before the block's barrier: asynchronous copies see them too.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Some functions also take a barrier by its address in shared memory.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  mbarrier_arrive_at(mbarrier_address(barrier));
}

// Arrives, and the phase now also waits for so many bytes of asynchronous copies.
__device__ __forceinline__ void mbarrier_expect_bytes(Mbarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Until the phase of this parity has ended; what came before its arrivals is then visible.
__device__ __forceinline__ void mbarrier_wait_at(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  mbarrier_wait_at(mbarrier_address(barrier), parity);
}

// __syncthreads of the first `threads` threads that come here, barrier `id` from 1 to 15.
__device__ __forceinline__ void partial_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as one of those threads without waiting for the others.
__device__ __forceinline__ void partial_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace kvc
