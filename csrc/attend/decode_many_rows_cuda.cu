// Decode attention for many query rows on cards other than Hopper, and on all cards for float32,
// for few rows of head_dim above 128 and for rows that are not made of 16-byte units.
//
// Block = one worker: its part of the line of tiles, whichever stores that touches. A tile is cut
// among the key groups of the block, a group being 1, 2 or 4 warps that share keys and divide the
// packed query rows; every group has its own ring of kStages slots in shared memory, filled by
// cp.async across the borders of stores and emptied without waiting for the other groups. At the
// end of a store the groups' sums meet in the slot that has just been read, and one partial result
// leaves for scratch.
//
// Bound: K and V once, 2 * entries * head_dim elements. The grid is what the machine holds at once,
// at most kAttendMaxWorkers; lengths are read on the device only. No atomics: the same bits every
// run.
#include <type_traits>

#include "attend/decode_attention.h"
#include "attend/decode_kernels.cuh"
#include "attend/decode_products.cuh"
#include "device/check.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"

namespace kvc {
namespace {

template <typename T, int kDim_, int kBlocks_, int kQueryWarps_>
struct Traits {
  using Element = T;
  static constexpr int kDim = kDim_;
  static constexpr int kBlocks = kBlocks_;          // of 8 query rows, in a warp
  static constexpr int kQueryWarps = kQueryWarps_;  // warps of a key group
  static constexpr AttendShape kShape = attend_shape(kDim, std::is_same_v<T, float>);
  static constexpr int kWarps = static_cast<int>(kShape.warps);
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTile = static_cast<int>(kShape.tile);
  static constexpr int kGroups = kWarps / kQueryWarps;
  static constexpr int kGroupKeys = kTile / kGroups;
  static constexpr int kGroupThreads = kQueryWarps * kWarp;
  static constexpr int kWarpRows = 8 * kBlocks;
  static constexpr int kRows = kWarpRows * kQueryWarps;
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kUnits = kDim / kVec;
  static constexpr int kHalfBytes = kGroupKeys * kUnits * 16;  // K or V of a slot
  static constexpr int kSlotBytes = 2 * kHalfBytes;
  static constexpr int kStageBytes = kGroups * kSlotBytes;
  // 96 KB in flight or in use: two blocks on a Hopper SM, one on any other. float32 also keeps its
  // query rows in shared memory.
  static constexpr int kStages = (std::is_same_v<T, float> ? 65536 : 98304) / kStageBytes;
  using Products = DecodeProducts<T, kDim, kBlocks>;
  static constexpr int kQueryBytes = Products::kSharedQueryFloats * kWarps * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes + kQueryBytes;
  static_assert(kWarps % kQueryWarps == 0 && kRows <= kShape.max_slice);
  static_assert(kStages >= 2 && kSharedBytes <= 99 * 1024);
  static_assert(kRows * kDim * 4 <= kSlotBytes, "a slot holds the sums of its group");
  static_assert(kUnits % 8 == 0 && kGroupKeys * kUnits % kGroupThreads == 0);
};

// A place on the line: one tile of one slice of query rows of one store.
template <typename X>
struct Place {
  using T = typename X::Element;
  const T *k, *v;
  int64_t store, slice, tile, tiles, length;

  __device__ __forceinline__ void open(const DecodeAttentionParams& p) {
    length = p.length(store);
    tiles = (length + X::kTile - 1) / X::kTile;
    k = static_cast<const T*>(p.k) + p.k_offset(store);
    v = static_cast<const T*>(p.v) + p.v_offset(store);
  }
  // To the next tile; there is one.
  __device__ __forceinline__ void advance(const DecodeAttentionParams& p) {
    if (++tile < tiles) return;
    tile = 0;
    if (++slice < p.slices()) return;
    slice = 0;
    do ++store;
    while (store < p.num_stores() && p.length(store) == 0);
    if (store < p.num_stores()) open(p);
  }
};

template <typename X>
__device__ __forceinline__ void sync_group(int group) {
  if constexpr (X::kQueryWarps == 1) {
    __syncwarp();
  } else if constexpr (X::kGroups == 1) {
    __syncthreads();
  } else {  // barrier 0 is the block's
    asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "n"(X::kGroupThreads) : "memory");
  }
}

// kGroupKeys rows from `first` on, swizzled; zeros behind the entries and behind head_dim.
template <typename X>
__device__ __forceinline__ void load_rows(char* to, const typename X::Element* from, int64_t stride,
                                          int64_t first, int64_t length, int head_dim, bool aligned,
                                          int thread) {
  using T = typename X::Element;
#pragma unroll
  for (int i = 0; i < X::kGroupKeys * X::kUnits / X::kGroupThreads; ++i) {
    const int at = i * X::kGroupThreads + thread;
    const int key = at / X::kUnits, unit = at % X::kUnits;
    const bool inside = first + key < length && unit * X::kVec < head_dim;
    const T* source = from + (inside ? (first + key) * stride + unit * X::kVec : 0);
    char* target = to + (key * X::kUnits + (unit ^ (key % 8))) * 16;
    if (aligned) {
      copy_async_16(target, source, inside);
    } else {
      Vec<T> x;
#pragma unroll
      for (int j = 0; j < X::kVec; ++j) x.data[j] = inside ? source[j] : from_float<T>(0.0f);
      *reinterpret_cast<Vec<T>*>(target) = x;
    }
  }
}

// The running softmax of a warp's query rows over the keys it has met.
template <typename X>
struct Softmax {
  using T = typename X::Element;
  static constexpr int kSteps = X::kDim / 16;
  typename X::Products products;
  float out[kSteps][X::kBlocks][4];
  float most[X::kBlocks][2], sum[X::kBlocks][2];
  int behind[X::kBlocks][2];     // new tokens behind the row's own, which it does not see
  float* logits[X::kBlocks][2];  // the row's, or null

  // Rows [first, first + rows) of a store are this block's, those from `offset` on this warp's.
  __device__ __forceinline__ void start(const DecodeAttentionParams& p, int64_t store,
                                        int64_t first, int rows, int offset, bool aligned, int lane,
                                        float* shared) {
    const T* q = static_cast<const T*>(p.q);
    products.load_queries(
        [&](int r) -> const T* {
          return offset + r < rows ? q + p.q_offset(store, first + offset + r) : nullptr;
        },
        p.head_dim, aligned, lane, shared);
#pragma unroll
    for (int i = 0; i < X::kBlocks * 2; ++i) {
      const int r = offset + i / 2 * 8 + lane % 4 * 2 + i % 2;
      most[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0;
      behind[i / 2][i % 2] = static_cast<int>(p.num_queries - 1 - (first + r) % p.num_queries);
      logits[i / 2][i % 2] = p.logits != nullptr && r < rows
                                 ? p.logits + p.out_row(store, first + r) * p.width
                                 : nullptr;
    }
#pragma unroll
    for (int i = 0; i < kSteps * X::kBlocks * 4; ++i) {
      out[i / (4 * X::kBlocks)][i / 4 % X::kBlocks][i % 4] = 0;
    }
  }

  // kStepKeys keys from number `first` on.
  __device__ __forceinline__ void step(const DecodeAttentionParams& p, const char* keys,
                                       const char* values, int64_t first, int64_t length,
                                       int lane) {
    float x[X::kBlocks][4];
    products.logits(x, keys, lane);
    float now[X::kBlocks][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < X::kBlocks * 2; ++i) {
      const int block = i / 2, column = i % 2;
      float highest = -INFINITY;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t key = first + lane / 4 + half * 8;
        float& value = x[block][2 * half + column];
        const bool seen = key + behind[block][column] < length;
        if (seen && logits[block][column] != nullptr) {
          logits[block][column][key] = value * p.softmax_scale;
        }
        value = seen ? value * p.scale_log2 : -INFINITY;
        highest = fmaxf(highest, value);
      }
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
      }
      now[block][column] = fmaxf(most[block][column], highest);
      grown |= now[block][column] > most[block][column];
    }
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int i = 0; i < X::kBlocks * 2; ++i) {
        const int block = i / 2, column = i % 2;
        const float factor = decay(most[block][column], now[block][column]);
        most[block][column] = now[block][column];
        sum[block][column] *= factor;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          out[step][block][column] *= factor;
          out[step][block][2 + column] *= factor;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < X::kBlocks * 4; ++i) {
      const float highest = most[i / 4][i % 2];
      const float shift = highest == -INFINITY ? 0.0f : highest - X::Products::kHeadroom;
      x[i / 4][i % 4] = exp2f(x[i / 4][i % 4] - shift);
      sum[i / 4][i % 2] += x[i / 4][i % 4];
    }
    products.add_values(out, x, values, lane);
  }
};

// Where d of query row r lies in the sums that a warp leaves in shared memory: the lanes that write
// together write to different banks.
template <typename X>
__device__ __forceinline__ int sum_index(int r, int d) {
  return r * X::kDim + (d ^ (r / 2 % 4 * 8));
}

// The whole block: the sums of all key groups become the partial result in `slot`. `stage` holds
// the slots that the groups have just read.
template <typename X>
__device__ __forceinline__ void flush(const DecodeAttentionParams& p, Softmax<X>& softmax,
                                      char* stage, int64_t slot, int rows, int group, int offset,
                                      int lane) {
  __shared__ float2 stats[X::kGroups][X::kRows];
#pragma unroll
  for (int i = 0; i < X::kBlocks * 2; ++i) {
    float& sum = softmax.sum[i / 2][i % 2];
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    softmax.most[i / 2][i % 2] -= X::Products::kHeadroom;
    if (lane < 4) {
      stats[group][offset + i / 2 * 8 + lane * 2 + i % 2] =
          make_float2(softmax.most[i / 2][i % 2], sum);
    }
  }
  __syncthreads();  // stats are there, and every group has read its slot
  float* sums = reinterpret_cast<float*>(stage + group * X::kSlotBytes);
#pragma unroll
  for (int i = 0; i < X::kBlocks * 2; ++i) {
    const int block = i / 2, column = i % 2;
    const int r = offset + block * 8 + lane % 4 * 2 + column;
    float highest = stats[0][r].x;
#pragma unroll
    for (int g = 1; g < X::kGroups; ++g) highest = fmaxf(highest, stats[g][r].x);
    const float factor = decay(softmax.most[block][column], highest);
#pragma unroll
    for (int step = 0; step < X::kDim / 16; ++step) {
      sums[sum_index<X>(r, step * 16 + lane / 4)] = softmax.out[step][block][column] * factor;
      sums[sum_index<X>(r, step * 16 + 8 + lane / 4)] =
          softmax.out[step][block][2 + column] * factor;
    }
  }
  __syncthreads();
  const int64_t first = slot * p.slice();
  for (int i = threadIdx.x; i < rows * (X::kDim / 4); i += X::kThreads) {
    const int r = i / (X::kDim / 4), d = i % (X::kDim / 4) * 4;
    if (d >= p.head_dim) continue;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int g = 0; g < X::kGroups; ++g) {
      const float* from = reinterpret_cast<const float*>(stage + g * X::kSlotBytes);
      const float4 part = *reinterpret_cast<const float4*>(from + sum_index<X>(r, d));
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
    *reinterpret_cast<float4*>(p.partial_out + (first + r) * p.head_dim + d) = total;
  }
  for (int r = threadIdx.x; r < rows; r += X::kThreads) {
    float highest = stats[0][r].x, sum = 0;
#pragma unroll
    for (int g = 1; g < X::kGroups; ++g) highest = fmaxf(highest, stats[g][r].x);
#pragma unroll
    for (int g = 0; g < X::kGroups; ++g) sum += stats[g][r].y * decay(stats[g][r].x, highest);
    reinterpret_cast<float2*>(p.partial_stats)[first + r] = make_float2(highest, sum);
  }
  __syncthreads();  // the slot may be filled again
}

template <typename X>
__global__ void __launch_bounds__(X::kThreads, 2)
    decode_many_rows_kernel(const __grid_constant__ DecodeAttentionParams p, bool aligned) {
  launch_wait();
  launch_dependents();  // the merge may take its place; it waits for the end
  extern __shared__ __align__(128) char ring[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = warp / X::kQueryWarps, offset = warp % X::kQueryWarps * X::kWarpRows;
  const int thread = threadIdx.x % X::kGroupThreads;
  const int head_dim = static_cast<int>(p.head_dim);
  float* queries = reinterpret_cast<float*>(ring + X::kStages * X::kStageBytes) +
                   warp * X::Products::kSharedQueryFloats;

  PartStart start;
  if (!find_part<X::kTile, 1>(p, start)) return;
  const int64_t count = start.count;
  Place<X> ahead;
  ahead.store = start.store;
  ahead.open(p);
  ahead.slice = start.at / ahead.tiles;
  ahead.tile = start.at % ahead.tiles;
  Place<X> place = ahead;

  const auto fill = [&](int64_t i) {
    char* to = ring + i % X::kStages * X::kStageBytes + group * X::kSlotBytes;
    const int64_t first = ahead.tile * X::kTile + group * X::kGroupKeys;
    load_rows<X>(to, ahead.k, p.k_row_stride, first, ahead.length, head_dim, aligned, thread);
    load_rows<X>(to + X::kHalfBytes, ahead.v, p.v_row_stride, first, ahead.length, head_dim,
                 aligned, thread);
    ahead.advance(p);
  };
#pragma unroll 1
  for (int i = 0; i < X::kStages - 1; ++i) {
    if (i < count) fill(i);
    copy_async_commit();
  }

  Softmax<X> softmax;
  int rows = 0;
  int64_t first_tile = 0;  // of the worker in this row of the line
#pragma unroll 1
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || place.tile == 0) {
      const int64_t first = place.slice * p.slice();
      first_tile = place.tile;
      rows = static_cast<int>(min(p.slice(), p.packed_rows() - first));
      softmax.start(p, place.store, first, rows, offset, aligned, lane, queries);
    }
    copy_async_wait<X::kStages - 2>();
    sync_group<X>(group);  // slot i is full, slot i - 1 read by all warps of the group
    if (i + X::kStages - 1 < count) fill(i + X::kStages - 1);
    copy_async_commit();

    char* stage = ring + i % X::kStages * X::kStageBytes;
    const char* keys = stage + group * X::kSlotBytes;
    const int64_t first = place.tile * X::kTile + group * X::kGroupKeys;
#pragma unroll 1
    for (int j = 0; j < X::kGroupKeys && first + j < place.length; j += kStepKeys) {
      const char* at = keys + j * X::kUnits * 16;
      softmax.step(p, at, at + X::kHalfBytes, first + j, place.length, lane);
    }
    if (place.tile + 1 == place.tiles || i + 1 == count) {
      const int64_t row = place.store * p.slices() + place.slice;
      flush<X>(p, softmax, stage, attend_slot(blockIdx.x, row), rows, group, offset, lane);
      if (threadIdx.x == 0) {
        leave_owner(p, row, first_tile, place.tile + 1, place.tiles, false);
      }
    }
    place.advance(p);
  }
}

// --- policy and launch

// Workers: what the machine holds at once, at most two blocks an SM.
int64_t worker_count(const DecodeAttentionParams& p, int shared_bytes) {
  const DeviceLimits& limits = device_limits();
  const int blocks = std::clamp(limits.shared_bytes_all / (shared_bytes + 2048), 1, 2);
  return std::min<int64_t>(p.max_workers, blocks * limits.multiprocessors);
}

template <typename T>
bool is_aligned(const DecodeAttentionParams& p) {
  const auto address = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const int64_t strides = p.q_batch_stride | p.q_head_stride | p.q_row_stride | p.k_batch_stride |
                          p.k_head_stride | p.k_row_stride | p.v_batch_stride | p.v_head_stride |
                          p.v_row_stride;
  return address(p.q) && address(p.k) && address(p.v) && strides % Vec<T>::kSize == 0;
}

template <typename X>
int64_t launch(DecodeAttentionParams p, cudaStream_t stream) {
  const int64_t workers = worker_count(p, X::kSharedBytes);
  if (workers == 0) return 0;
  p.parts = AttendPlan(p.num_rows(), workers);
  const auto kernel = decode_many_rows_kernel<X>;
  cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, X::kSharedBytes),
      "decode_attention");
  Launch(static_cast<unsigned>(workers), X::kThreads, X::kSharedBytes, stream)
      .early(device_limits().major >= 9)("decode_attention", kernel, p,
                                         is_aligned<typename X::Element>(p));
  return workers;
}

// The fewest blocks and warps that hold the query rows of a slice.
template <typename T, int kDim>
int64_t launch_rows(const DecodeAttentionParams& p, cudaStream_t stream) {
  constexpr int kWarps = static_cast<int>(attend_shape(kDim, std::is_same_v<T, float>).warps);
  constexpr int kBlocks = std::is_same_v<T, float> ? 1 : 2;
  const int64_t rows = p.slice();
  if (rows <= 8) return launch<Traits<T, kDim, 1, 1>>(p, stream);
  if constexpr (kBlocks == 2 && kDim < 256) {
    if (rows <= 16) return launch<Traits<T, kDim, 2, 1>>(p, stream);
  } else if constexpr (kBlocks == 2) {  // two blocks of so long rows spill registers
    if (rows <= 16) return launch<Traits<T, kDim, 1, 2>>(p, stream);
  }
  if constexpr (kWarps > 2) {
    if (rows > 16 * kBlocks) return launch<Traits<T, kDim, kBlocks, 4>>(p, stream);
  }
  if constexpr (kWarps > 1) return launch<Traits<T, kDim, kBlocks, 2>>(p, stream);
  return 0;  // a slice has no more rows
}

}  // namespace

int64_t decode_many_rows_cuda(const DecodeAttentionParams& params, cudaStream_t stream) {
  return visit_float_cuda(params.dtype, "decode_attention", [&](auto tag) {
    using T = decltype(tag);
    switch (params.shape().padded_dim) {
      case 64:
        return launch_rows<T, 64>(params, stream);
      case 128:
        return launch_rows<T, 128>(params, stream);
      default:  // the checks let no head_dim above 256 through
        return launch_rows<T, 256>(params, stream);
    }
  });
}

}  // namespace kvc
