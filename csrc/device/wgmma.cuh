// wgmma: products of a warpgroup, 64 x n x 16, operands of 16 bits, sums in float32 (sm_90a alone).
//
// D[64 x n] (+)= A[64 x 16] B[n x 16]^T, rows of A and B contiguous along the 16 ("K-major"), or B
// along the n (kBIsTransposed). B lies in shared memory, A too (ss) or in registers (rs), as
// 128-byte swizzled slabs (tma.cuh).
// Layout of D: thread t of the warpgroup, lane l = t % 32, holds
//   d[4 block + 2 half + j] = D[16 (t / 32) + 8 half + l / 4][8 block + 2 (l % 4) + j]
// and A in registers is that of mma.sync m16n8k16, 16 rows a warp (mma.cuh, load_matrices).
//
// A sequence: wgmma_fence, products, wgmma_commit; registers of D are read only after
// wgmma_wait<newer groups> and hold() on both sides, which pins them against the compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/tma.cuh"

namespace kvc {

constexpr int kWarpgroup = 128;  // threads

// Slabs from a 1024-byte boundary on. `leading` counts only where B is transposed.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared, uint32_t leading) {
  constexpr uint64_t kEightRows = 8 * kSlabRowBytes >> 4, kSwizzle128 = uint64_t{1} << 62;
  return ((shared & 0x3ffff) >> 4) | uint64_t{leading >> 4} << 16 | kEightRows << 32 | kSwizzle128;
}
// Descriptor of a slab; add kWgmmaStep per 16 elements within a slab.
__device__ __forceinline__ uint64_t wgmma_slab_at(uint32_t shared) {
  return wgmma_descriptor(shared, 16);
}
constexpr uint64_t kWgmmaStep = 16 * 2 >> 4;
// Of a transposed B, 64 columns a slab, slabs `slab_bytes` apart; add kWgmmaTransposedStep per 16
// rows of the slab.
__device__ __forceinline__ uint64_t wgmma_transposed_at(uint32_t shared, uint32_t slab_bytes) {
  return wgmma_descriptor(shared, slab_bytes);
}
constexpr uint64_t kWgmmaTransposedStep = 16 * kSlabRowBytes >> 4;

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Registers a thread from here on, for the four warps of a warpgroup together; raising waits until
// others have given up as many.
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
// Until all but the newest kPending groups are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The instruction, for each element type and n. `accumulate` false starts from zero.
template <typename T, int kN>
struct Wgmma;

#define KVC_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define KVC_D32(i) KVC_D8(i), KVC_D8(i + 8), KVC_D8(i + 16), KVC_D8(i + 24)

#define KVC_REGISTERS_0_31                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KVC_REGISTERS_32_63                                                          \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define KVC_WGMMA_32(Type, text)                                                      \
  template <>                                                                         \
  struct Wgmma<Type, 32> {                                                            \
    static __device__ __forceinline__ void ss(float (&d)[16], uint64_t a, uint64_t b, \
                                              bool accumulate) {                      \
      asm volatile(                                                                   \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                \
          "wgmma.mma_async.sync.aligned.m64n32k16.f32." text "." text                 \
          " {"                                                                        \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"      \
          "}, %16, %17, p, 1, 1, 0, 0;\n}\n"                                          \
          : KVC_D8(0), KVC_D8(8)                                                      \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                       \
    }                                                                                 \
  };

#define KVC_WGMMA_64(Type, text)                                                                   \
  template <>                                                                                      \
  struct Wgmma<Type, 64> {                                                                         \
    static __device__ __forceinline__ void ss(float (&d)[32], uint64_t a, uint64_t b,              \
                                              bool accumulate) {                                   \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." text "." text " {" KVC_REGISTERS_0_31      \
          "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                       \
          : KVC_D32(0)                                                                             \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                    \
    }                                                                                              \
    template <bool kBIsTransposed = false>                                                         \
    static __device__ __forceinline__ void rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b,  \
                                              bool accumulate) {                                   \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." text "." text " {" KVC_REGISTERS_0_31      \
          "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"                                       \
          : KVC_D32(0)                                                                             \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
            "n"(static_cast<int>(kBIsTransposed)));                                                \
    }                                                                                              \
  };

#define KVC_WGMMA_128(Type, text)                                                                  \
  template <>                                                                                      \
  struct Wgmma<Type, 128> {                                                                        \
    static __device__ __forceinline__ void ss(float (&d)[64], uint64_t a, uint64_t b,              \
                                              bool accumulate) {                                   \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." text "." text " {" KVC_REGISTERS_0_31     \
          ", " KVC_REGISTERS_32_63 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                              \
          : KVC_D32(0), KVC_D32(32)                                                                \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                    \
    }                                                                                              \
    template <bool kBIsTransposed = false>                                                         \
    static __device__ __forceinline__ void rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b,  \
                                              bool accumulate) {                                   \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." text "." text " {" KVC_REGISTERS_0_31     \
          ", " KVC_REGISTERS_32_63 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"              \
          : KVC_D32(0), KVC_D32(32)                                                                \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
            "n"(static_cast<int>(kBIsTransposed)));                                                \
    }                                                                                              \
  };

KVC_WGMMA_32(__nv_bfloat16, "bf16")
KVC_WGMMA_32(__half, "f16")
KVC_WGMMA_64(__nv_bfloat16, "bf16")
KVC_WGMMA_64(__half, "f16")
KVC_WGMMA_128(__nv_bfloat16, "bf16")
KVC_WGMMA_128(__half, "f16")

#undef KVC_WGMMA_128
#undef KVC_WGMMA_64
#undef KVC_WGMMA_32
#undef KVC_REGISTERS_32_63
#undef KVC_REGISTERS_0_31
#undef KVC_D32
#undef KVC_D8

}  // namespace kvc
