// topk on CUDA: one launch, a cluster of kBlocks blocks a row (a single block on sm_80, and where
// rows are many).
//
// The row is cut into kBlocks slices. Each block turns its slice into uint32 keys, kept in shared
// memory if they fit, made anew from the scores if not; forced entries are all ones, padding is 0.
// Three passes of 11, 11 and 10 bits find the threshold, the n-th largest key: shared-memory
// histograms (integer atomics, so the same counts every run), summed over the cluster, scanned from
// the top by every block alike. Then each warp counts its stretch of the slice, the counts give
// every warp its first slot, and a ballot per 32 entries writes the positions in order, ties with
// the threshold from the smallest position on. Bound: 4 bytes a score read once, 4 bytes a kept
// entry written once; below about 10 MB the barriers between the passes are what counts.
#include <algorithm>

#include "device/check.cuh"
#include "device/cluster.cuh"
#include "device/limits.cuh"
#include "device/reduce.cuh"
#include "select/topk.h"

namespace kvc {
namespace {

constexpr int kBins = 1 << 11;
constexpr int kUnroll = 8;  // loads in flight a thread while keys are made
constexpr int kAhead = 4;   // the same while positions are written

template <int kBlocks_, bool kCached_>
struct Traits {
  static constexpr int kBlocks = kBlocks_;   // of a cluster
  static constexpr bool kCached = kCached_;  // keys stay in shared memory
  static constexpr int kThreads = kBlocks == 1 ? 1024 : 512;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kBinsPerThread = kBins / kThreads;
  static_assert(kBinsPerThread % 2 == 0, "bins are read in pairs");
};

template <typename T>
struct Shared {
  alignas(
      16) uint32_t bins[3][kBins];  // one table a pass: a slow block may still read the last one
  uint32_t totals[2];               // of this block: keys above the threshold, keys equal to it
  uint32_t warp_above[T::kWarps], warp_equal[T::kWarps];
  uint32_t picked_bin, picked_rank;
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

// The slice of one block: keys by position. Positions fit 31 bits, so their sums with a step
// fit 32.
template <typename T>
struct Slice {
  const float* scores;  // of the row
  uint32_t* cache;      // keys of [begin, end)
  uint32_t begin, end;
  uint32_t row_begin, row_end, sink_end, window_begin;  // as in TopkRow

  __device__ __forceinline__ uint32_t make_key(uint32_t i, float score) const {
    if (i < row_begin || i >= row_end) return kTopkPadding;
    if (i < sink_end || i >= window_begin) return kTopkForced;
    return topk_key(__float_as_uint(score));
  }

  __device__ __forceinline__ uint32_t key(uint32_t i) const {
    if constexpr (T::kCached) return cache[i - begin];
    return make_key(i, __ldg(scores + i));
  }

  // Calls f(key) for every entry of the slice, in no order. The first walk fills the cache.
  template <bool kFirst, typename F>
  __device__ __forceinline__ void for_each(F&& f) const {
    if constexpr (T::kCached && !kFirst) {
      for (uint32_t i = begin + threadIdx.x; i < end; i += T::kThreads) f(cache[i - begin]);
    } else {
      for (uint32_t first = begin + threadIdx.x; first < end; first += kUnroll * T::kThreads) {
        float loaded[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
          const uint32_t i = first + j * T::kThreads;
          loaded[j] = i < end ? __ldg(scores + i) : 0.f;
        }
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
          const uint32_t i = first + j * T::kThreads;
          if (i < end) {
            const uint32_t made = make_key(i, loaded[j]);
            if constexpr (T::kCached) cache[i - begin] = made;
            f(made);
          }
        }
      }
    }
  }
};

// Finds the bin of the rank-th largest key in `bins`, summed over the cluster; the rank becomes
// that within the bin. All threads of the cluster agree on the result.
template <typename T>
__device__ uint32_t pick_bin(Shared<T>& shared, const uint32_t* bins, uint32_t& rank) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // thread t takes the t-th highest bins
  const int lowest = kBins - (static_cast<int>(threadIdx.x) + 1) * T::kBinsPerThread;
  uint32_t counts[T::kBinsPerThread] = {};
#pragma unroll
  for (int block = 0; block < T::kBlocks; ++block) {
#pragma unroll
    for (int j = 0; j < T::kBinsPerThread; j += 2) {
      const uint2 pair = cluster_load2<T::kBlocks>(bins + lowest + j, block);
      counts[j] += pair.x;
      counts[j + 1] += pair.y;
    }
  }
  uint32_t own = 0;
#pragma unroll
  for (int j = 0; j < T::kBinsPerThread; ++j) own += counts[j];
  const uint32_t within = warp_inclusive_sum(own);
  if (lane == kWarp - 1) shared.warp_above[warp] = within;
  __syncthreads();
  uint32_t above = within - own;  // keys in higher bins than this thread's
  for (int w = 0; w < warp; ++w) above += shared.warp_above[w];
  if (above < rank && rank <= above + own) {
#pragma unroll
    for (int j = T::kBinsPerThread - 1; j >= 0; --j) {
      if (above < rank && rank <= above + counts[j]) {
        shared.picked_bin = lowest + j;
        shared.picked_rank = rank - above;
      }
      above += counts[j];
    }
  }
  __syncthreads();
  rank = shared.picked_rank;
  return shared.picked_bin;
}

// The n-th largest key of the row, and in `rank` how many of those equal to it are kept.
template <typename T>
__device__ uint32_t find_threshold(Shared<T>& shared, const Slice<T>& slice, uint32_t& rank) {
  uint32_t* bins = shared.bins[0];
  slice.template for_each<true>([&](uint32_t key) {
    if (key != kTopkPadding) atomicAdd(bins + (key >> 21), 1u);
  });
  cluster_sync<T::kBlocks>();
  uint32_t prefix = pick_bin(shared, bins, rank);

  bins = shared.bins[1];
  slice.template for_each<false>([&](uint32_t key) {
    if (key >> 21 == prefix) atomicAdd(bins + (key >> 10 & 0x7ffu), 1u);
  });
  cluster_sync<T::kBlocks>();
  prefix = prefix << 11 | pick_bin(shared, bins, rank);

  bins = shared.bins[2];
  slice.template for_each<false>([&](uint32_t key) {
    if (key >> 10 == prefix) atomicAdd(bins + (key & 0x3ffu), 1u);
  });
  cluster_sync<T::kBlocks>();
  return prefix << 10 | pick_bin(shared, bins, rank);
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads)
    topk_kernel(const __grid_constant__ TopkParams p, int64_t slice_size) {
  extern __shared__ uint4 dynamic[];
  auto& shared = *reinterpret_cast<Shared<T>*>(dynamic);

  const int block = blockIdx.x % T::kBlocks;  // rank in the cluster
  const int64_t row_id = blockIdx.x / T::kBlocks;
  const int64_t b = row_id / p.heads, h = row_id % p.heads;
  const TopkRow row = topk_row(p, b);
  int32_t* const out = p.index + row_id * p.k;
  for (int64_t i = row.count + block * T::kThreads + threadIdx.x; i < p.k;
       i += T::kBlocks * T::kThreads) {
    out[i] = -1;
  }
  if (row.count == 0) return;  // all blocks of the cluster alike

  const int64_t begin = min(block * slice_size, p.seq_len);
  const Slice<T> slice{
      .scores = p.scores + b * p.batch_stride + h * p.head_stride,
      .cache = reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(dynamic) + sizeof(Shared<T>)),
      .begin = static_cast<uint32_t>(begin),
      .end = static_cast<uint32_t>(min(begin + slice_size, p.seq_len)),
      .row_begin = static_cast<uint32_t>(row.begin),
      .row_end = static_cast<uint32_t>(row.end),
      .sink_end = static_cast<uint32_t>(row.sink_end),
      .window_begin = static_cast<uint32_t>(row.window_begin),
  };
  for (int i = threadIdx.x; i < 3 * kBins; i += T::kThreads) (&shared.bins[0][0])[i] = 0;
  __syncthreads();
  uint32_t ties = static_cast<uint32_t>(row.count);
  const uint32_t threshold = find_threshold<T>(shared, slice, ties);

  // each warp counts its stretch, 32 entries a step
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t stretch =
      static_cast<uint32_t>((slice_size + T::kThreads - 1) / T::kThreads) * kWarp;
  const uint32_t first = min(slice.begin + warp * stretch, slice.end);
  const uint32_t last = min(first + stretch, slice.end);
  uint32_t above = 0, equal = 0;
#pragma unroll 4
  for (uint32_t i = first + lane; i < last; i += kWarp) {
    const uint32_t key = slice.key(i);
    above += key > threshold;
    equal += key == threshold;
  }
  above = __reduce_add_sync(0xffffffffu, above);
  equal = __reduce_add_sync(0xffffffffu, equal);
  if (lane == 0) {
    shared.warp_above[warp] = above;
    shared.warp_equal[warp] = equal;
  }
  __syncthreads();

  // entries before this warp's: those of earlier warps, then those of earlier blocks
  above = lane < warp ? shared.warp_above[lane] : 0;
  equal = lane < warp ? shared.warp_equal[lane] : 0;
  above = __reduce_add_sync(0xffffffffu, above);
  equal = __reduce_add_sync(0xffffffffu, equal);
  if constexpr (T::kBlocks > 1) {
    if (warp == T::kWarps - 1 && lane == 0) {
      shared.totals[0] = above + shared.warp_above[warp];
      shared.totals[1] = equal + shared.warp_equal[warp];
    }
    cluster_sync<T::kBlocks>();
    for (int other = 0; other < block; ++other) {
      above += cluster_load<T::kBlocks>(shared.totals, other);
      equal += cluster_load<T::kBlocks>(shared.totals + 1, other);
    }
    cluster_arrive<T::kBlocks>();  // this block reads no other from here on
  }

  // write positions in order
  const uint32_t lanes_below = (1u << lane) - 1;
  for (uint32_t start = first; start < last; start += kAhead * kWarp) {
    uint32_t keys[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t i = start + j * kWarp + lane;
      keys[j] = i < last ? slice.key(i) : kTopkPadding;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool is_above = keys[j] > threshold, is_equal = keys[j] == threshold;
      const uint32_t all_above = __ballot_sync(0xffffffffu, is_above);
      const uint32_t all_equal = __ballot_sync(0xffffffffu, is_equal);
      const uint32_t above_before = above + __popc(all_above & lanes_below);
      const uint32_t equal_before = equal + __popc(all_equal & lanes_below);
      if (is_above || (is_equal && equal_before < ties)) {
        out[above_before + min(equal_before, ties)] =
            static_cast<int32_t>(start + j * kWarp + lane);
      }
      above += __popc(all_above);
      equal += __popc(all_equal);
    }
  }
  if constexpr (T::kBlocks > 1) cluster_wait<T::kBlocks>();  // no block leaves while others read it
}

template <typename T>
void launch(const TopkParams& p, int64_t slice, cudaStream_t stream) {
  const size_t bytes = sizeof(Shared<T>) + (T::kCached ? slice * sizeof(uint32_t) : 0);
  const auto kernel = topk_kernel<T>;
  if (bytes > 48 << 10) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "topk");
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = T::kBlocks;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.batch * p.heads * T::kBlocks));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = T::kBlocks > 1 ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, p, slice), "topk");
}

// Blocks a row: as many as fill the GPU twice at most, and not so many that a slice is mere
// overhead. Eight is the largest portable cluster.
int blocks_a_row(const TopkParams& p, const DeviceLimits& limits) {
  if (limits.major < 9) return 1;
  constexpr int64_t kLeastSlice = 2048;
  int blocks = 8;
  while (blocks > 1 && (p.batch * p.heads * blocks > 2 * limits.multiprocessors ||
                        p.seq_len < kLeastSlice * blocks)) {
    blocks /= 2;
  }
  return blocks;
}

template <int kBlocks>
void dispatch(const TopkParams& p, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t slice = (p.seq_len + kBlocks - 1) / kBlocks;
  const int64_t room =
      limits.shared_bytes - static_cast<int64_t>(sizeof(Shared<Traits<kBlocks, true>>));
  if (slice * static_cast<int64_t>(sizeof(uint32_t)) <= room) {
    launch<Traits<kBlocks, true>>(p, slice, stream);
  } else {
    launch<Traits<kBlocks, false>>(p, slice, stream);
  }
}

}  // namespace

void topk_cuda(const TopkParams& params, void* stream) {
  const DeviceLimits& limits = device_limits();
  const auto s = static_cast<cudaStream_t>(stream);
  switch (blocks_a_row(params, limits)) {
    case 8:
      return dispatch<8>(params, limits, s);
    case 4:
      return dispatch<4>(params, limits, s);
    case 2:
      return dispatch<2>(params, limits, s);
    default:
      return dispatch<1>(params, limits, s);
  }
}

}  // namespace kvc
