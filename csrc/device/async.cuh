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

// Closes a group of copies of this thread.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until all but the newest kPending groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace kvc
