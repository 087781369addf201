// The two products of decode attention, keys with query rows and probabilities with values, for one
// warp and kStepKeys keys in shared memory.
//
// Keys are the long side of every product, query rows the short one: a block of 8 rows costs 8
// columns, not
// 16. Logits come as [keys][rows], in the layout of the tensor cores: lane l holds keys l / 4 and l
// / 4 + 8 of rows 2 (l % 4) and the next; the output as [head_dim][rows] in the same layout.
// float32 uses that layout too, with FMA.
//
// A key or value is kDim elements in units of 16 bytes; unit u of key j lies at u ^ (j % 8), so
// that no read of eight keys meets a bank twice.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "attend/decode_attention.h"
#include "device/dispatch.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"

namespace kvc {

// What a warp keeps of its query rows; row_at(r) is where row r lies, null if there is no such row.
template <typename T, int kDim, int kBlocks>
struct DecodeProducts {
  static constexpr int kUnits = kDim / 8;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kSharedQueryFloats = 0;
  // exp2 starts this far above 1, so that half precision does not lose small probabilities.
  static constexpr float kHeadroom = sizeof(T) == 2 && __is_same(T, __half) ? 12.0f : 0.0f;
  uint32_t q[kBlocks][kSteps][2];

  template <typename F>
  __device__ __forceinline__ void load_queries(F&& row_at, int64_t head_dim, bool aligned, int lane,
                                               float* /*shared*/) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const T* row = row_at(block * 8 + lane / 4);
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const T* at = row + i * 8 + lane % 4 * 2;
        uint32_t pair = 0;
        if (row != nullptr && i * 8 < head_dim) {
          pair = aligned ? *reinterpret_cast<const uint32_t*>(at)
                         : pack_bits(reinterpret_cast<const uint16_t*>(at)[0],
                                     reinterpret_cast<const uint16_t*>(at)[1]);
        }
        q[block][i / 2][i % 2] = pair;
      }
    }
  }

  // c[block] = <k, q>, two chains of sums to halve the wait.
  __device__ __forceinline__ void logits(float (&c)[kBlocks][4], const char* keys, int lane) const {
    float odd[kBlocks][4];
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i) c[i / 4][i % 4] = odd[i / 4][i % 4] = 0;
    const char* row = keys + lane % 16 * kUnits * 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrices(a, row + ((2 * step + lane / 16) ^ (lane % 8)) * 16);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply_add<T>(step % 2 ? odd[block] : c[block], a, q[block][step][0], q[block][step][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i) c[i / 4][i % 4] += odd[i / 4][i % 4];
  }

  // out += v^T p. p enters as the sum of two numbers of T: rounding to one would cost half the
  // accuracy of the result, and the tensor cores wait for memory anyway.
  __device__ __forceinline__ void add_values(float (&out)[kSteps][kBlocks][4],
                                             const float (&p)[kBlocks][4], const char* values,
                                             int lane) const {
    uint32_t high[kBlocks][2], low[kBlocks][2];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = p[block][2 * half], y = p[block][2 * half + 1];
        const T x_high = from_float<T>(x), y_high = from_float<T>(y);
        high[block][half] = transpose_matrix(pack(x_high, y_high));
        low[block][half] = transpose_matrix(
            pack(from_float<T>(x - to_float(x_high)), from_float<T>(y - to_float(y_high))));
      }
    }
    const char* row = values + (lane % 8 + lane / 16 * 8) * kUnits * 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrices_transposed(a, row + ((2 * step + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply_add<T>(out[step][block], a, high[block][0], high[block][1]);
        multiply_add<T>(out[step][block], a, low[block][0], low[block][1]);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t pack_bits(uint16_t x, uint16_t y) {
    return x | static_cast<uint32_t>(y) << 16;
  }
  static __device__ __forceinline__ uint32_t pack(T x, T y) {
    return pack_bits(reinterpret_cast<const uint16_t&>(x), reinterpret_cast<const uint16_t&>(y));
  }
};

template <int kDim>
struct DecodeProducts<float, kDim, 1> {
  static constexpr int kUnits = kDim / 4;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kStride = kDim + 4;  // of a query row: four rows in four different banks
  static constexpr int kSharedQueryFloats = 8 * kStride;
  static constexpr float kHeadroom = 0.0f;
  const float* q;

  template <typename F>
  __device__ __forceinline__ void load_queries(F&& row_at, int64_t head_dim, bool /*aligned*/,
                                               int lane, float* shared) {
    __syncwarp();  // the rows of before are read
    for (int r = 0; r < 8; ++r) {
      const float* row = row_at(r);
      for (int d = lane; d < kDim; d += kWarp) {
        shared[r * kStride + d] = row != nullptr && d < head_dim ? row[d] : 0.0f;
      }
    }
    __syncwarp();
    q = shared;
  }

  __device__ __forceinline__ void logits(float (&c)[1][4], const char* keys, int lane) const {
    const float* rows = q + 2 * (lane % 4) * kStride;
    const int j = lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) c[0][i] = 0;
#pragma unroll 4
    for (int unit = 0; unit < kUnits; ++unit) {
      const int at = (unit ^ j) * 16;  // the same for key j + 8
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 k =
            *reinterpret_cast<const float4*>(keys + (j + i / 2 * 8) * kUnits * 16 + at);
        const float4 x = *reinterpret_cast<const float4*>(rows + i % 2 * kStride + unit * 4);
        c[0][i] = fmaf(k.w, x.w, fmaf(k.z, x.z, fmaf(k.y, x.y, fmaf(k.x, x.x, c[0][i]))));
      }
    }
  }

  __device__ __forceinline__ void add_values(float (&out)[kSteps][1][4], const float (&p)[1][4],
                                             const char* values, int lane) const {
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = __shfl_sync(0xffffffffu, p[0][2 * half], j * 4 + lane % 4);
        const float y = __shfl_sync(0xffffffffu, p[0][2 * half + 1], j * 4 + lane % 4);
        const char* row = values + (j + half * 8) * kUnits * 16;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          const int d = i * 8 + lane / 4;
          const float v = *reinterpret_cast<const float*>(row + ((d / 4) ^ j) * 16 + d % 4 * 4);
          float (&to)[4] = out[i / 2][0];
          to[i % 2 * 2] = fmaf(x, v, to[i % 2 * 2]);
          to[i % 2 * 2 + 1] = fmaf(y, v, to[i % 2 * 2 + 1]);
        }
      }
    }
  }
};

}  // namespace kvc
