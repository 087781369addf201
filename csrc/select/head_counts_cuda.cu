// head_counts on CUDA: one launch, a cluster of kBlocks blocks a row of the batch (a single block
// on sm_80), each the owner of neighbouring heads; or kParts neighbouring blocks share a head.
//
// A pass counts the open keys of one head after the other (device/radix.cuh). A head's counts,
// added up from the highest bin on and clamped to [floor, cap], differ from bin to bin by what the
// head takes there: these differences of all heads together are the histogram in which `narrow`
// finds the threshold. At most three passes of 12 bits, then one that counts what is above the
// threshold and what equals it; ties are handed out in the order of the heads. Bound: 4 bytes a
// score read from memory once, from L2 up to three times more; a batch of one keeps no more than 16
// multiprocessors busy.
#include <algorithm>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "select/head_counts.h"
#include "select/score_slice.cuh"

namespace kvc {
namespace {

template <int kBlocks_, int kParts_>
struct Traits {
  static constexpr int kBlocks = kBlocks_;  // of a cluster
  static constexpr int kParts = kParts_;    // neighbouring blocks that share a head
  static constexpr int kThreads = 1024;
  static constexpr int kWarps = kThreads / kWarp;
};

template <typename T>
struct Shared {
  RadixBins<T> radix;                  // what heads take
  alignas(16) uint32_t counts[kBins];  // what one head has, or this block's part of it
  uint2 part;                          // above the open keys or the threshold; equal to it
  uint32_t sums[2][T::kWarps];
  uint32_t ties[T::kBlocks];  // that each block could take
};

struct HeadResult {
  uint32_t base, ties;  // entries above the threshold, clamped; ties it could take
};

// Sums over the block, known to all threads.
template <typename T>
__device__ __forceinline__ uint2 block_sum(Shared<T>& shared, uint32_t x, uint32_t y) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = __reduce_add_sync(0xffffffffu, x);
  y = __reduce_add_sync(0xffffffffu, y);
  __syncthreads();  // the last sums are read
  if (lane == 0) shared.sums[0][warp] = x, shared.sums[1][warp] = y;
  __syncthreads();
  static_assert(T::kWarps == kWarp);
  return make_uint2(__reduce_add_sync(0xffffffffu, shared.sums[0][lane]),
                    __reduce_add_sync(0xffffffffu, shared.sums[1][lane]));
}

// Entries of the threads before this one.
template <typename T>
__device__ __forceinline__ uint32_t block_exclusive_sum(Shared<T>& shared, uint32_t x) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t through = warp_inclusive_sum(x);
  __syncthreads();
  if (lane == kWarp - 1) shared.sums[0][warp] = through;
  __syncthreads();
  return through - x + __reduce_add_sync(0xffffffffu, lane < warp ? shared.sums[0][lane] : 0);
}

// Heads of a block, or of the blocks that share one.
template <typename T>
__host__ __device__ constexpr uint32_t heads_a_block(uint32_t heads) {
  constexpr uint32_t kGroups = T::kBlocks / T::kParts;
  return (heads + kGroups - 1) / kGroups;
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads)
    head_counts_kernel(const __grid_constant__ HeadCountsParams p) {
  constexpr int kBlocks = T::kBlocks, kParts = T::kParts, kThreads = T::kThreads;
  __shared__ Shared<T> shared;
  extern __shared__ HeadResult results[];  // of this block's heads
  launch_wait();
  launch_dependents();

  // who am I
  const uint32_t block = blockIdx.x % kBlocks, b = blockIdx.x / kBlocks;
  const auto heads = static_cast<uint32_t>(p.heads);
  const uint32_t part = block % kParts, share = heads_a_block<T>(heads);
  const uint32_t first = min(block / kParts * share, heads), last = min(first + share, heads);
  const uint32_t others = part == 0 ? kParts : 1;  // blocks behind this one that have the same head
  int32_t* counts = p.counts + b * p.heads;
  uint32_t floors = 0, caps = 0;
  for (uint32_t h = threadIdx.x; h < heads; h += kThreads) {
    const HeadLimits limits = head_limits(p, b, h);
    floors += limits.floor;
    caps += limits.cap;
  }
  const uint2 bounds = block_sum(shared, floors, caps);
  const uint32_t total = max(p.totals[b], 0);
  if (total <= bounds.x || total >= bounds.y) {  // all blocks of the cluster alike
    if (part != 0) return;
    for (uint32_t h = first + threadIdx.x; h < last; h += kThreads) {
      const HeadLimits limits = head_limits(p, b, h);
      counts[h] = static_cast<int32_t>(total <= bounds.x ? limits.floor : limits.cap);
    }
    return;
  }

  const auto slice_of = [&](uint32_t h, const HeadLimits& limits) {
    return Slice::make(p.scores + b * p.batch_stride + h * p.head_stride,
                       static_cast<uint32_t>(limits.begin), static_cast<uint32_t>(limits.end), part,
                       kParts);
  };
  Open open{.low = kTopkNan, .width = kTopkForced - kTopkNan, .rank = total - bounds.x};
  while (open.width > 0) {
    // thread t holds what the heads take in the t-th highest four bins
    constexpr int kOwn = RadixBins<T>::kBinsPerThread;
    static_assert(kOwn == 4);
    const uint32_t lowest = kBins - (threadIdx.x + 1) * kOwn;
    uint32_t taken[kOwn] = {};
    Counter counter(open);
    if (threadIdx.x == 0) shared.radix.range = {0xffffffffu, 0};
    if (kParts == 1) cluster_arrive<kBlocks>();  // this block has read the bins of the last pass
    for (uint32_t h = first; h < first + share; ++h) {
      reinterpret_cast<uint4*>(shared.counts)[threadIdx.x] = uint4{};
      __syncthreads();
      HeadLimits limits{};
      uint32_t above = 0;
      if (h < last) {
        limits = head_limits(p, b, h);
        slice_of(h, limits).template for_each<T::kWarps, false>(
            [&](uint32_t, const uint32_t (&keys)[4], auto) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                counter.count(shared.counts, keys[j]);
                above += keys[j] > open.low + open.width;
              }
            });
      }
      above = block_sum(shared, above, 0).x;
      if (h + 1 == first + share) {
        if constexpr (kParts > 1) {
          if (threadIdx.x == 0) shared.part.x = above;
          cluster_arrive<kBlocks>();  // that too, and it has counted
        }
        cluster_wait<kBlocks>();
      }
      const uint4 four = *reinterpret_cast<const uint4*>(shared.counts + lowest);
      uint32_t own[kOwn] = {four.w, four.z, four.y, four.x};
      for (uint32_t other = 1; other < others; ++other) {
        const uint2 low = cluster_load2<kBlocks>(shared.counts + lowest, block + other);
        const uint2 high = cluster_load2<kBlocks>(shared.counts + lowest + 2, block + other);
        own[0] += high.y, own[1] += high.x, own[2] += low.y, own[3] += low.x;
        above += cluster_load<kBlocks>(&shared.part.x, block + other);
      }
      uint32_t reached = above + block_exclusive_sum(shared, own[0] + own[1] + own[2] + own[3]);
      if (part != 0) continue;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        taken[j] += limits.clamp(reached + own[j]) - limits.clamp(reached);
        reached += own[j];
      }
    }
    *reinterpret_cast<uint4*>(shared.radix.bins + lowest) = {taken[3], taken[2], taken[1],
                                                             taken[0]};
    counter.finish(shared.radix.range);
    open = narrow<kBlocks>(shared.radix, open, block).open;
  }

  const uint32_t threshold = open.low, ties = open.rank;
  uint32_t own_ties = 0;
  for (uint32_t h = first; h < first + share; ++h) {
    HeadLimits limits{};
    uint32_t above = 0, equal = 0;
    if (h < last) {
      limits = head_limits(p, b, h);
      slice_of(h, limits).template for_each<T::kWarps, true>(
          [&](uint32_t, const uint32_t (&keys)[4], auto) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              above += keys[j] > threshold;
              equal += keys[j] == threshold;
            }
          });
    }
    uint2 sums = block_sum(shared, above, equal);
    if constexpr (kParts > 1) {  // and one head a block
      if (threadIdx.x == 0) shared.part = sums;
      cluster_sync<kBlocks>();
      for (uint32_t other = 1; other < others; ++other) {
        const uint2 theirs = cluster_load2<kBlocks>(&shared.part.x, block + other);
        sums.x += theirs.x, sums.y += theirs.y;
      }
    }
    if (part != 0 || h >= last) continue;
    const uint32_t base = limits.clamp(sums.x), capacity = limits.clamp(sums.x + sums.y) - base;
    if (threadIdx.x == 0) results[h - first] = {base, capacity};
    own_ties += capacity;
  }
  if (threadIdx.x < kBlocks) cluster_store<kBlocks>(&shared.ties[block], threadIdx.x, own_ties);
  cluster_sync<kBlocks>();
  if (threadIdx.x == 0 && part == 0) {
    uint32_t left = ties;
    for (uint32_t other = 0; other < block; ++other) left -= min(left, shared.ties[other]);
    for (uint32_t h = first; h < last; ++h) {
      const HeadResult result = results[h - first];
      const uint32_t taken = min(left, result.ties);
      counts[h] = static_cast<int32_t>(result.base + taken);
      left -= taken;
    }
  }
}

template <int kBlocks, int kParts>
void launch(const HeadCountsParams& p, cudaStream_t stream) {
  using T = Traits<kBlocks, kParts>;
  const size_t bytes = heads_a_block<T>(static_cast<uint32_t>(p.heads)) * sizeof(HeadResult);
  Launch(static_cast<unsigned>(p.batch * kBlocks), T::kThreads, bytes, stream)
      .cluster(kBlocks)
      .early(device_limits().major >= 9)("head_counts", head_counts_kernel<T>, p);
}

// Clusters of 16 blocks that run at once.
int large_clusters() {
  return once_a_device([](int) {
    return Launch(16, Traits<16, 1>::kThreads, 0, nullptr)
        .cluster(16)
        .fitting_clusters("head_counts", head_counts_kernel<Traits<16, 1>>);
  });
}

// Entries of a head from which on more blocks for it pay for a barrier a pass: 8 heads of 32k take
// 28.0 us with a block each and 28.6 with two, of 64k 39.0 and 34.5, of 128k 60.1 and 45.5.
constexpr int64_t kLongHead = 65536;

}  // namespace

// A block a head as far as clusters go; for long heads up to four, all at once.
void head_counts_cuda(const HeadCountsParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const DeviceLimits& limits = device_limits();
  if (limits.major < 9) return launch<1, 1>(p, s);
  const auto fit = [&](int64_t blocks) {
    return blocks > 8 ? p.batch <= large_clusters() : blocks * p.batch <= limits.multiprocessors;
  };
  const bool is_long = p.seq_len >= kLongHead;
  if (p.heads == 1) return is_long && fit(4) ? launch<4, 4>(p, s) : launch<1, 1>(p, s);
  if (p.heads == 2) return is_long && fit(8) ? launch<8, 4>(p, s) : launch<2, 1>(p, s);
  if (p.heads <= 4) return is_long && fit(16) ? launch<16, 4>(p, s) : launch<4, 1>(p, s);
  if (p.heads <= 8) return is_long && fit(16) ? launch<16, 2>(p, s) : launch<8, 1>(p, s);
  fit(16) ? launch<16, 1>(p, s) : launch<8, 1>(p, s);
}

}  // namespace kvc
