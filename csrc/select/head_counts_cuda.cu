// head_counts on CUDA: one launch, a cluster of kBlocks blocks a row of the batch (a single block
// on sm_80), each the owner of neighbouring heads.
//
// A pass counts the open keys of one head after the other (device/radix.cuh). A head's counts,
// added up from the highest bin on and clamped to [floor, cap], differ from bin to bin by what the
// head takes there: these differences of all heads together are the histogram in which `narrow`
// finds the threshold. At most three passes of 12 bits, then one that counts what is above the
// threshold and what equals it; ties are handed out in the order of the heads. Bound: 4 bytes a
// score read from memory once, from L2 up to three times more; a block reads heads / kBlocks rows,
// so a batch of one keeps no more than eight multiprocessors busy.
#include <algorithm>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "select/head_counts.h"
#include "select/score_slice.cuh"

namespace kvc {
namespace {

template <int kBlocks_>
struct Traits {
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = 1024;
  static constexpr int kWarps = kThreads / kWarp;
};

template <typename T>
struct Shared {
  RadixBins<T> radix;
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

template <typename T>
__global__ void __launch_bounds__(T::kThreads)
    head_counts_kernel(const __grid_constant__ HeadCountsParams p) {
  constexpr int kBlocks = T::kBlocks, kThreads = T::kThreads;
  __shared__ Shared<T> shared;
  extern __shared__ HeadResult results[];  // of this block's heads
  launch_wait();
  launch_dependents();

  // who am I
  const uint32_t block = blockIdx.x % kBlocks, b = blockIdx.x / kBlocks;
  const auto heads = static_cast<uint32_t>(p.heads), share = (heads + kBlocks - 1) / kBlocks;
  const uint32_t first = min(block * share, heads), last = min(first + share, heads);
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
    for (uint32_t h = first + threadIdx.x; h < last; h += kThreads) {
      const HeadLimits limits = head_limits(p, b, h);
      counts[h] = static_cast<int32_t>(total <= bounds.x ? limits.floor : limits.cap);
    }
    return;
  }
  cluster_arrive_relaxed<kBlocks>();  // this block runs: its shared memory may be written to

  const auto slice_of = [&](uint32_t h, const HeadLimits& limits) {
    return Slice::make(p.scores + b * p.batch_stride + h * p.head_stride,
                       static_cast<uint32_t>(limits.begin), static_cast<uint32_t>(limits.end), 0,
                       1);
  };
  Open open{.low = kTopkNan, .width = kTopkForced - kTopkNan, .rank = total - bounds.x};
  cluster_wait<kBlocks>();
  while (open.width > 0) {
    // thread t holds what the heads take in the t-th highest four bins
    constexpr int kOwn = RadixBins<T>::kBinsPerThread;
    static_assert(kOwn == 4);
    const uint32_t lowest = kBins - (threadIdx.x + 1) * kOwn;
    uint32_t taken[kOwn] = {};
    Counter counter(open);
    for (uint32_t h = first; h < last; ++h) {
      const HeadLimits limits = head_limits(p, b, h);
      clear_bins(shared.radix);
      __syncthreads();
      uint32_t above = 0;
      slice_of(h, limits).template for_each<T::kWarps, false>(
          [&](uint32_t, const uint32_t (&keys)[4], auto) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              counter.count(shared.radix.bins, keys[j]);
              above += keys[j] > open.low + open.width;
            }
          });
      above = block_sum(shared, above, 0).x;
      const uint4 four = *reinterpret_cast<const uint4*>(shared.radix.bins + lowest);
      const uint32_t own[kOwn] = {four.w, four.z, four.y, four.x};
      uint32_t reached = above + block_exclusive_sum(shared, own[0] + own[1] + own[2] + own[3]);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        taken[j] += limits.clamp(reached + own[j]) - limits.clamp(reached);
        reached += own[j];
      }
    }
    if (first == last) {
      clear_bins(shared.radix);
      __syncthreads();
    }
    *reinterpret_cast<uint4*>(shared.radix.bins + lowest) = {taken[3], taken[2], taken[1],
                                                             taken[0]};
    counter.finish(shared.radix.range);
    open = narrow<kBlocks>(shared.radix, open, block).open;
    cluster_sync<kBlocks>();  // all blocks have read these bins
  }

  const uint32_t threshold = open.low, ties = open.rank;
  uint32_t own_ties = 0;
  for (uint32_t h = first; h < last; ++h) {
    const HeadLimits limits = head_limits(p, b, h);
    uint32_t above = 0, equal = 0;
    slice_of(h, limits).template for_each<T::kWarps, true>(
        [&](uint32_t, const uint32_t (&keys)[4], auto) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            above += keys[j] > threshold;
            equal += keys[j] == threshold;
          }
        });
    const uint2 sums = block_sum(shared, above, equal);
    const uint32_t base = limits.clamp(sums.x), capacity = limits.clamp(sums.x + sums.y) - base;
    if (threadIdx.x == 0) results[h - first] = {base, capacity};
    own_ties += capacity;
  }
  if (threadIdx.x < kBlocks) cluster_store<kBlocks>(&shared.ties[block], threadIdx.x, own_ties);
  cluster_sync<kBlocks>();
  if (threadIdx.x == 0) {
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

template <int kBlocks>
void launch(const HeadCountsParams& p, bool may_be_early, cudaStream_t stream) {
  const size_t bytes = (p.heads + kBlocks - 1) / kBlocks * sizeof(HeadResult);
  Launch(static_cast<unsigned>(p.batch * kBlocks), Traits<kBlocks>::kThreads, bytes, stream)
      .cluster(kBlocks)
      .early(may_be_early)("head_counts", head_counts_kernel<Traits<kBlocks>>, p);
}

}  // namespace

void head_counts_cuda(const HeadCountsParams& params, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool has_clusters = device_limits().major >= 9;
  if (!has_clusters || params.heads == 1) return launch<1>(params, has_clusters, s);
  if (params.heads <= 2) return launch<2>(params, true, s);
  if (params.heads <= 4) return launch<4>(params, true, s);
  launch<8>(params, true, s);
}

}  // namespace kvc
