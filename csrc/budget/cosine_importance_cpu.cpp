#include "budget/cosine_importance.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "host/dispatch.h"
#include "host/parallel.h"
#include "host/vec.h"

namespace kvc {
namespace {

struct Sums {
  float dot, before, after;
};

// Running sums of a quantity: as many as registers hold, and one fixed order of addition for every
// width of vector.
constexpr int kRunning = 32;
// Asked for ahead of their turn, in both streams: the hardware stops at every 4 KB page.
constexpr int64_t kAheadBytes = 2048;

template <int kLanes, typename T>
KVC_INLINE Sums token_sums(const T* h, const T* a, int64_t hidden, bool is_update) {
  using Floats = typename Simd<kLanes>::Floats;
  constexpr int kParts = kRunning / kLanes;
  Floats dot[kParts] = {}, before[kParts] = {}, after[kParts] = {};
  const auto add = [&](const T* at_h, const T* at_a, bool update) KVC_LAMBDA_INLINE {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const Floats x = load_floats<kLanes>(at_h + part * kLanes);
      Floats y = load_floats<kLanes>(at_a + part * kLanes);
      if (update) y = rounded_to<T, kLanes>(x + y);
      dot[part] += x * y;
      before[part] += x * x;
      after[part] += y * y;
    }
  };
  const auto add_ahead = [&](const T* at_h, const T* at_a, bool update) KVC_LAMBDA_INLINE {
    __builtin_prefetch(reinterpret_cast<const char*>(at_h) + kAheadBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(at_a) + kAheadBytes);
    add(at_h, at_a, update);
  };
  int64_t i = 0;
  if (is_update) {
    for (; i + kRunning <= hidden; i += kRunning) add_ahead(h + i, a + i, true);
  } else {
    for (; i + kRunning <= hidden; i += kRunning) add_ahead(h + i, a + i, false);
  }
  if (i < hidden) {  // the rest beside zeros, which add nothing
    T rest_h[kRunning] = {}, rest_a[kRunning] = {};
    std::copy_n(h + i, hidden - i, rest_h);
    std::copy_n(a + i, hidden - i, rest_a);
    add(rest_h, rest_a, is_update);
  }
  Sums sums{};
  for (int lane = 0; lane < kRunning; ++lane) {
    sums.dot += dot[lane / kLanes][lane % kLanes];
    sums.before += before[lane / kLanes][lane % kLanes];
    sums.after += after[lane / kLanes][lane % kLanes];
  }
  return sums;
}

KVC_BY_WIDTH(Sums, token_sums_of, (const float* h, const float* a, int64_t n, bool is_update),
             token_sums, (h, a, n, is_update))
KVC_BY_WIDTH(Sums, token_sums_of, (const f16* h, const f16* a, int64_t n, bool is_update),
             token_sums, (h, a, n, is_update))
KVC_BY_WIDTH(Sums, token_sums_of, (const bf16* h, const bf16* a, int64_t n, bool is_update),
             token_sums, (h, a, n, is_update))

float cosine(const Sums& s) {
  return s.dot /
         (std::max(std::sqrt(s.before), kCosineEps) * std::max(std::sqrt(s.after), kCosineEps));
}

template <typename T>
void run(const CosineImportanceParams& p) {
  parallel_for(0, p.batch * p.num_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.num_tiles, tile = item % p.num_tiles;
      const int64_t start = p.seq_start ? p.seq_start[b] : 0;
      const int64_t first = std::max(tile * kCosineTile, start);
      const int64_t last = std::min((tile + 1) * kCosineTile, p.seq_len);
      const T* h = static_cast<const T*>(p.before) + b * p.before_batch_stride;
      const T* a = static_cast<const T*>(p.after) + b * p.after_batch_stride;
      float sum = 0;
      for (int64_t s = first; s < last; ++s) {
        sum += cosine(token_sums_of(h + s * p.before_seq_stride, a + s * p.after_seq_stride,
                                    p.hidden, p.is_update));
      }
      p.partial[item] = sum;
    }
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t tokens = p.seq_len - (p.seq_start ? p.seq_start[b] : 0);
    float lanes[kCosineLanes] = {};
    for (int64_t tile = 0; tile < p.num_tiles; ++tile) {
      lanes[tile % kCosineLanes] += p.partial[b * p.num_tiles + tile];
    }
    for (int64_t half = kCosineLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    p.out[b] = tokens > 0 ? lanes[0] / static_cast<float>(tokens)
                          : std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace

void cosine_importance_cpu(const CosineImportanceParams& params) {
  visit_float(params.dtype, "cosine_importance", [&](auto tag) { run<decltype(tag)>(params); });
}

}  // namespace kvc
