// The 16-bit storage types of the CPU twins (device/dispatch.cuh has those of CUDA).
#pragma once

#include <cstdint>
#include <cstring>

namespace kvc {

// 16-bit storage types. Arithmetic is always float32; rounding is to nearest even, as torch and
// CUDA do.
struct bf16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using Float16 = __fp16;  // GCC has _Float16 in C++ from 13 on
#else
using Float16 = _Float16;
#endif
struct f16 {
  Float16 value;
};

inline float to_float(float x) {
  return x;
}
inline float to_float(f16 x) {
  return static_cast<float>(x.value);
}
inline float to_float(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline f16 from_float<f16>(float x) {
  return {static_cast<Float16>(x)};
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // NaN stays NaN
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}

}  // namespace kvc
