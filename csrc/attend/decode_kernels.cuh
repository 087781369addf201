// What the kernels of decode attention share: how a worker finds its part of the line of tiles, and
// the three launches.
#pragma once

#include <cuda_runtime.h>

#include "attend/decode_attention.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/reduce.cuh"

namespace kvc {

// 2^(old - now), where both may be -inf.
__device__ __forceinline__ float decay(float old, float now) {
  return old == now ? 1.0f : exp2_approx(old - now);
}

// Of a store; 32 bits, since lengths have no more.
__device__ __forceinline__ uint32_t length_of(const DecodeAttentionParams& p, uint32_t store) {
  const auto width = static_cast<uint32_t>(p.width);
  if (p.lengths.data == nullptr) return width;
  const uint32_t b = p.row_of_batch(store), h = store - b * static_cast<uint32_t>(p.num_kv_heads);
  const int n = max(*p.lengths.at(b, h), 0);
  return min(static_cast<uint32_t>(n), width);
}

// What leaves for `lse` and `out`, from max and sum in base 2; nothing visible: -inf and 0.
__device__ __forceinline__ float natural_lse(float highest, float sum) {
  return (highest + log2f(sum)) * 0.693147180559945309f;
}
__device__ __forceinline__ float normalised(float total, float sum) {
  return sum == 0 ? 0.0f : total / sum;
}

// Two numbers of 16 bits; the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  const T a = from_float<T>(x), b = from_float<T>(y);
  return reinterpret_cast<const uint16_t&>(a) |
         static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(b)) << 16;
}

// x and y, each as the sum of two numbers of T.
struct SplitPair {
  uint32_t high, low;
};
template <typename T>
__device__ __forceinline__ SplitPair split(float x, float y) {
  const uint32_t high = pack<T>(x, y);
  const T* rounded = reinterpret_cast<const T*>(&high);
  return {high, pack<T>(x - to_float(rounded[0]), y - to_float(rounded[1]))};
}

// Brings the parameters into the constant cache, all lines at a time; each costs some hundred
// clocks where it is first needed.
template <typename Params>
__device__ __forceinline__ void fetch_params(const Params& p) {
#pragma unroll
  for (size_t i = 0; i < sizeof(Params); i += 64) {
    asm volatile(
        "" ::"r"(*reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(&p) + i)));
  }
}

template <int kTile>
__device__ __forceinline__ uint32_t tiles_of(const DecodeAttentionParams& p, uint32_t store) {
  return (length_of(p, store) + kTile - 1) / kTile;
}

// Where the part of a worker begins: tile `at` of the `slices` times over tiles of a store.
struct PartStart {
  uint32_t store, at, count;
};

// The tiles of the stores that a lane of a warp counts.
struct LaneTiles {
  uint32_t first, last;        // stores
  uint32_t mine, before, all;  // tiles of these stores, of the ones before, of all
  uint32_t of_each;            // of every store, 0: they differ
};

// Of the lanes up to this one.
__device__ __forceinline__ uint32_t warp_prefix_sum(uint32_t x) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, x, offset);
    if (threadIdx.x % kWarp >= offset) x += other;
  }
  return x;
}
// The last lane that says yes; one does.
__device__ __forceinline__ int last_lane(bool yes) {
  return kWarp - 1 - __clz(__ballot_sync(0xffffffffu, yes));
}

// A whole warp, lane by lane kEach neighbours at a time.
template <int kTile, int kEach>
__device__ __forceinline__ LaneTiles count_tiles(const DecodeAttentionParams& p, uint32_t each) {
  const auto stores = static_cast<uint32_t>(p.num_stores());
  const uint32_t lane = threadIdx.x % kWarp;
  LaneTiles t{.first = min(lane * each, stores), .last = min(lane * each + each, stores)};
  uint32_t mine = 0, one = 0;
  bool is_alike = true;
  for (uint32_t s = t.first; s < t.last; s += kEach) {
    uint32_t tiles[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) tiles[i] = tiles_of<kTile>(p, min(s + i, t.last - 1));
    if (s == t.first) one = tiles[0];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      is_alike &= tiles[i] == one;
      mine += s + i < t.last ? tiles[i] : 0;
    }
  }
  const uint32_t sum = warp_prefix_sum(mine);
  t.mine = mine;
  t.before = sum - mine;
  t.all = __shfl_sync(0xffffffffu, sum, kWarp - 1);
  const uint32_t of_first = __shfl_sync(0xffffffffu, one, 0);
  is_alike &= t.first == t.last || one == of_first;
  t.of_each = __all_sync(0xffffffffu, is_alike) ? of_first : 0;
  return t;
}

__device__ __forceinline__ uint32_t round_up(uint32_t n, uint32_t unit) {
  return (n + unit - 1) / unit * unit;
}

// A whole warp, each for itself: counts the tiles of all stores, and finds where the part of this
// worker begins. False if there is no such worker. A worker takes kGrain tiles at a time.
template <int kTile, int kGrain>
__device__ __forceinline__ bool find_part(const DecodeAttentionParams& p, PartStart& start) {
  const AttendPlan& plan = p.parts;
  const uint32_t worker = blockIdx.x, slices = p.slices_a_store;
  const auto stores = static_cast<uint32_t>(p.num_stores());
  LaneTiles t;
  if (p.lengths.data == nullptr) {
    t.of_each = tiles_of<kTile>(p, 0);
    t.all = stores * t.of_each;
  } else if (stores <= kWarp) {
    t = count_tiles<kTile, 1>(p, 1);
  } else {
    t = count_tiles<kTile, 8>(p, (stores + kWarp - 1) / kWarp);
  }
  if (t.of_each == 0 && plan.has_spare && slices == 1 && stores <= kWarp) {  // a lane a store
    // Tiles of a part: as few as leave no part without a worker, found in steps of a sixteenth.
    uint32_t each = max(round_up(plan.by_most.quotient(t.all + plan.most - 1), kGrain), 1u);
    uint32_t pieces, until;
    while (true) {
      pieces = (t.mine + each - 1) / each;
      until = warp_prefix_sum(pieces);
      if (__shfl_sync(0xffffffffu, until, kWarp - 1) <= plan.most) break;
      each += round_up(each / 16 + 1, kGrain);
    }
    const uint32_t before = until - pieces;
    if (worker >= __shfl_sync(0xffffffffu, until, kWarp - 1)) return false;
    const int holder = last_lane(before <= worker);
    start.store = holder;
    start.at = (worker - __shfl_sync(0xffffffffu, before, holder)) * each;
    start.count = min(each, __shfl_sync(0xffffffffu, t.mine, holder) - start.at);
    return true;
  }
  if (plan.is_even && t.of_each >= plan.pieces) {
    if (worker >= plan.workers) return false;
    uint32_t row = worker * plan.rows_a_part, at = 0;
    uint32_t count = min(plan.rows_a_part, plan.rows - row) * t.of_each;
    if (plan.pieces > 1) {
      row = plan.by_pieces.quotient(worker);
      const uint32_t piece = worker - row * plan.pieces, each = plan.by_pieces.quotient(t.of_each);
      const uint32_t longer = t.of_each - each * plan.pieces;
      at = piece * each + min(piece, longer);
      count = each + (piece < longer);
    }
    start.store = p.by_slices.quotient(row);
    start.at = at + (row - start.store * slices) * t.of_each;
    start.count = count;
    return true;
  }
  const uint32_t tiles = t.all * slices, workers = min(tiles, plan.most);
  if (worker >= workers) return false;
  const uint32_t each = tiles < plan.most ? 1 : plan.by_most.quotient(tiles);
  const uint32_t longer = tiles - each * workers;
  const uint32_t begin = worker * each + min(worker, longer);
  start.count = each + (worker < longer);
  if (p.lengths.data == nullptr) {
    start.store = begin / (t.of_each * slices);
    start.at = begin - start.store * t.of_each * slices;
    return true;
  }
  // The lane whose stores hold it: the last one of those that begin before.
  const int holder = last_lane(t.before * slices <= begin);
  uint32_t store = __shfl_sync(0xffffffffu, t.first, holder);
  uint32_t at = begin - __shfl_sync(0xffffffffu, t.before, holder) * slices;
  for (uint32_t size; at >= (size = tiles_of<kTile>(p, store) * slices); ++store) at -= size;
  start.store = store;
  start.at = at;
  return true;
}

// Which workers hold partials of a row of the line, [begin, end). `is_done`: the only one has
// written the result itself.
struct Owners {
  uint32_t begin, end;
  bool is_done;
};

constexpr uint32_t kOwnerIsDone = 0x80000000u;

// A worker that has left the partial of tiles [first, last) of `tiles`; one thread.
__device__ __forceinline__ void leave_owner(const DecodeAttentionParams& p, uint32_t row,
                                            uint32_t first, uint32_t last, uint32_t tiles,
                                            bool is_done) {
  uint32_t* to = reinterpret_cast<uint32_t*>(p.owners) + 2 * static_cast<int64_t>(row);
  if (first == 0) to[0] = blockIdx.x | (is_done ? kOwnerIsDone : 0);
  if (last == tiles) to[1] = blockIdx.x + 1;
}

// After the workers have ended; nobody owns an empty store.
__device__ __forceinline__ Owners owners_of(const DecodeAttentionParams& p, uint32_t row,
                                            uint32_t length) {
  if (length == 0) return {0, 0, false};
  const uint2 found = reinterpret_cast<const uint2*>(p.owners)[row];
  return {found.x & ~kOwnerIsDone, found.y, (found.x & kOwnerIsDone) != 0};
}

// Each launches once and returns the workers it launched; 0: there is nothing to read.
//
// Few rows, of 16-bit elements in 16-byte units: K and V go from memory to the registers that the
// tensor cores read.
bool decode_few_rows_fits(const DecodeAttentionParams& params);
int64_t decode_few_rows_cuda(const DecodeAttentionParams& params, cudaStream_t stream);
// More rows of such elements, on Hopper: K and V by TMA into a ring in shared memory, products by
// wgmma.
bool decode_many_rows_fits_sm90a(const DecodeAttentionParams& params);
int64_t decode_many_rows_sm90a_cuda(const DecodeAttentionParams& params, cudaStream_t stream);
// All else: K and V pass through shared memory, where several warps with other rows read them.
int64_t decode_many_rows_cuda(const DecodeAttentionParams& params, cudaStream_t stream);
// Adds up the partials, fills logits, observes.
void decode_merge_cuda(const DecodeAttentionParams& params, int64_t workers, cudaStream_t stream);

}  // namespace kvc
