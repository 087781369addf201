#include "host/exp2.h"

#include <limits>

#include "host/vec.h"

namespace kvc {
namespace {

// 16 elements at a time, as so many vectors of the width that the instruction set has: the order of
// additions is the same for all.
constexpr int64_t kStep = 16;

// 2^f - 1 over f for f in [-0.5, 0.5]: the polynomial of least relative error, 2e-9
constexpr float kC1 = 0.69314718246459961f, kC2 = 0.24022647738456726f, kC3 = 0.0555033236742020f;
constexpr float kC4 = 0.00961843691766262f, kC5 = 0.0013398875016719f, kC6 = 0.00015353361959569f;
// 1.5 * 2^23: adding it leaves the nearest integer in the low bits
constexpr float kRound = 12582912.0f;

template <int kLanes>
KVC_INLINE auto fraction_power(typename Simd<kLanes>::Floats f) {
  auto poly = kC5 + f * kC6;
  poly = kC4 + f * poly;
  poly = kC3 + f * poly;
  poly = kC2 + f * poly;
  poly = kC1 + f * poly;
  return 1.0f + f * poly;
}

// 2^n for whole n in [-127, 128], given as n + kRound; 0 for n = -127
template <int kLanes>
KVC_INLINE auto whole_power(typename Simd<kLanes>::Floats rounded) {
  using Ints = typename Simd<kLanes>::Ints;
  const Ints exponent = (__builtin_bit_cast(Ints, rounded) + 127) << 23;
  return __builtin_bit_cast(typename Simd<kLanes>::Floats, exponent);
}

template <int kLanes>
KVC_INLINE auto power(typename Simd<kLanes>::Floats x, float scale, float shift) {
  using Floats = typename Simd<kLanes>::Floats;
  const Floats y = x * scale - shift;
  // comparisons with NaN are false: it stays
  const Floats low = (y < -126.0f) ? Floats{} - 126.0f : y;
  const Floats z = (low > 128.0f) ? Floats{} + 128.0f : low;
  const Floats rounded = z + kRound;
  const Floats value =
      fraction_power<kLanes>(z - (rounded - kRound)) * whole_power<kLanes>(rounded);
  return (y < -126.0f) ? Floats{} : value;
}

template <int kLanes>
KVC_INLINE auto power_below(typename Simd<kLanes>::Floats x, float scale, float shift) {
  using Floats = typename Simd<kLanes>::Floats;
  const Floats product = x * scale;
  // so large a number that it has no fraction, and so small that its power is 0 above any shift
  const Floats z = (product < -0x1p100f) ? Floats{} - 0x1p100f : product;
  // below, the nearest whole number shows in the low bits only while |z| < 2^22; beyond, z has no
  // fraction worth the name and any whole number near it does
  const Floats whole = (z + kRound) - kRound;
  const Floats distance = whole - shift;
  const Floats power = (distance < -127.0f) ? Floats{} - 127.0f : distance;
  return fraction_power<kLanes>(z - whole) * whole_power<kLanes>(power + kRound);
}

template <int kLanes, typename F>
KVC_INLINE float apply(float* x, int64_t n, F f) {
  using S = Simd<kLanes>;
  constexpr int kParts = kStep / kLanes;
  typename S::Floats sums[kParts] = {};
  for (int64_t j = 0; j < n; j += kStep) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      auto* at = reinterpret_cast<typename S::Floats*>(x + j + part * kLanes);
      *at = f(*at);
      sums[part] += *at;
    }
  }
  float sum = 0;
  for (int64_t lane = 0; lane < kStep; ++lane) sum += sums[lane / kLanes][lane % kLanes];
  return sum;
}

template <int kLanes>
KVC_INLINE float exp2_of_scaled_in(float* x, float scale, float shift, int64_t n) {
  using Floats = typename Simd<kLanes>::Floats;
  return apply<kLanes>(x, n,
                       [=](Floats y) KVC_LAMBDA_INLINE { return power<kLanes>(y, scale, shift); });
}

template <int kLanes>
KVC_INLINE float exp2_below_in(float* x, float scale, float shift, int64_t n) {
  using Floats = typename Simd<kLanes>::Floats;
  return apply<kLanes>(
      x, n, [=](Floats y) KVC_LAMBDA_INLINE { return power_below<kLanes>(y, scale, shift); });
}

template <int kLanes>
KVC_INLINE float max_of_in(const float* x, int64_t n) {
  using S = Simd<kLanes>;
  constexpr int kParts = kStep / kLanes;
  typename S::Floats most[kParts];
  for (auto& part : most) part = typename S::Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < n; j += kStep) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const auto y = *reinterpret_cast<const typename S::Floats*>(x + j + part * kLanes);
      most[part] = (y > most[part]) ? y : most[part];
    }
  }
  float all = most[0][0];
  for (int64_t lane = 1; lane < kStep; ++lane) {
    const float one = most[lane / kLanes][lane % kLanes];
    all = one > all ? one : all;
  }
  return all;
}

KVC_BY_WIDTH(float, exp2_of_scaled_by, (float* x, float scale, float shift, int64_t n),
             exp2_of_scaled_in, (x, scale, shift, n))
KVC_BY_WIDTH(float, exp2_below_by, (float* x, float scale, float shift, int64_t n), exp2_below_in,
             (x, scale, shift, n))
KVC_BY_WIDTH(float, max_of_by, (const float* x, int64_t n), max_of_in, (x, n))

}  // namespace

float exp2_of_scaled(float* x, float scale, float shift, int64_t n) {
  return exp2_of_scaled_by(x, scale, shift, n);
}
float exp2_below(float* x, float scale, float shift, int64_t n) {
  return exp2_below_by(x, scale, shift, n);
}
float max_of(const float* x, int64_t n) {
  return max_of_by(x, n);
}

}  // namespace kvc
