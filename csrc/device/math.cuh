// Small arithmetic that kernels share.
#pragma once

#include "host/fast_divisor.h"

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

}  // namespace kvc
