// Scores as keys, a slice of a row a block: how the selection ops read.
#pragma once

#include <type_traits>

#include "device/radix.cuh"
#include "select/topk.h"

namespace kvc {

constexpr int kChunk = 4 * kWarp;  // entries that a warp reads in one step
constexpr int kUnroll = 4;         // steps in flight

// topk_key in five instructions: adding 0 turns -0 into +0.
__device__ __forceinline__ uint32_t key_of(float score) {
  const float x = score + 0.f;
  const auto bits = static_cast<int32_t>(__float_as_uint(x));
  const uint32_t key = static_cast<uint32_t>(bits ^ ((bits >> 31) | INT32_MIN));
  return x != x ? kTopkNan : key;
}

// The competing entries of one block, in chunks of kChunk. Positions count from the last multiple
// of 16 bytes at or before the row, so that four neighbours are one load; they fit 32 bits.
struct Slice {
  const float4* scores;
  uint32_t begin, end;              // of the row's competing entries
  uint32_t first_chunk, chunks;     // of this block
  uint32_t inner_begin, inner_end;  // those that lie inside [begin, end) whole, from its first

  // Of the entries [begin, end) of a row, the part of one of `blocks` blocks.
  __device__ __forceinline__ static Slice make(const float* row, uint32_t begin, uint32_t end,
                                               uint32_t block, uint32_t blocks) {
    const uint32_t offset = offset_of(row);
    begin += offset, end += offset;
    const uint32_t first_chunk = begin / kChunk, all = (end + kChunk - 1) / kChunk - first_chunk;
    const uint32_t most = (all + blocks - 1) / blocks;
    const uint32_t skipped = min(block * most, all), chunks = min(most, all - skipped);
    const uint32_t first_inner = begin % kChunk == 0 ? 0 : 1;  // of the row
    const uint32_t last_inner = end % kChunk == 0 ? all : all - 1;
    const uint32_t inner_begin = min(first_inner > skipped ? first_inner - skipped : 0, chunks);
    return {.scores = reinterpret_cast<const float4*>(row - offset),
            .begin = begin,
            .end = end,
            .first_chunk = first_chunk + skipped,
            .chunks = chunks,
            .inner_begin = inner_begin,
            .inner_end =
                max(inner_begin, min(last_inner > skipped ? last_inner - skipped : 0, chunks))};
  }
  // Entries between the multiple of 16 bytes from which positions count, and the row.
  __device__ __forceinline__ static uint32_t offset_of(const float* row) {
    return reinterpret_cast<uintptr_t>(row) % 16 / sizeof(float);
  }

  // The first position of this lane in a chunk of the block.
  __device__ __forceinline__ uint32_t position(uint32_t chunk) const {
    return (first_chunk + chunk) * kChunk + 4 * (threadIdx.x % kWarp);
  }

  // Asks for the start of the slice, so that it is in L2 when it is read.
  template <int kThreads>
  __device__ __forceinline__ void prefetch() const {
    constexpr uint32_t kLine = 128 / sizeof(float), kMost = 32 << 10;  // entries
    const uint32_t start = max(begin, first_chunk * kChunk);
    const uint32_t stop = min(end, start + min(chunks * kChunk, kMost));
#pragma unroll 1
    for (uint32_t i = start + kLine * threadIdx.x; i < stop; i += kLine * kThreads) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const float*>(scores) + i));
    }
  }

  __device__ __forceinline__ void edge_keys(uint32_t i, uint32_t (&keys)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      keys[j] = kTopkPadding;
      if (i + j >= begin && i + j < end)
        keys[j] = key_of(__ldg(reinterpret_cast<const float*>(scores) + i + j));
    }
  }

  // Calls f(chunk, keys of four neighbours, whether none is padding) for every chunk, each by one
  // warp, in ascending or descending order: what was read last is found in L1.
  template <int kWarps, bool kDescending, typename F>
  __device__ __forceinline__ void for_each(F&& f) const {
    const uint32_t warp = threadIdx.x / kWarp;
    const uint32_t inner = inner_end - inner_begin;
    const float4* at = scores + position(inner_begin) / 4;
    for (uint32_t start = warp; start < inner; start += kUnroll * kWarps) {
      float4 x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t step = min(start + u * kWarps, inner - 1);
        x[u] = __ldg(at + (kDescending ? inner - 1 - step : step) * (kChunk / 4));
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t step = start + u * kWarps;
        const uint32_t keys[4] = {key_of(x[u].x), key_of(x[u].y), key_of(x[u].z), key_of(x[u].w)};
        if (step < inner)
          f(inner_begin + (kDescending ? inner - 1 - step : step), keys, std::true_type{});
      }
    }
    const uint32_t edges = chunks - inner;
    for (uint32_t edge = warp; edge < edges; edge += kWarps) {
      const uint32_t chunk = edge < inner_begin ? edge : inner + edge;
      uint32_t keys[4];
      edge_keys(position(chunk), keys);
      f(chunk, keys, std::false_type{});
    }
  }
};

// The bins of a slice, by a Counter or a RangeCounter.
template <typename T, typename C>
__device__ __forceinline__ void count_slice(RadixBins<T>& shared, const Slice& slice, C counter) {
  slice.for_each<T::kThreads / kWarp, false>(
      [&](uint32_t, const uint32_t (&keys)[4], auto is_inner) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (decltype(is_inner)::value || keys[j] != kTopkPadding)
            counter.count(shared.bins, keys[j]);
        }
      });
  counter.finish(shared.range);
}

// The `wanted` lowest set bits of a word.
__device__ __forceinline__ uint32_t lowest_bits(uint32_t word, uint32_t wanted) {
  if (wanted == 0) return 0;
#pragma unroll 1
  for (int extra = __popc(word) - static_cast<int>(wanted); extra > 0; --extra) {
    word &= ~(0x80000000u >> __clz(word));
  }
  return word;
}

}  // namespace kvc
