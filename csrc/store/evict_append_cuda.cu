// evict_append_ on CUDA: one launch, a block a unit.
//
// The block reads its counters, finds the victim with one pass over positions and scores (8 bytes
// an entry and head of the unit), and writes two rows a head: latency, not bytes, is the cost. Only
// the block of a unit reads or writes what belongs to it, so no block waits for another. From sm_90
// on the launch overlaps the end of the kernel before it (programmatic dependent launch).
#include <algorithm>

#include "device/check.cuh"
#include "device/copy_rows.cuh"
#include "device/limits.cuh"
#include "device/reduce.cuh"
#include "store/evict_append.h"

namespace kvc {
namespace {

constexpr int kUnroll = 4;         // entries a thread has under way
constexpr int kFewEntries = 2048;  // up to here a small block
constexpr int kSmallBlock = 256, kLargeBlock = 1024;

__device__ __forceinline__ EvictKey shuffle_xor(const EvictKey& key, int offset) {
  return {__shfl_xor_sync(0xffffffffu, key.first, offset),
          __shfl_xor_sync(0xffffffffu, key.second, offset)};
}

// All threads get the smallest key.
template <int kThreads>
__device__ __forceinline__ EvictKey block_min(EvictKey key) {
  __shared__ EvictKey of_warp[kThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const EvictKey other = shuffle_xor(key, offset);
    if (other < key) key = other;
  }
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = key;
  __syncthreads();
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (of_warp[w] < key) key = of_warp[w];
  }
  __syncthreads();
  return key;
}

struct Unit {
  int64_t b, u;
  const int32_t* positions;

  // The first and one past the last of the unit's heads among `heads`.
  __device__ __forceinline__ int64_t first(const EvictAppendParams& p, int64_t heads) const {
    return u * (heads / p.units);
  }
};

template <int kThreads>
__device__ __forceinline__ int32_t pick_victim(const EvictAppendParams& p, const Unit& unit,
                                               int64_t length, int64_t seen, const int32_t* taken,
                                               int num_taken) {
  const int64_t heads = p.scores.heads / p.units;
  const float* scores =
      p.scores.data ? p.scores.at(unit.b, unit.first(p, p.scores.heads), 0) : nullptr;
  EvictKey best = evict_none();
  for (int64_t first = threadIdx.x; first < length; first += kUnroll * kThreads) {
    int32_t position[kUnroll];
    float score[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t slot = first + i * kThreads;
      position[i] = slot < length ? unit.positions[slot] : 0;
      score[i] = scores != nullptr && slot < length ? scores[slot] : 0.0f;
    }
    for (int64_t h = 1; h < heads; ++h) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t slot = first + i * kThreads;
        if (slot < length) score[i] += scores[h * p.scores.head_stride + slot];
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t slot = first + i * kThreads;
      bool is_out = slot >= length;
      for (int t = 0; t < num_taken; ++t) is_out |= taken[t] == slot;
      const uint32_t order =
          scores != nullptr ? topk_key(__float_as_uint(score[i])) : evict_ordered(position[i]);
      const EvictKey key = evict_key(evict_protected(p, position[i], seen), order, position[i],
                                     static_cast<uint32_t>(slot));
      if (!is_out && key < best) best = key;
    }
  }
  best = block_min<kThreads>(best);
  return best < evict_none() ? static_cast<int32_t>(best.second & 0xffffffffu) : -1;
}

// The rows of every tensor, head and token, a warp each.
template <int kThreads>
__device__ __forceinline__ void write_rows(const EvictAppendParams& p, const Unit& unit,
                                           const int32_t* slots) {
  const int lane = threadIdx.x % kWarp, n = static_cast<int>(p.n);
  int turn = threadIdx.x / kWarp;  // rows until this warp's next one
  for (int i = 0; i < p.num_tensors; ++i) {
    const Rows &from = p.rows[i], &to = p.buffers[i];
    const int rows = static_cast<int>(from.heads / p.units) * n;
    const int width = p.word_bytes[i];
    for (; turn < rows; turn += kThreads / kWarp) {
      const int t = turn % n;
      if (slots[t] < 0) continue;
      const int64_t h = unit.first(p, from.heads) + turn / n;
      const char* source = row_address(from, unit.b, h, t);
      char* target = row_address(to, unit.b, h, slots[t]);
      visit_word(width, [&](auto word) {
        using Word = decltype(word);
        const int words = static_cast<int>(from.bytes / sizeof(Word));
        for (int w = lane; w < words; w += kWarp) {
          reinterpret_cast<Word*>(target)[w] = reinterpret_cast<const Word*>(source)[w];
        }
      });
    }
    turn -= rows;
  }
}

// What lies beside the rows: positions, scores, history.
template <int kThreads>
__device__ __forceinline__ void write_beside(const EvictAppendParams& p, const Unit& unit,
                                             const int32_t* slots, int64_t seen) {
  const int n = static_cast<int>(p.n);
  if (threadIdx.x < n && slots[threadIdx.x] >= 0) {
    const_cast<int32_t*>(unit.positions)[slots[threadIdx.x]] =
        static_cast<int32_t>(seen + threadIdx.x);
  }
  const int scores = static_cast<int>(p.scores.heads / p.units) * n;
  for (int i = threadIdx.x; i < scores; i += kThreads) {
    if (slots[i % n] < 0) continue;
    *p.scores.at(unit.b, unit.first(p, p.scores.heads) + i / n, slots[i % n]) = p.fresh;
  }
  const int64_t history = p.history.heads / p.units * n * p.history.width;
  for (int64_t i = threadIdx.x; i < history; i += kThreads) {
    const int64_t row = i / p.history.width;
    const int32_t slot = slots[row % n];
    if (slot < 0) continue;
    p.history.at(unit.b, unit.first(p, p.history.heads) + row / n, slot)[i % p.history.width] =
        -INFINITY;
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    evict_append_kernel(const __grid_constant__ EvictAppendParams p) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  __shared__ int32_t slots[kEvictMaxNew];
  Unit unit{blockIdx.x / p.units, blockIdx.x % p.units, nullptr};
  unit.positions =
      p.positions + unit.b * p.positions_batch_stride + unit.u * p.positions_unit_stride;
  const int64_t held = *p.lengths.at(unit.b, unit.u);
  const int64_t before = max(int64_t{0}, min(held, p.capacity));
  const int64_t limit = p.limits.data
                            ? min(static_cast<int64_t>(*p.limits.at(unit.b, unit.u)), p.capacity)
                            : p.capacity;
  const int64_t seen = *p.seen.at(unit.b, unit.u);
  int64_t length = before;
  for (int t = 0; t < p.n; ++t) {
    int32_t slot;
    if (length < limit) {
      slot = static_cast<int32_t>(length++);
    } else {
      slot = pick_victim<kThreads>(p, unit, before, seen + t, slots, t);
    }
    if (threadIdx.x == 0) slots[t] = slot;
    __syncthreads();
  }
  write_rows<kThreads>(p, unit, slots);
  write_beside<kThreads>(p, unit, slots, seen);
  if (threadIdx.x < p.n) p.slots[blockIdx.x * p.n + threadIdx.x] = slots[threadIdx.x];
  if (threadIdx.x == 0) {  // all threads have read them: a barrier lies between
    *p.lengths.at(unit.b, unit.u) = static_cast<int32_t>(length);
    *p.seen.at(unit.b, unit.u) = static_cast<int32_t>(seen + p.n);
  }
}

template <int kThreads>
void launch(const EvictAppendParams& p, cudaStream_t stream) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.batch * p.units));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = device_limits().major >= 9 ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, evict_append_kernel<kThreads>, p), "evict_append_");
}

}  // namespace

void evict_append_cuda(const EvictAppendParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (params.capacity <= kFewEntries) return launch<kSmallBlock>(params, on);
  launch<kLargeBlock>(params, on);
}

}  // namespace kvc
