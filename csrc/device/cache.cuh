// What a kernel tells the L2 cache. sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvc {

// Data that the next launch reads: the last to leave L2. To be discarded then.
__device__ __forceinline__ void store_kept(float4* to, float4 x) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;\n" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;\n" ::"l"(to), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w), "l"(policy)
               : "memory");
}

// The 128 bytes at a multiple of 128 will be written before they are read again: they need not go
// to memory.
__device__ __forceinline__ void discard_line(const void* line) {
  asm volatile("discard.global.L2 [%0], 128;\n" ::"l"(line) : "memory");
}

// From memory to L2.
__device__ __forceinline__ void fetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from));
}

}  // namespace kvc
