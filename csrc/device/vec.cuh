// 16-byte accesses: as many elements as fit one load instruction.
#pragma once

#include <cstdint>

namespace kvc {

template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T data[kSize];
};

// Reads once, does not pollute L1; for streams that nobody reads again.
template <typename T>
__device__ __forceinline__ Vec<T> load_streaming(const T* address) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(address));
  Vec<T> out;
  *reinterpret_cast<uint4*>(&out) = raw;
  return out;
}

}  // namespace kvc
