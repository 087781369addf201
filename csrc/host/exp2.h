// exp2 over rows of floats, for softmax: about 1 ulp, exact 0 below 2^-126, NaN stays NaN.
#pragma once

#include <cstdint>

namespace kvc {

// x[j] = exp2(x[j] * scale - shift) in place; returns the sum, added in one fixed order. n is a
// multiple of 16 and x aligned to 64 bytes.
float exp2_of_scaled(float* x, float scale, float shift, int64_t n);

// The largest number; NaN is passed over, -inf if there is nothing else. Same n and alignment.
float max_of(const float* x, int64_t n);

}  // namespace kvc
