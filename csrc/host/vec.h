// Vectors of the width that an instruction set has, for KVC_BY_WIDTH (host/simd.h): their types,
// and how stored numbers enter them. All of it is inlined into functions of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host/half.h"
#include "host/simd.h"

namespace kvc {

template <int kLanes>
struct Simd {
  typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
  typedef uint32_t Unsigneds __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
};

// kLanes neighbours, at any address.
template <int kLanes>
KVC_INLINE typename Simd<kLanes>::Floats load_floats(const float* from) {
  typename Simd<kLanes>::Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <int kLanes>
KVC_INLINE typename Simd<kLanes>::Floats load_floats(const f16* from) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = to_float(from[i]);
  return load_floats<kLanes>(wide);
}
template <int kLanes>
KVC_INLINE typename Simd<kLanes>::Floats load_floats(const bf16* from) {
  using S = Simd<kLanes>;
  typename S::Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_bit_cast(typename S::Floats, __builtin_convertvector(bits, typename S::Unsigneds)
                                                    << 16);
}

// What x becomes when it is stored as a T.
template <typename T, int kLanes>
KVC_INLINE typename Simd<kLanes>::Floats rounded_to(typename Simd<kLanes>::Floats x) {
  using S = Simd<kLanes>;
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    const auto bits = __builtin_bit_cast(typename S::Unsigneds, x);
    const auto kept = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return (x == x) ? __builtin_bit_cast(typename S::Floats, kept) : x;  // NaN stays NaN
  } else {
    typename S::Floats y;
    for (int i = 0; i < kLanes; ++i) y[i] = to_float(from_float<T>(x[i]));
    return y;
  }
}

// 8 rows of 8 elements of 32 bits, turned in registers.
using Eight = Simd<8>::Floats;

KVC_INLINE void turn(Eight (&x)[8]) {
  using Pick = Simd<8>::Ints;
  const Pick low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  const Pick even = {0, 1, 8, 9, 4, 5, 12, 13}, odd = {2, 3, 10, 11, 6, 7, 14, 15};
  const Pick first = {0, 1, 2, 3, 8, 9, 10, 11}, last = {4, 5, 6, 7, 12, 13, 14, 15};
  Eight y[8], z[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], low);
    y[2 * i + 1] = __builtin_shuffle(x[2 * i], x[2 * i + 1], high);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int a = i / 2 * 4 + i % 2;
    z[2 * i] = __builtin_shuffle(y[a], y[a + 2], even);
    z[2 * i + 1] = __builtin_shuffle(y[a], y[a + 2], odd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = __builtin_shuffle(z[i], z[i + 4], first);
    x[i + 4] = __builtin_shuffle(z[i], z[i + 4], last);
  }
}

}  // namespace kvc
