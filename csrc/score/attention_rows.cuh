// Tiles of an attention map on CUDA, sm_80 and later: which rows there are, what they see, and
// their way to shared memory.
//
// The query rows of a kv head are packed: r = head in group * padded window + i, the window padded
// to whole groups of 8 rows, so that the 8 right rows of one tensor-core product belong to one
// query head. A kernel multiplies rows that a warp keeps (left, in registers) with tiles of rows
// that stream through two shared-memory buffers (right). NaN goes through maxima by max.NaN.
#pragma once

#include <algorithm>

#include "device/check.cuh"
#include "device/dispatch.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "score/attention_rows.h"

namespace kvc {

constexpr float kInf = __builtin_huge_valf();

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// kProducts: how many pairs of left and right rows there are: queries with keys, and outputs with
// values.
template <typename T_, int kDim_, int kProducts_ = 1>
struct Tile {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim, filled up with zeros in shared memory
  static constexpr int kProducts = kProducts_;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr bool kSmall = kDim <= (kTensorCores ? 128 : 64);
  // Of 16 rows a warp keeps: 64 registers a product at most. For float32 as many warps and rows as
  // 99 KB of shared memory hold.
  static constexpr int kBlocks = kSmall && kProducts == 1 ? 2 : 1;
  static constexpr int kWarps = kTensorCores ? 8 : kDim <= 128 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kMinBlocks = kTensorCores && (kSmall || kProducts == 1) ? 2 : 1;  // an SM
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kLeft = kWarps * kWarpRows;  // rows a block keeps
  // Rows of a streamed tile, and how many tiles are under way or in use.
  static constexpr int kRight =
      (kTensorCores ? kLeft / 2 : 32) / (kProducts == 2 && !(kTensorCores && kSmall) ? 2 : 1);
  static constexpr int kBuffers = kProducts == 2 && !kTensorCores ? 1 : 2;
  using Rows = ResidentRows<T, kDim, kBlocks>;
  static constexpr int kStride = Rows::kStride;
  static constexpr int kLeftBytes = kLeft * kStride * sizeof(T);
  static constexpr int kRightBytes = kRight * kStride * sizeof(T);
  // Left rows on their way to registers share the room with the streamed tiles.
  static constexpr int kStreamOffset = kTensorCores ? 0 : kProducts * kLeftBytes;
  static constexpr int kTileBytes = kStreamOffset + kBuffers * kProducts * kRightBytes;
  static_assert(kTileBytes >= kLeftBytes && kLeftBytes % 16 == 0 && kRightBytes % 16 == 0);
  static_assert(kRight % 16 == 0 && kRight <= kThreads);
  static_assert(kTensorCores || kTileBytes <= 99 * 1024 - 1088);
};

// How the rows are packed.
struct RowPlan {
  FastDivisor padded_window;
  int padded_rows;  // q_per_kv * padded window
  int num_heads;    // batch * num_kv_heads
  bool aligned;     // 16-byte loads
};

template <typename T>
bool loads_of_16_bytes(const AttentionRows& p) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const int64_t all = p.q_batch_stride | p.q_head_stride | p.q_row_stride | p.k_batch_stride |
                      p.k_head_stride | p.k_row_stride;
  return aligned(p.q) && aligned(p.k) && all % Vec<T>::kSize == 0;
}

template <typename T>
RowPlan make_row_plan(const AttentionRows& p) {
  const int64_t padded_window = ceil_div(p.window, 8) * 8;
  return {
      .padded_window = FastDivisor(static_cast<uint32_t>(padded_window)),
      .padded_rows = static_cast<int>(p.q_per_kv() * padded_window),
      .num_heads = static_cast<int>(p.batch * p.num_kv_heads),
      .aligned = loads_of_16_bytes<T>(p),
  };
}

// One batch row and kv head, and its packed query rows.
template <typename T>
struct Head {
  const AttentionRows& p;
  const RowPlan& plan;
  int b, h, start, seq_len;

  __device__ __forceinline__ Head(const AttentionRows& p, const RowPlan& plan, int head)
      : p(p),
        plan(plan),
        b(head / static_cast<int>(p.num_kv_heads)),
        h(head % static_cast<int>(p.num_kv_heads)),
        start(0),
        seq_len(static_cast<int>(p.seq_len)) {
    if (p.seq_start) start = min(max(p.seq_start[b], 0), seq_len);
  }

  // Last key that query i sees, -1 if it is padding.
  __device__ __forceinline__ int limit_of_query(int64_t i) const {
    if (i >= p.window) return -1;
    const int64_t position =
        p.positions ? p.positions[b * p.positions_stride + i] : p.first_query + i;
    return position < start ? -1 : static_cast<int>(min(position, p.seq_len - 1));
  }
  __device__ __forceinline__ int limit(int r) const {
    if (r >= plan.padded_rows) return -1;
    const int g = plan.padded_window.quotient(r);
    return limit_of_query(r - g * static_cast<int>(plan.padded_window.divisor));
  }
  // The greatest limit of the rows [first, last).
  __device__ __forceinline__ int greatest_limit(int first, int last) const {
    last = min(last, plan.padded_rows) - 1;
    if (first > last) return -1;
    const int padded = static_cast<int>(plan.padded_window.divisor);
    const int g = plan.padded_window.quotient(last), i = last - g * padded;
    const bool has_end = plan.padded_window.quotient(first) != g || i >= p.window;
    return limit_of_query(has_end ? p.window - 1 : i);
  }
  // Index of a real row among all rows [batch, num_q_heads, window].
  __device__ __forceinline__ int64_t row_index(int g, int i) const {
    return ((b * p.num_kv_heads + h) * p.q_per_kv() + g) * p.window + i;
  }

  // Null for padding, which then counts as zeros.
  __device__ __forceinline__ const T* query(int r) const {
    if (r >= plan.padded_rows) return nullptr;
    const int g = plan.padded_window.quotient(r);
    const int i = r - g * static_cast<int>(plan.padded_window.divisor);
    if (limit_of_query(i) < 0) return nullptr;
    return static_cast<const T*>(p.q) + b * p.q_batch_stride +
           (h * p.q_per_kv() + g) * p.q_head_stride + i * p.q_row_stride;
  }
  __device__ __forceinline__ const T* key(int j) const {
    if (j >= seq_len) return nullptr;
    return static_cast<const T*>(p.k) + b * p.k_batch_stride + h * p.k_head_stride +
           j * p.k_row_stride;
  }
};

// `rows` rows to shared memory, row_at(r) each, zeros where it is null and beyond head_dim.
template <typename Tile, typename RowAt>
__device__ __forceinline__ void load_rows(typename Tile::T* to, int rows, int head_dim,
                                          bool aligned, const void* somewhere, RowAt&& row_at) {
  using T = typename Tile::T;
  constexpr int kVec = Vec<T>::kSize, kVecs = Tile::kDim / kVec;
  for (int item = threadIdx.x; item < rows * kVecs; item += Tile::kThreads) {
    const int r = item / kVecs, d = item % kVecs * kVec;
    const T* from = row_at(r);
    T* at = to + r * Tile::kStride + d;
    const bool inside = from != nullptr && d < head_dim;
    if (aligned) {
      copy_async_16(at, inside ? static_cast<const void*>(from + d) : somewhere, inside);
    } else {
      Vec<T> vec;
#pragma unroll
      for (int i = 0; i < kVec; ++i) vec.data[i] = inside ? from[d + i] : from_float<T>(0.0f);
      *reinterpret_cast<Vec<T>*>(at) = vec;
    }
  }
}

// The head_dims with a kernel of their own; the others take the next larger. Calls f(Tile).
template <typename T, typename F>
void visit_head_dim(int64_t head_dim, F&& f) {
  constexpr bool kAll = sizeof(T) == 2;
  if (head_dim <= 64) {
    f(Tile<T, 64>{});
  } else if (kAll && head_dim <= 96) {
    f(Tile<T, kAll ? 96 : 128>{});
  } else if (head_dim <= 128) {
    f(Tile<T, 128>{});
  } else if (kAll && head_dim <= 192) {
    f(Tile<T, kAll ? 192 : 256>{});
  } else {
    f(Tile<T, 256>{});
  }
}

// `shared_bytes` of dynamic shared memory a block.
template <typename Kernel, typename... Params>
void launch_tiles(Kernel* kernel, int64_t blocks, int threads, int shared_bytes, const char* op,
                  cudaStream_t stream, const Params&... params) {
  cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), op);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params...);
  launch_check(op);
}

}  // namespace kvc
