#include "host/exp2.h"

#include <limits>

#include "host/simd.h"

namespace kvc {
namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// 2^f - 1 over f for f in [-0.5, 0.5]: the Taylor terms ln(2)^n / n!, the last at 2e-9 relative
constexpr float kC1 = 0.693147180559945f, kC2 = 0.240226506959101f, kC3 = 0.0555041086648216f;
constexpr float kC4 = 0.00961812910762848f, kC5 = 0.00133335581464284f, kC6 = 0.000154035303933816f;
constexpr float kC7 = 0.0000152527338040598f;
constexpr float kRound =
    12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

}  // namespace

KVC_CLONES float exp2_of_scaled(float* x, float scale, float shift, int64_t n) {
  Floats sums = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    Floats* at = reinterpret_cast<Floats*>(x + j);
    const Floats y = *at * scale - shift;
    const Floats low =
        (y < -126.0f) ? Floats{} - 126.0f : y;  // comparisons with NaN are false: it stays
    const Floats z = (low > 128.0f) ? Floats{} + 128.0f : low;
    const Floats rounded = z + kRound;
    const Floats f = z - (rounded - kRound);
    Floats poly = kC6 + f * kC7;
    poly = kC5 + f * poly;
    poly = kC4 + f * poly;
    poly = kC3 + f * poly;
    poly = kC2 + f * poly;
    poly = kC1 + f * poly;
    poly = 1.0f + f * poly;
    const Ints exponent = (__builtin_bit_cast(Ints, rounded) + 127) << 23;
    const Floats value = poly * __builtin_bit_cast(Floats, exponent);
    *at = (y < -126.0f) ? Floats{} : value;
    sums += *at;
  }
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

KVC_CLONES float max_of(const float* x, int64_t n) {
  Floats most = Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < n; j += kLanes) {
    const Floats y = *reinterpret_cast<const Floats*>(x + j);
    most = (y > most) ? y : most;
  }
  float all = most[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) all = most[lane] > all ? most[lane] : all;
  return all;
}

}  // namespace kvc
