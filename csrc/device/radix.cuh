// Finds the rank-th largest of many uint32 keys by histograms: building blocks for a block of
// threads, or for a cluster that shares the keys.
//
// Keys that may be the one are "open": [low, low + width], at first all. They are counted in kBins
// bins of equal width by integer atomics in shared memory: the same counts every run. `narrow` then
// finds the bin of the wanted key: each block pushes sums of 32 bins to all blocks, a cluster
// barrier, and only the 32 bins of the right sum are read across. The bin, clipped to the keys that
// are there, is what stays open, so equal keys and narrow ranges need no second look. A T brings
// kBlocks (of the cluster) and kThreads (of a block). Key 0 is never open.
#pragma once

#include <cstdint>

#include "device/cluster.cuh"
#include "device/reduce.cuh"

namespace kvc {

constexpr int kBins = 1 << 12;
constexpr int kCoarse = kBins / kWarp;           // sums of 32 bins
constexpr int kCoarsePerLane = kCoarse / kWarp;  // read as one uint4
static_assert(kCoarsePerLane == 4);

// The keys among which the threshold lies, [low, low + width]; it is the rank-th largest of them.
struct Open {
  uint32_t low, width, rank;

  __device__ __forceinline__ bool holds(uint32_t key) const { return key - low <= width; }
  __device__ __forceinline__ int shift() const { return max(0, 32 - __clz(width) - 12); }
};

struct Found {
  Open open;
  uint32_t count;         // open keys of all blocks
  uint32_t before;        // open keys of earlier blocks
  uint32_t above_before;  // keys of earlier blocks that were open and lie above now
};

template <typename T>
struct RadixBins {
  static constexpr int kBinsPerThread = kBins / T::kThreads;  // neighbours, read as uint4
  static_assert(kBinsPerThread % 4 == 0);
  alignas(16) uint32_t bins[kBins];
  alignas(16) uint32_t coarse[T::kBlocks][kCoarse];  // of every block
  uint2 ranges[T::kBlocks];                          // least and largest open key, counted from low
  uint2 range;                                       // the same of this block, while it is made
  Found found;
};

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

template <typename T>
__device__ __forceinline__ void clear_bins(RadixBins<T>& shared) {
#pragma unroll
  for (int j = 0; j < RadixBins<T>::kBinsPerThread; j += 4) {
    reinterpret_cast<uint4*>(shared.bins)[j / 4 * T::kThreads + threadIdx.x] = uint4{};
  }
  if (threadIdx.x == 0) shared.range = {0xffffffffu, 0};
}

struct Counter {
  Open open;
  int shift;
  uint32_t least = 0xffffffffu, most = 0;

  __device__ explicit Counter(const Open& o) : open(o), shift(o.shift()) {}

  __device__ __forceinline__ void count(uint32_t* bins, uint32_t key) {
    const uint32_t from_low = key - open.low;  // wraps for keys below
    least = min(least, from_low);
    if (from_low <= open.width) {
      atomicAdd(bins + (from_low >> shift), 1u);
      most = max(most, from_low);
    }
  }
  __device__ __forceinline__ void finish(uint2& range) {
    least = __reduce_min_sync(0xffffffffu, least);
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % kWarp == 0) {
      atomicMin(&range.x, least);
      atomicMax(&range.y, most);
    }
  }
};

// Counts every key, up to that of +inf: those below `low` in bin 0, those above in the bin behind
// the last one of the range. The rank is one of all keys, and the extremes are keys, not distances
// from `low`.
struct RangeCounter {
  uint32_t low, top;
  int shift;
  uint32_t least = 0xffffffffu, most = 0;

  __device__ explicit RangeCounter(const Open& range) : low(range.low), shift(range.shift()) {
    if (range.width >> shift > kBins - 3) ++shift;
    top = low + (((range.width >> shift) + 1) << shift);
  }
  __device__ __forceinline__ void count(uint32_t* bins, uint32_t key) {
    const uint32_t inside = min(max(key, low - 1), top);
    atomicAdd(bins + ((inside - low + (1u << shift)) >> shift), 1u);
    least = min(least, key);
    most = max(most, key);
  }
  __device__ __forceinline__ void finish(uint2& range) {
    least = __reduce_min_sync(0xffffffffu, least);
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % kWarp == 0) {
      atomicMin(&range.x, least);
      atomicMax(&range.y, most);
    }
  }
  // The keys of a bin, clipped to those that are there.
  __device__ __forceinline__ uint2 keys_of(uint32_t bin, uint32_t all_least,
                                           uint32_t all_most) const {
    const uint32_t first = bin == 0 ? 0 : low + ((bin - 1) << shift);
    const uint32_t last = bin == 0       ? low - 1
                          : first == top ? 0xffffffffu
                                         : first + ((1u << shift) - 1);
    return make_uint2(max(first, all_least), min(last, all_most));
  }
};

// One warp: the bin of the open.rank-th largest key over all blocks of the group, into `result`.
// kIsRanged: bins by a RangeCounter.
template <int kBlocks, bool kIsRanged, typename T>
__device__ __forceinline__ void pick_bin(RadixBins<T>& shared, const Open& open, uint32_t block,
                                         Found& result) {
  const int lane = threadIdx.x % kWarp;
  // lane l takes the l-th highest coarse sums
  const int lowest = kCoarse - (lane + 1) * kCoarsePerLane;
  uint32_t all[kCoarsePerLane] = {}, earlier[kCoarsePerLane] = {};
  uint32_t least = 0xffffffffu, most = 0;
#pragma unroll
  for (int other = 0; other < kBlocks; ++other) {
    const uint4 four = *reinterpret_cast<const uint4*>(shared.coarse[other] + lowest);
    const uint32_t counts[kCoarsePerLane] = {four.w, four.z, four.y, four.x};
#pragma unroll
    for (int j = 0; j < kCoarsePerLane; ++j) {
      all[j] += counts[j];
      earlier[j] += static_cast<uint32_t>(other) < block ? counts[j] : 0;
    }
    least = min(least, shared.ranges[other].x);
    most = max(most, shared.ranges[other].y);
  }
  const uint32_t own = all[0] + all[1] + all[2] + all[3];
  uint32_t above = warp_inclusive_sum(own) - own;
  uint32_t earlier_above = 0;
  bool has_it = above < open.rank && open.rank <= above + own;
  const uint32_t owner = __ffs(__ballot_sync(0xffffffffu, has_it)) - 1;
  uint32_t coarse = lowest + kCoarsePerLane - 1;
#pragma unroll
  for (int j = 0; j < kCoarsePerLane; ++j) {
    if (!has_it ||
        above + all[j] < open.rank) {  // all of it above: lanes before the owner count on
      above += all[j];
      earlier_above += static_cast<uint32_t>(lane) <= owner ? earlier[j] : 0;
      --coarse;
    } else {
      has_it = true;
      break;
    }
  }
  earlier_above = __reduce_add_sync(0xffffffffu, earlier_above);
  coarse = __shfl_sync(0xffffffffu, coarse, owner);
  const uint32_t rank = open.rank - __shfl_sync(0xffffffffu, above, owner);

  // lane l takes the l-th highest bin of the 32
  const uint32_t* bin = shared.bins + coarse * kWarp + kWarp - 1 - lane;
  uint32_t counts[kBlocks];
#pragma unroll
  for (int other = 0; other < kBlocks; ++other) counts[other] = cluster_load<kBlocks>(bin, other);
  uint32_t count = 0, before = 0;
#pragma unroll
  for (int other = 0; other < kBlocks; ++other) {
    count += counts[other];
    before += static_cast<uint32_t>(other) < block ? counts[other] : 0;
  }
  const uint32_t through = warp_inclusive_sum(count);
  const bool is_it = through - count < rank && rank <= through;
  const uint32_t picked = __ffs(__ballot_sync(0xffffffffu, is_it)) - 1;
  earlier_above +=
      __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(lane) < picked ? before : 0);
  if (is_it) {
    const uint32_t bin = coarse * kWarp + kWarp - 1 - lane;
    uint32_t low, high;
    if constexpr (kIsRanged) {
      const uint2 ends = RangeCounter(open).keys_of(bin, least, most);
      low = ends.x, high = ends.y;
    } else {
      const int shift = open.shift();
      const uint32_t first = bin << shift;
      low = open.low + max(first, least);
      high = open.low + min(first + ((1u << shift) - 1), most);
    }
    result = {.open = {.low = low, .width = high - low, .rank = rank - (through - count)},
              .count = count,
              .before = before,
              .above_before = earlier_above};
  }
}

// Sums of 32 bins and the range of the keys, to all of kBlocks blocks. The caller has counted.
template <int kBlocks, typename T>
__device__ __forceinline__ void share_bins(RadixBins<T>& shared, uint32_t block) {
  constexpr int kBinsPerThread = RadixBins<T>::kBinsPerThread,
                kThreadsPerCoarse = kWarp / kBinsPerThread;
  __syncthreads();
  const uint4* own = reinterpret_cast<const uint4*>(shared.bins + threadIdx.x * kBinsPerThread);
  uint32_t sum = 0;
#pragma unroll
  for (int j = 0; j < kBinsPerThread / 4; ++j) {
    const uint4 four = own[j];
    sum += four.x + four.y + four.z + four.w;
  }
#pragma unroll
  for (int offset = 1; offset < kThreadsPerCoarse; offset *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
#pragma unroll
  for (int other = threadIdx.x % kThreadsPerCoarse; other < kBlocks; other += kThreadsPerCoarse) {
    cluster_store<kBlocks>(&shared.coarse[block][threadIdx.x / kThreadsPerCoarse], other, sum);
  }
  if (threadIdx.x < kBlocks) {
    cluster_store<kBlocks>(&shared.ranges[block].x, threadIdx.x, shared.range.x);
    cluster_store<kBlocks>(&shared.ranges[block].y, threadIdx.x, shared.range.y);
  }
  cluster_sync<kBlocks>();
}

// Bins of kBlocks blocks, the cluster or one by itself -> what is open next. The caller has
// counted; all threads return the same.
template <int kBlocks, bool kIsRanged = false, typename T>
__device__ __forceinline__ Found narrow(RadixBins<T>& shared, const Open& open, uint32_t block) {
  share_bins<kBlocks>(shared, block);
  if (threadIdx.x < kWarp) pick_bin<kBlocks, kIsRanged>(shared, open, block, shared.found);
  __syncthreads();
  return shared.found;
}

// `narrow` of a block by itself, one copy of the code for all who call it: what runs once runs as
// fast as instructions come in.
template <typename T>
__device__ __noinline__ void narrow_alone(RadixBins<T>& shared, Open open) {
  narrow<1>(shared, open, 0);
}

// Each warp by itself: the rank-th largest of at most 32 keys.
__device__ __forceinline__ Open pick_of_few(const uint32_t* keys, uint32_t count, uint32_t rank) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t key = lane < count ? keys[lane] : 0;
  uint32_t above = 0, equal = 0;
#pragma unroll 1
  for (uint32_t other = 0; other < count; ++other) {
    const uint32_t theirs = __shfl_sync(0xffffffffu, key, other);
    above += theirs > key;
    equal += theirs == key;
  }
  const bool is_it = key != 0 && above < rank && rank <= above + equal;
  const uint32_t owner = __ffs(__ballot_sync(0xffffffffu, is_it)) - 1;
  return {.low = __shfl_sync(0xffffffffu, key, owner),
          .width = 0,
          .rank = rank - __shfl_sync(0xffffffffu, above, owner)};
}

}  // namespace kvc
