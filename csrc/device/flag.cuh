// Flags in global memory between blocks of one launch.
#pragma once

#include <cstdint>

namespace kvc {

// Everything that this thread did or saw before comes before what any thread does after it has seen
// the flag.
__device__ __forceinline__ void flag_set(int32_t* flag) {
  asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}

__device__ __forceinline__ void flag_wait(const int32_t* flag) {
  int32_t value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while (value == 0);
}

}  // namespace kvc
