// What the kernels of decode attention share: how a worker finds its part of the line of tiles, and
// the three launches.
#pragma once

#include <cuda_runtime.h>

#include "attend/decode_attention.h"
#include "device/launch.cuh"
#include "device/reduce.cuh"

namespace kvc {

// 2^(old - now), where both may be -inf.
__device__ __forceinline__ float decay(float old, float now) {
  return old == now ? 1.0f : exp2f(old - now);
}

template <int kTile>
__device__ __forceinline__ uint32_t tiles_of(const DecodeAttentionParams& p, int64_t store) {
  return static_cast<uint32_t>((p.length(store) + kTile - 1) / kTile);
}

// Where the part of a worker begins: tile `at` of the `slices` times over tiles of a store.
struct PartStart {
  int64_t store;
  uint32_t at, count;
};

// The whole block: counts the tiles of all stores, and finds where the part of this worker begins.
// Block 0 leaves tile_start to the merge. False if there is no such worker.
template <int kTile, int kThreads>
__device__ __forceinline__ bool find_part(const DecodeAttentionParams& p, PartStart& start) {
  constexpr int kWarps = kThreads / kWarp;
  const auto slices = static_cast<uint32_t>(p.slices());
  const auto stores = static_cast<uint32_t>(p.num_stores());
  uint32_t row_tiles = 0;
  if (p.lengths.data == nullptr) {  // all alike: no need to count
    row_tiles = tiles_of<kTile>(p, 0);
    if (blockIdx.x == 0) {
      for (uint32_t s = threadIdx.x; s <= stores; s += kThreads) {
        p.tile_start[s] = static_cast<int64_t>(s) * row_tiles;
      }
      if (threadIdx.x == 0) p.tile_start[stores + 1] = row_tiles;
    }
    const AttendParts parts(static_cast<int64_t>(stores) * row_tiles * slices, gridDim.x,
                            row_tiles);
    if (blockIdx.x >= parts.workers) return false;
    const uint32_t begin = parts.begin(blockIdx.x), store = begin / (row_tiles * slices);
    start = {store, begin - store * row_tiles * slices, parts.begin(blockIdx.x + 1) - begin};
    return true;
  }
  __shared__ uint32_t warp_tiles[kWarps];
  __shared__ uint32_t found[2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t each = (stores + kThreads - 1) / kThreads;
  const uint32_t first = min(threadIdx.x * each, stores), last = min(first + each, stores);
  row_tiles = tiles_of<kTile>(p, 0);
  uint32_t mine = 0;
  bool is_alike = true;
  for (uint32_t s = first; s < last; ++s) {
    const uint32_t tiles = tiles_of<kTile>(p, s);
    mine += tiles;
    is_alike &= tiles == row_tiles;
  }
  uint32_t before = mine;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == kWarp - 1) warp_tiles[warp] = before;
  if (!__syncthreads_and(is_alike)) row_tiles = 0;
  before -= mine;
  uint32_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_tiles[w];
    total += warp_tiles[w];
  }
  if (blockIdx.x == 0) {
    uint32_t at = before;
    for (uint32_t s = first; s < last; ++s) {
      p.tile_start[s] = at;
      at += tiles_of<kTile>(p, s);
    }
    if (threadIdx.x == 0) {
      p.tile_start[stores] = total;
      p.tile_start[stores + 1] = row_tiles;
    }
  }
  const AttendParts parts(static_cast<int64_t>(total) * slices, gridDim.x, row_tiles);
  if (blockIdx.x >= parts.workers) return false;
  const uint32_t begin = parts.begin(blockIdx.x);
  if (before * slices <= begin && begin < (before + mine) * slices) {
    uint32_t s = first, tiles = tiles_of<kTile>(p, s);
    while ((before + tiles) * slices <= begin) {
      before += tiles;
      tiles = tiles_of<kTile>(p, ++s);
    }
    found[0] = s;
    found[1] = begin - before * slices;
  }
  __syncthreads();
  start = {found[0], found[1], parts.begin(blockIdx.x + 1) - begin};
  return true;
}

// Each launches once and returns the workers it launched; 0: there is nothing to read.
//
// Few rows, of 16-bit elements in 16-byte units: K and V go from memory to the registers that the
// tensor cores read.
bool decode_few_rows_fits(const DecodeAttentionParams& params);
int64_t decode_few_rows_cuda(const DecodeAttentionParams& params, cudaStream_t stream);
// All else: K and V pass through shared memory, where several warps with other rows read them.
int64_t decode_many_rows_cuda(const DecodeAttentionParams& params, cudaStream_t stream);
// Adds up the partials, fills logits, observes.
void decode_merge_cuda(const DecodeAttentionParams& params, int64_t workers, cudaStream_t stream);

}  // namespace kvc
