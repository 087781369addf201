#include "host/outer.h"

#include <algorithm>
#include <cstring>

#include "host/vec.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVC_PAIR_PRODUCTS 1
#include <immintrin.h>
#endif

namespace kvc {
namespace {

// As many rows and vectors as the registers of the instruction set hold: kVectors * kRows sums, and
// room for loads.
template <int kLanes, int kRows>
KVC_INLINE void outer_tiles(const float* left, int64_t depth, const float* panels,
                            int64_t num_panels, float* out, int64_t out_stride) {
  typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
  constexpr int kVectors = 2;
  constexpr int64_t kWidth = kLanes * kVectors;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int64_t column = 0; column < kOuterPanel; column += kWidth) {
      for (int64_t row = 0; row < kOuterRows; row += kRows) {
        const float* l = left + row * depth;
        const float* p = panels + panel * depth * kOuterPanel + column;
        Floats sums[kRows][kVectors] = {};
        for (int64_t d = 0; d < depth; ++d, p += kOuterPanel) {
          Floats right[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            right[v] = *reinterpret_cast<const Floats*>(p + v * kLanes);
          }
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[r][v] += l[r * depth + d] * right[v];
          }
        }
        float* to = out + row * out_stride + panel * kOuterPanel + column;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            *reinterpret_cast<Floats*>(to + r * out_stride + v * kLanes) = sums[r][v];
          }
        }
      }
    }
  }
}

// kLanes floats a vector: 4 has 16 registers, 8 as well, 16 has 32.
template <int kLanes>
KVC_INLINE void outer_tiles(const float* left, int64_t depth, const float* panels,
                            int64_t num_panels, float* out, int64_t out_stride) {
  outer_tiles<kLanes, kLanes == 16 ? 8 : 4>(left, depth, panels, num_panels, out, out_stride);
}

KVC_BY_WIDTH(void, tiles,
             (const float* left, int64_t depth, const float* panels, int64_t num_panels, float* out,
              int64_t out_stride),
             outer_tiles, (left, depth, panels, num_panels, out, out_stride))

// --- packing: 8 x 8 corners of 32-bit elements turn in registers

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

template <typename T>
KVC_INLINE void pack_eight(const T* from, int64_t stride, int64_t depth, float* panel) {
  for (int64_t d = 0; d < depth; d += 8, from += 8, panel += 8 * kOuterPanel) {
    Eight x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = load_floats<8>(from + i * stride);
    turn(x);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) std::memcpy(panel + i * kOuterPanel, &x[i], sizeof x[i]);
  }
}

// Whole eights of rows turn where they lie, the last few beside zeros.
template <typename T>
KVC_INLINE void pack(const T* from, int64_t stride, int64_t rows, int64_t depth, float* panels) {
  const int64_t padded = (rows + kOuterPanel - 1) / kOuterPanel * kOuterPanel;
  for (int64_t j = 0; j < padded; j += 8) {
    float* panel = panels + j / kOuterPanel * kOuterPanel * depth + j % kOuterPanel;
    if (j + 8 <= rows) {
      pack_eight(from + j * stride, stride, depth, panel);
      continue;
    }
    T beside[8][kOuterMaxDepth] = {};
    for (int64_t i = 0; i < rows - j; ++i) std::copy_n(from + (j + i) * stride, depth, beside[i]);
    pack_eight(beside[0], kOuterMaxDepth, depth, panel);
  }
}

}  // namespace

void outer_products(const float* left, int64_t depth, const float* panels, int64_t num_panels,
                    float* out, int64_t out_stride) {
  tiles(left, depth, panels, num_panels, out, out_stride);
}

KVC_CLONES void widen(const float* from, float* to, int64_t n) {
  std::copy_n(from, n, to);
}
KVC_CLONES void widen(const f16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
KVC_CLONES void widen(const bf16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

KVC_CLONES void pack_panels(const float* from, int64_t stride, int64_t rows, int64_t depth,
                            float* panels) {
  pack(from, stride, rows, depth, panels);
}
KVC_CLONES void pack_panels(const f16* from, int64_t stride, int64_t rows, int64_t depth,
                            float* panels) {
  pack(from, stride, rows, depth, panels);
}
KVC_CLONES void pack_panels(const bf16* from, int64_t stride, int64_t rows, int64_t depth,
                            float* panels) {
  pack(from, stride, rows, depth, panels);
}

// --- pairs

#ifdef KVC_PAIR_PRODUCTS

// Not on Intel: measured on a fifth-generation Xeon vdpbf16ps takes two cycles, 148 GFLOP/s on two
// cores where float32 reaches 260.
bool has_pair_products() {
  static const bool has = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has;
}

// Two neighbours of a row are one 32-bit element: the panels of rows of depth / 2 floats. Of a
// depth of 8 * odd, which is 4 of these beyond whole corners, the rest is turned one by one.
__attribute__((target("arch=x86-64-v4"))) void pack_panels(const bf16* from, int64_t stride,
                                                           int64_t rows, int64_t depth,
                                                           bf16* panels) {
  const int64_t pairs = depth / 2, whole = pairs / 8 * 8;
  const int64_t padded = (rows + kOuterPanel - 1) / kOuterPanel * kOuterPanel;
  const auto eight = [&](const bf16* row, int64_t row_stride, float* panel) KVC_LAMBDA_INLINE {
    for (int64_t p = 0; p < whole; p += 8) {
      Eight x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) std::memcpy(&x[i], row + i * row_stride + 2 * p, sizeof x[i]);
      turn(x);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) std::memcpy(panel + (p + i) * kOuterPanel, &x[i], sizeof x[i]);
    }
    for (int64_t p = whole; p < pairs; ++p) {
      for (int i = 0; i < 8; ++i) {
        std::memcpy(panel + p * kOuterPanel + i, row + i * row_stride + 2 * p, sizeof(float));
      }
    }
  };
  for (int64_t j = 0; j < padded; j += 8) {
    float* panel =
        reinterpret_cast<float*>(panels) + j / kOuterPanel * kOuterPanel * pairs + j % kOuterPanel;
    if (j + 8 <= rows) {
      eight(from + j * stride, stride, panel);
    } else {
      bf16 beside[8][kOuterMaxDepth] = {};
      for (int64_t i = 0; i < rows - j; ++i) {
        std::copy_n(from + (j + i) * stride, depth, beside[i]);
      }
      eight(beside[0], kOuterMaxDepth, panel);
    }
  }
}

__attribute__((target("arch=x86-64-v4,avx512bf16"))) void outer_products(
    const bf16* left, int64_t depth, const bf16* panels, int64_t num_panels, float* out,
    int64_t out_stride) {
  const int64_t pairs = depth / 2;
  static_assert(kOuterPanel == 32 && kOuterRows == 8);
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    const bf16* p = panels + panel * depth * kOuterPanel;
    __m512 sums[kOuterRows][2] = {};
    for (int64_t d = 0; d < pairs; ++d, p += 2 * kOuterPanel) {
      const __m512bh right[2] = {(__m512bh)_mm512_load_si512(p),
                                 (__m512bh)_mm512_load_si512(p + kOuterPanel)};
#pragma GCC unroll 8
      for (int r = 0; r < kOuterRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, left + r * depth + 2 * d, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], right[0], both);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right[1], both);
      }
    }
    float* to = out + panel * kOuterPanel;
#pragma GCC unroll 8
    for (int r = 0; r < kOuterRows; ++r) {
      _mm512_store_ps(to + r * out_stride, sums[r][0]);
      _mm512_store_ps(to + r * out_stride + 16, sums[r][1]);
    }
  }
}

#else

bool has_pair_products() {
  return false;
}
void pack_panels(const bf16*, int64_t, int64_t, int64_t, bf16*) {}
void outer_products(const bf16*, int64_t, const bf16*, int64_t, float*, int64_t) {}

#endif

}  // namespace kvc
