// exp2 over rows of floats, for softmax: about 1 ulp, exact 0 below 2^-126, NaN stays NaN. n is a
// multiple of 16 and x aligned to 64 bytes; sums run in one fixed order.
#pragma once

#include <cstdint>

namespace kvc {

// x[j] = exp2(x[j] * scale - shift) in place; returns the sum.
float exp2_of_scaled(float* x, float scale, float shift, int64_t n);

// The same with the product rounded first and a whole number as shift: then what two shifts give
// differs by an exact power of two. x[j] * scale must not exceed shift, -inf gives 0.
float exp2_below(float* x, float scale, float shift, int64_t n);

// The largest number; NaN is passed over, -inf if there is nothing else.
float max_of(const float* x, int64_t n);

}  // namespace kvc
