#include "host/outer.h"

#include <algorithm>

#include "host/simd.h"

namespace kvc {
namespace {

// As many rows and vectors as the registers of the instruction set hold: kVectors * kRows sums, and
// room for loads.
template <int kLanes, int kRows, int kVectors>
__attribute__((always_inline)) inline void outer_tiles(const float* left, int64_t depth,
                                                       const float* panels, int64_t num_panels,
                                                       float* out, int64_t out_stride) {
  typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
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

template <typename T>
__attribute__((always_inline)) inline void pack(const T* from, int64_t stride, int64_t rows,
                                                int64_t depth, float* panels) {
  constexpr int64_t kSlice = 16;  // of the depth: a 16 x 32 corner turns in registers and L1
  for (int64_t first = 0; first < rows; first += kOuterPanel) {
    const int64_t n = std::min(kOuterPanel, rows - first);
    float* panel = panels + first * depth;
    for (int64_t d0 = 0; d0 < depth; d0 += kSlice) {
      const int64_t slice = std::min(kSlice, depth - d0);
      float corner[kOuterPanel][kSlice] = {};
      for (int64_t j = 0; j < n; ++j) {
        const T* row = from + (first + j) * stride + d0;
        if (slice == kSlice) {
          for (int64_t d = 0; d < kSlice; ++d) corner[j][d] = to_float(row[d]);
        } else {
          for (int64_t d = 0; d < slice; ++d) corner[j][d] = to_float(row[d]);
        }
      }
      for (int64_t d = 0; d < slice; ++d) {
        for (int64_t j = 0; j < kOuterPanel; ++j) panel[(d0 + d) * kOuterPanel + j] = corner[j][d];
      }
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("arch=x86-64-v4"))) void tiles(const float* left, int64_t depth,
                                                     const float* panels, int64_t num_panels,
                                                     float* out, int64_t out_stride) {
  outer_tiles<16, 8, 2>(left, depth, panels, num_panels, out, out_stride);
}
__attribute__((target("arch=x86-64-v3"))) void tiles(const float* left, int64_t depth,
                                                     const float* panels, int64_t num_panels,
                                                     float* out, int64_t out_stride) {
  outer_tiles<8, 4, 2>(left, depth, panels, num_panels, out, out_stride);
}
__attribute__((target("default")))
#endif
void tiles(const float* left, int64_t depth, const float* panels, int64_t num_panels, float* out,
           int64_t out_stride) {
  outer_tiles<4, 4, 2>(left, depth, panels, num_panels, out, out_stride);
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

}  // namespace kvc
