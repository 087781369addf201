// Tensor memory accelerator (sm_90 and later): one thread moves whole boxes of a strided tensor to
// shared memory; what lies outside the tensor arrives as zeros.
//
// Boxes of rows are 64 elements of 16 bits wide, swizzled in 128 bytes: 16-byte unit u of row r
// lies at unit u ^ (r % 8) of its 128 bytes, the layout that wgmma reads without bank conflicts.
// Longer rows take several boxes ("slabs"), each from a 1024-byte boundary.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device/check.cuh"
#include "device/mbarrier.cuh"
#include "host/dtype.h"

namespace kvc {

constexpr int kSlabElements = 64;
constexpr int kSlabRowBytes = 128;

// Byte offset of 16-byte unit `unit` of row `row` in a slab.
__host__ __device__ constexpr int swizzled(int row, int unit) {
  return row * kSlabRowBytes + ((unit ^ (row % 8)) << 4);
}

// --- host

// Whether rows of 16-bit elements with these outer dimensions can be described: 16-byte steps
// everywhere. A dimension of size 1 is never stepped over.
template <int kOuter>
inline bool tma_takes(const void* data, const int64_t (&sizes)[kOuter],
                      const int64_t (&strides)[kOuter]) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  for (int i = 0; i < kOuter; ++i) {
    const bool stepped = sizes[i] > 1;
    if (stepped && (strides[i] <= 0 || strides[i] % 8 != 0 || strides[i] >= int64_t{1} << 39)) {
      return false;
    }
    if (sizes[i] < 1 || sizes[i] > int64_t{1} << 31) return false;
  }
  return true;
}

// The map of a tensor of 16-bit elements in swizzled boxes, dimensions from the innermost on:
// sizes[rank], strides[rank - 1] in elements (of dimensions 1 and up), box[rank]. The encoder comes
// from the driver through the runtime: nothing links libcuda.
template <int kRank>
inline CUtensorMap tensor_map(const char* op, DType dtype, const void* data,
                              const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                              const int (&box)[kRank]) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [op] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                cudaEnableDefault, &found),
               op);
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string(op) + ": this driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(entry);
  }();

  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = sizes[i] > 1 ? static_cast<cuuint64_t>(strides[i - 1]) * 2 : 16;
  }
  CUtensorMap map;
  const CUresult result = encode(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kRank, const_cast<void*>(data), dims, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled returned " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

// The map of rows [sizes[2], sizes[1], sizes[0], width], sizes[0] the rows of one head, in boxes of
// box_rows x 64.
inline CUtensorMap row_map(const char* op, DType dtype, const void* data, int64_t width,
                           const int64_t (&sizes)[3], const int64_t (&strides)[3], int box_rows) {
  return tensor_map<4>(op, dtype, data, {width, sizes[0], sizes[1], sizes[2]}, strides,
                       {kSlabElements, box_rows, 1, 1});
}

// --- device; the map is a __grid_constant__ kernel parameter

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What L2 does with the lines of a load; the values are those that createpolicy makes of a whole
// range.
enum class CacheHint : uint64_t {
  kNormal = 0x1000000000000000,
  kOnce = 0x12f0000000000000,  // evict first
};

// One box from element `column` of row `row` of head (h, b); its bytes arrive at the barrier.
__device__ __forceinline__ void tma_load_rows(void* shared, const CUtensorMap* map,
                                              Mbarrier* barrier, int column, int row, int h, int b,
                                              CacheHint hint) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(mbarrier_address(barrier)), "r"(column), "r"(row), "r"(h), "r"(b),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// One box of a map of five dimensions.
__device__ __forceinline__ void tma_load_5d(void* shared, const CUtensorMap* map, Mbarrier* barrier,
                                            int x0, int x1, int x2, int x3, int x4) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(map), "r"(mbarrier_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}

// Ordinary writes of this thread to shared memory become visible to wgmma and TMA; a barrier of the
// readers follows.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace kvc
