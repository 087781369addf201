// Products of many rows with many rows (queries with keys), summed in float32: the small matrix
// product of the CPU twins.
//
// Right rows lie in panels of kOuterPanel rows, turned. Two forms: float32, [depth, kOuterPanel],
// for every dtype; and pairs of bfloat16 neighbours, [depth / 2, kOuterPanel], where the processor
// multiplies those faster (AMX on Intel, AVX-512 BF16 on AMD). In both, sums are float32; pairs
// take subnormal numbers for zero.
#pragma once

#include <cstdint>

#include "host/half.h"

namespace kvc {

constexpr int64_t kOuterRows = 8;    // left rows a call takes
constexpr int64_t kOuterPanel = 32;  // right rows that lie together in a panel
constexpr int64_t kOuterMaxDepth = 256;

// A row in float32.
void widen(const float* from, float* to, int64_t n);
void widen(const f16* from, float* to, int64_t n);
void widen(const bf16* from, float* to, int64_t n);

// Right rows, `stride` apart, as float32 panels; the last panel is filled up with zeros. depth is a
// multiple of 8 up to kOuterMaxDepth, panels of 64 bytes.
void pack_panels(const float* from, int64_t stride, int64_t rows, int64_t depth, float* panels);
void pack_panels(const f16* from, int64_t stride, int64_t rows, int64_t depth, float* panels);
void pack_panels(const bf16* from, int64_t stride, int64_t rows, int64_t depth, float* panels);

// out[r * out_stride + j] = <left[r], right[j]> for kOuterRows dense left rows and num_panels *
// kOuterPanel right rows. out and out_stride (in bytes) are multiples of 64. Each product is summed
// in ascending depth.
void outer_products(const float* left, int64_t depth, const float* panels, int64_t num_panels,
                    float* out, int64_t out_stride);

// The same with pairs, of up to kPairRows left rows (a multiple of kOuterRows), where
// has_pair_products() for all the left rows there are.
constexpr int64_t kPairRows = 32;
bool has_pair_products(int64_t rows, int64_t depth);
void pack_panels(const bf16* from, int64_t stride, int64_t rows, int64_t depth, bf16* panels);
void outer_products(const bf16* left, int64_t rows, int64_t depth, const bf16* panels,
                    int64_t num_panels, float* out, int64_t out_stride);

}  // namespace kvc
