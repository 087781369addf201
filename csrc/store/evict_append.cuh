// What the kernels of evict_append_ share: a unit's counters, the smallest key of a block, and all
// that is written of a new entry.
#pragma once

#include <type_traits>

#include "device/copy_rows.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "store/evict_append.h"

namespace kvc::evict {

__device__ __forceinline__ EvictKey shuffle_xor(const EvictKey& key, int offset) {
  return {__shfl_xor_sync(0xffffffffu, key.first, offset),
          __shfl_xor_sync(0xffffffffu, key.second, offset)};
}

// The smallest key of kLanes neighbouring lanes, in all of them.
template <int kLanes>
__device__ __forceinline__ EvictKey warp_min(EvictKey key) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const EvictKey other = shuffle_xor(key, offset);
    if (other < key) key = other;
  }
  return key;
}

// All threads get the smallest key.
template <int kThreads>
__device__ __forceinline__ EvictKey block_min(EvictKey key) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0);
  __shared__ EvictKey of_warp[kWarps];
  key = warp_min<kWarp>(key);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = key;
  __syncthreads();
  key = warp_min<kWarps>(of_warp[threadIdx.x % kWarps]);
  __syncthreads();
  return key;
}

__device__ __forceinline__ int32_t slot_of(const EvictKey& key) {
  return key < evict_none() ? static_cast<int32_t>(key.second & 0xffffffffu) : -1;
}

// Bytes that will be read soon start their way to L2.
template <int kThreads>
__device__ __forceinline__ void fetch_ahead(const void* from, int64_t bytes) {
  constexpr int kLine = 128;
  for (int64_t at = threadIdx.x * kLine; at < bytes; at += kThreads * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
  }
}

// A unit before the call. Slots and counts are 32-bit: 64-bit divisions and products are what such
// a small kernel would otherwise spend its time on.
struct Unit {
  int64_t b, u;
  int64_t base;  // of its slots
  int32_t* positions;
  int held, limit, seen;

  __device__ __forceinline__ Unit(const EvictAppendParams& p, int64_t batch, int64_t unit)
      : b(batch), u(unit), base(p.base(batch, unit)) {
    positions = p.positions + b * p.positions_batch_stride + u * p.positions_unit_stride + base;
    const auto capacity = static_cast<int>(p.capacity);
    const int length = *p.lengths.at(b, u);
    limit = p.limits.data ? min(*p.limits.at(b, u), capacity) : capacity;
    seen = *p.seen.at(b, u);
    held = max(0, min(length, capacity));
  }
};

// The rows of every tensor, head and token, a warp each.
template <int kThreads>
__device__ __forceinline__ void write_rows(const EvictAppendParams& p, const Unit& unit,
                                           const int32_t* slots) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, n = static_cast<int>(p.n);
  int turn = 0;
  for (int i = 0; i < p.num_tensors; ++i) {
    const Rows &from = p.rows[i], &to = p.buffers[i];
    const int heads = p.heads_a_unit[i];
    for (int head = 0; head < heads; ++head) {
      for (int t = 0; t < n; ++t) {
        if (turn++ % kWarps != warp || slots[t] < 0) continue;
        const int64_t h = unit.u * heads + head;
        const char* source = row_address(from, unit.b, h, t);
        char* target = row_address(to, unit.b, h, unit.base + slots[t]);
        visit_word(p.word_bytes[i], [&](auto word) {
          using Word = decltype(word);
          const auto words = static_cast<int>(from.bytes / sizeof(Word));
          for (int w = lane; w < words; w += kWarp) {
            reinterpret_cast<Word*>(target)[w] = reinterpret_cast<const Word*>(source)[w];
          }
        });
      }
    }
  }
}

// What lies beside the rows: positions, scores, history.
template <int kThreads>
__device__ __forceinline__ void write_beside(const EvictAppendParams& p, const Unit& unit,
                                             const int32_t* slots) {
  const int n = static_cast<int>(p.n);
  if (threadIdx.x < n && slots[threadIdx.x] >= 0) {
    unit.positions[slots[threadIdx.x]] = unit.seen + static_cast<int>(threadIdx.x);
  }
  for (int head = 0; head < p.scores.heads_a_unit; ++head) {
    if (threadIdx.x >= n || slots[threadIdx.x] < 0) continue;
    const int64_t h = unit.u * p.scores.heads_a_unit + head;
    *p.scores.at(unit.b, h, unit.base + slots[threadIdx.x]) = p.fresh;
  }
  const auto width = static_cast<int>(p.history.width);
  for (int head = 0; head < p.history.heads_a_unit; ++head) {
    const int64_t h = unit.u * p.history.heads_a_unit + head;
    for (int t = 0; t < n; ++t) {
      if (slots[t] < 0) continue;
      float* row = p.history.at(unit.b, h, unit.base + slots[t]);
      for (int w = threadIdx.x; w < width; w += kThreads) row[w] = -INFINITY;
    }
  }
}

// The sinks, turned on by `shift` positions. A thread owns a pair of dimensions.
template <typename T, int kThreads>
__device__ __forceinline__ void rotate_sinks(const EvictAppendParams& p, const Unit& unit,
                                             int shift) {
  const int half = static_cast<int>(p.half), lanes = min(half, kThreads);
  const int group = threadIdx.x / lanes, groups = kThreads / lanes;
  if (group >= groups) return;
  const int sinks = static_cast<int>(p.num_sinks);
  const int rows = p.sinks_a_unit * sinks;
  for (int i = threadIdx.x % lanes; i < half; i += lanes) {
    double sine, cosine;
    sincos(static_cast<double>(shift) * static_cast<double>(p.inv_freq[i]), &sine, &cosine);
    const float sin = static_cast<float>(sine), cos = static_cast<float>(cosine);
    for (int row = group; row < rows; row += groups) {
      const int64_t h = unit.u * p.sinks_a_unit + row / sinks, slot = row % sinks;
      const T* from = reinterpret_cast<const T*>(row_address(p.sinks, unit.b, h, slot));
      T* to = reinterpret_cast<T*>(row_address(p.buffers[0], unit.b, h, unit.base + slot));
      const float x = to_float(from[i]), y = to_float(from[half + i]);
      to[i] = from_float<T>(__fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin)));
      to[half + i] = from_float<T>(__fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin)));
    }
  }
}

// All that is written of the new entries, by one block; everybody has read the counters.
template <typename Rotated, int kThreads>
__device__ __forceinline__ void write_entries(const EvictAppendParams& p, const Unit& unit,
                                              const int32_t* slots, int length) {
  write_rows<kThreads>(p, unit, slots);
  write_beside<kThreads>(p, unit, slots);
  if (threadIdx.x < p.n) {
    p.slots[(unit.b * p.units + unit.u) * p.n + threadIdx.x] = slots[threadIdx.x];
  }
  if (threadIdx.x == 0) {
    *p.lengths.at(unit.b, unit.u) = length;
    *p.seen.at(unit.b, unit.u) = unit.seen + static_cast<int>(p.n);
  }
  if constexpr (!std::is_void_v<Rotated>) {
    __syncthreads();  // a row that went to the slot of a sink is overwritten, always
    rotate_sinks<Rotated, kThreads>(p, unit, unit.seen + static_cast<int>(p.n) - length);
  }
}

// f(Rotated{}) with the type of the sinks' elements in an empty struct, void where there are none.
template <typename T>
struct Type {
  using type = T;
};
template <typename F>
void visit_sinks(const EvictAppendParams& p, F&& f) {
  if (p.sinks.data == nullptr) return f(Type<void>{});
  visit_float_cuda(p.sink_dtype, "evict_append_", [&](auto tag) { f(Type<decltype(tag)>{}); });
}

}  // namespace kvc::evict
