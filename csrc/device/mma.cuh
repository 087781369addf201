// Tensor-core products of rows in shared memory, sm_80 and later: ldmatrix, mma.sync m16n8k16,
// cp.async.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/async.cuh"

namespace kvc {

__device__ __forceinline__ uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

// --- asynchronous copies from global to shared memory; `inside` false writes zeros and reads
// nothing

__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_8(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(inside ? 8 : 0)
               : "memory");
}

// --- fragments

// Four 8 x 8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same four, transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// An 8 x 8 matrix that the warp holds, transposed: turns the layout of c below into that of b.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// c[16 x 8] += a[16 x 16] b[8 x 16]^T. c: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4)
// and the next.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 * kBlocks left rows that a warp keeps, to be multiplied with any number of right rows. Rows
// lie in shared memory, kStride elements apart: 16 bytes more than kDim, an odd number of 16-byte
// units, so that no bank is met twice. 16-bit elements stay in registers; float32 (FMA, no tf32) is
// read where it lies, so that memory must stay as it is.
template <typename T, int kDim, int kBlocks>
struct ResidentRows {
  static constexpr int kStride = kDim + 8;
  static constexpr int kSteps = kDim / 16;
  static_assert(kDim % 16 == 0);
  uint32_t a[kBlocks][kSteps][4];

  __device__ __forceinline__ void load(const T* rows, int lane) {
    const T* at = rows + (lane % 16) * kStride + lane / 16 * 8;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_matrices(a[block][step], at + block * 16 * kStride + step * 16);
      }
    }
  }

  // c[block][n] = the 16 x 8 products of a block with right rows 8 n .. 8 n + 7, in the layout of
  // multiply_add.
  __device__ __forceinline__ void product(float (&c)[kBlocks][2][4], const T* right,
                                          int lane) const {
    const T* at = right + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 8; ++i) c[block][i / 4][i % 4] = 0;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      load_matrices(b, at + step * 16);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply_add<T>(c[block][0], a[block][step], b[0], b[1]);
        multiply_add<T>(c[block][1], a[block][step], b[2], b[3]);
      }
    }
  }
};

template <int kDim, int kBlocks>
struct ResidentRows<float, kDim, kBlocks> {
  static constexpr int kStride = kDim + 4;
  static_assert(kDim % 8 == 0);
  const float* rows;

  __device__ __forceinline__ void load(const float* first, int lane) {
    rows = first + lane / 4 * kStride;
  }

  __device__ __forceinline__ void product(float (&c)[kBlocks][2][4], const float* right,
                                          int lane) const {
    const float* at = right + 2 * (lane % 4) * kStride;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 8; ++i) c[block][i / 4][i % 4] = 0;
    }
#pragma unroll 2
    for (int d = 0; d < kDim; d += 4) {
      float4 y[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i / 2][i % 2] =
            *reinterpret_cast<const float4*>(at + (8 * (i / 2) + i % 2) * kStride + d);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 x =
              *reinterpret_cast<const float4*>(rows + (16 * block + 8 * half) * kStride + d);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = c[block][i / 2][2 * half + i % 2];
            const float4 z = y[i / 2][i % 2];
            sum = fmaf(x.w, z.w, fmaf(x.z, z.z, fmaf(x.y, z.y, fmaf(x.x, z.x, sum))));
          }
        }
      }
    }
  }
};

}  // namespace kvc
