#include "host/outer.h"

#include <algorithm>
#include <cstring>

#include "host/vec.h"

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

// --- packing

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

}  // namespace kvc
