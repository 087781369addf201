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

}  // namespace kvc
