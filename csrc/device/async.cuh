// Copies from global to shared memory that need no register while they are under way.
#pragma once

#include <cstdint>

namespace kvc {

// One word, asynchronous from 4 bytes on; smaller words pass through a register.
template <typename Word>
__device__ __forceinline__ void copy_async(Word* shared, const Word* global) {
  if constexpr (sizeof(Word) == 16) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else if constexpr (sizeof(Word) >= 4) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global),
                 "n"(sizeof(Word))
                 : "memory");
  } else {
    *shared = *global;
  }
}

// Until all copies of this thread have arrived.
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace kvc
