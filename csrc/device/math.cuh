// Small arithmetic that kernels share.
#pragma once

#include <cstdint>

namespace kvc {

// 2^x, 2 ulp, one instruction; results below 2^-126 are 0, NaN stays NaN.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// The larger number; NaN if either is (fmaxf would drop it).
__device__ __forceinline__ float nan_max(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Division of 0 <= n < 2^31 by a divisor that is known on the host: a product and a shift. Divisor
// at least 2.
struct FastDivisor {
  uint32_t divisor, multiplier, shift;

  explicit FastDivisor(uint32_t d) : divisor(d) {
    uint32_t log2 = 0;
    while ((uint64_t{1} << log2) < d) ++log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log2)) + d - 1) / d);
    shift = log2 - 1;
  }
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(__umulhi(static_cast<uint32_t>(n), multiplier) >> shift);
  }
};

}  // namespace kvc
