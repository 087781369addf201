// Products of bfloat16 pairs: AMX tiles on Intel, vdpbf16ps on AMD.
#include <algorithm>
#include <cstring>

#include "host/outer.h"
#include "host/vec.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define KVC_PAIR_PRODUCTS 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvc {

#ifdef KVC_PAIR_PRODUCTS

namespace {

// AMX, if the processor has it and the kernel lets this process use its registers (it asks once).
bool has_tiles() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    return (d & kBf16) && (d & kTile) && __builtin_cpu_supports("avx512bw") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

// Not on Intel: measured on a fifth-generation Xeon vdpbf16ps takes two cycles, 148 GFLOP/s on two
// cores where float32 reaches 260.
bool has_lanes() {
  static const bool has = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has;
}

constexpr int64_t kTileRows = 16, kTileDepth = 32;  // a tile: 16 rows of 64 bytes
constexpr int64_t kTilesFrom = 64;  // left rows: 4 rows took 12 ms where float32 takes 1.5

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int64_t n) {
    row_bytes[tile] = 64;
    rows[tile] = static_cast<uint8_t>(n);
  }
};
static_assert(sizeof(TileConfig) == 64);

// Tiles 0 - 3: sums of two row tiles times two of keys; 4, 5: left rows; 6, 7: keys.
__attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16"))) void tile_products(
    const bf16* left, int64_t rows, int64_t depth, const bf16* panels, int64_t num_panels,
    float* out, int64_t out_stride) {
  const int64_t upper = std::min(rows, kTileRows), lower = rows - upper;
  TileConfig config;
  for (const int tile : {0, 1, 4}) config.set(tile, upper);
  if (lower > 0) {
    for (const int tile : {2, 3, 5}) config.set(tile, lower);
  }
  for (const int tile : {6, 7}) config.set(tile, kTileDepth / 2);
  _tile_loadconfig(&config);
  const int64_t left_bytes = depth * 2, out_bytes = out_stride * 4;
  constexpr int64_t kPanelBytes = kOuterPanel * 4;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    const bf16* keys = panels + panel * depth * kOuterPanel;
    float* to = out + panel * kOuterPanel;
    _tile_zero(0);
    _tile_zero(1);
    if (lower > 0) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t d = 0; d < depth; d += kTileDepth) {
      _tile_loadd(4, left + d, left_bytes);
      _tile_loadd(6, keys + d * kOuterPanel, kPanelBytes);
      _tile_loadd(7, keys + d * kOuterPanel + 2 * kTileRows, kPanelBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (lower > 0) {
        _tile_loadd(5, left + kTileRows * depth + d, left_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, out_bytes);
    _tile_stored(1, to + kTileRows, out_bytes);
    if (lower > 0) {
      _tile_stored(2, to + kTileRows * out_stride, out_bytes);
      _tile_stored(3, to + kTileRows * out_stride + kTileRows, out_bytes);
    }
  }
  _tile_release();
}

__attribute__((target("arch=x86-64-v4,avx512bf16"))) void lane_products(
    const bf16* left, int64_t depth, const bf16* panels, int64_t num_panels, float* out,
    int64_t out_stride) {
  constexpr int kRows = 8;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    const bf16* p = panels + panel * depth * kOuterPanel;
    __m512 sums[kRows][2] = {};
    for (int64_t d = 0; d < depth; d += 2, p += 2 * kOuterPanel) {
      const __m512bh right[2] = {(__m512bh)_mm512_load_si512(p),
                                 (__m512bh)_mm512_load_si512(p + kOuterPanel)};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, left + r * depth + d, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], right[0], both);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right[1], both);
      }
    }
    float* to = out + panel * kOuterPanel;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      _mm512_store_ps(to + r * out_stride, sums[r][0]);
      _mm512_store_ps(to + r * out_stride + 16, sums[r][1]);
    }
  }
}

}  // namespace

bool has_pair_products(int64_t rows, int64_t depth) {
  return has_lanes() || (has_tiles() && depth % kTileDepth == 0 && rows >= kTilesFrom);
}

void outer_products(const bf16* left, int64_t rows, int64_t depth, const bf16* panels,
                    int64_t num_panels, float* out, int64_t out_stride) {
  if (has_tiles()) {
    tile_products(left, rows, depth, panels, num_panels, out, out_stride);
    return;
  }
  for (int64_t r = 0; r < rows; r += kOuterRows) {
    lane_products(left + r * depth, depth, panels, num_panels, out + r * out_stride, out_stride);
  }
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

#else

bool has_pair_products(int64_t, int64_t) {
  return false;
}
void pack_panels(const bf16*, int64_t, int64_t, int64_t, bf16*) {}
void outer_products(const bf16*, int64_t, int64_t, const bf16*, int64_t, float*, int64_t) {}

#endif

}  // namespace kvc
