// topk on CUDA: one launch, a cluster of kBlocks blocks a row (a single block on sm_80, and where
// rows are many). Short rows stay in registers: topk_short_cuda.cu. Long slices are read once
// instead of twice: topk_once_cuda.cu. A few rows too long for a cluster, or long ones without
// clusters: topk_split_cuda.cu.
//
// Forced entries and padding are stretches of positions, so only the free entries between sink and
// window compete; each block owns a slice of them. A score becomes a uint32 key that orders as the
// scores do.
// 1. Histogram of the keys in kBins bins, by integer atomics in shared memory: the same counts
// every
//    run. The bins are spread over the keys that a sample of the row has (select/row_sample.cuh):
//    scores that lie close together are told apart as well as any others, and what lies outside
//    counts in the first and last bin. Each block pushes sums of 32 bins to every other block, a
//    cluster barrier, then all of them find the bin of the n-th largest key: 32 bins at a time, so
//    that only 32 words a block cross the cluster. The bin is clipped to the range of the keys that
//    are there. Repeated, over what is open, while it holds more than kCandidates keys of different
//    values, which is rare; equal ones need no second look.
// 2. The slice is read again, from L1 or L2: bits say which entries lie above the bin; the keys
//    inside, the candidates, are pushed to all blocks. Second and last barrier: every block
//    finds the threshold among all candidates by itself.
// 3. Bits become positions: counts of the blocks, warps and words before give each word its slots,
//    ties go to the smallest positions.
// The result does not depend on the sample.
// Bound: 4 bytes a score read once from memory, 4 bytes a kept entry written once; below about
// 10 MB the latency of one read, two cluster barriers and about 20 block barriers. No scratch.
#include <algorithm>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "select/row_sample.cuh"
#include "select/slice_bits.cuh"
#include "select/topk.h"
#include "select/topk_once.h"
#include "select/topk_short.h"
#include "select/topk_split.h"
#include "select/topk_task.cuh"

namespace kvc {
namespace {

constexpr int kCandidates = 6144;  // most keys that are passed round

template <int kBlocks_, int kThreads_, bool kHasBits_>
struct Traits {
  static constexpr int kBlocks = kBlocks_;  // of a cluster
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr bool kHasBits = kHasBits_;  // fit shared memory; else keys are read a third time
  static constexpr int kSamples = kThreads;    // of a row
};

template <typename T>
struct Shared {
  static constexpr int kWarps = T::kWarps;
  RadixBins<T> radix;
  SampleRange sample;
  uint32_t few[kWarp];                 // open candidates, when they are few
  uint32_t candidates, fews;           // of this block
  uint32_t above_before, tied_before;  // candidates of earlier blocks, against the threshold
  uint32_t warp_above[kWarps], warp_tied[kWarps];
  union {
    struct {
      uint32_t keys[kCandidates];       // candidates of all blocks, block after block
      uint32_t positions[kCandidates];  // of this block's
    };
    uint16_t staged[kWarps][kGroup];  // positions on their way out, counted from a group's first
  };
};

// 2. Bits of what lies above the open bin; what is inside becomes a candidate, or is tied if all of
// it is equal.
template <typename T>
__device__ __forceinline__ void mark_slice(Shared<T>& shared, const SliceBits<T::kHasBits>& bits,
                                           const Slice& slice, const Found& found) {
  const bool is_exact = found.open.width == 0;
  slice.for_each<T::kWarps, true>([&](uint32_t chunk, const uint32_t (&keys)[4], auto) {
    uint32_t above = 0, open = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      above |= static_cast<uint32_t>(keys[j] > found.open.low + found.open.width) << j;
      open |= static_cast<uint32_t>(found.open.holds(keys[j])) << j;
    }
    if constexpr (T::kHasBits) bits.set(chunk, join_bits(above), is_exact ? join_bits(open) : 0);
    if (!is_exact && open != 0) {
      uint32_t slot = atomicAdd(&shared.candidates, __popc(open));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (open >> j & 1) {
          shared.keys[found.before + slot] = keys[j];
          shared.positions[slot++] = chunk * kChunk + 4 * (threadIdx.x % kWarp) + j;
        }
      }
    }
  });
}

// This block's candidates to the lists of all others.
template <typename T>
__device__ __forceinline__ void share_candidates(Shared<T>& shared, const Found& found,
                                                 uint32_t block) {
  if constexpr (T::kBlocks > 1) {
    for (uint32_t j = threadIdx.x; j < shared.candidates; j += T::kThreads) {
      uint32_t* slot = shared.keys + found.before + j;
      const uint32_t key = *slot;
#pragma unroll
      for (uint32_t other = 0; other < T::kBlocks; ++other) {
        if (other != block) cluster_store<T::kBlocks>(slot, other, key);
      }
    }
  }
}

// The threshold among the candidates of all blocks, found by each block alone.
template <typename T>
__device__ __forceinline__ Open pick_candidate(Shared<T>& shared, const Found& found) {
  Open open = found.open;
  for (uint32_t count = found.count; open.width > 0;) {
    if (count <= kWarp) {
      for (uint32_t j = threadIdx.x; j < found.count; j += T::kThreads) {
        const uint32_t key = shared.keys[j];
        if (open.holds(key)) shared.few[atomicAdd(&shared.fews, 1u)] = key;
      }
      __syncthreads();
      return pick_of_few(shared.few, count, open.rank);
    }
    clear_bins(shared.radix);
    __syncthreads();
    Counter counter(open);
    for (uint32_t j = threadIdx.x; j < found.count; j += T::kThreads) {
      counter.count(shared.radix.bins, shared.keys[j]);
    }
    counter.finish(shared.radix.range);
    const Found next = narrow<1>(shared.radix, open, 0);
    open = next.open;
    count = next.count;
  }
  return open;
}

// Sets the bits of this block's candidates; returns how many of earlier blocks lie above the
// threshold and how many equal it.
template <typename T>
__device__ __forceinline__ uint2 settle_candidates(Shared<T>& shared,
                                                   const SliceBits<T::kHasBits>& bits,
                                                   const Found& found, uint32_t threshold) {
  for (uint32_t j = threadIdx.x; j < found.before; j += T::kThreads) {
    const uint32_t key = shared.keys[j];
    if (key > threshold) atomicAdd(&shared.above_before, 1u);
    if (key == threshold) atomicAdd(&shared.tied_before, 1u);
  }
  if constexpr (T::kHasBits) {
    for (uint32_t j = threadIdx.x; j < shared.candidates; j += T::kThreads) {
      const uint32_t key = shared.keys[found.before + j], at = shared.positions[j];
      if (key > threshold) atomicOr(bits.above + at / 32, 1u << at % 32);
      if (key == threshold) atomicOr(bits.tied + at / 32, 1u << at % 32);
    }
  }
  __syncthreads();
  return make_uint2(shared.above_before, shared.tied_before);
}

// 3. Each warp counts its stretch of words, then writes its positions; `before` counts what lies
// above the threshold and what equals it in earlier blocks.
template <typename T>
__device__ __forceinline__ void write_positions(Shared<T>& shared,
                                                const SliceBits<T::kHasBits>& bits,
                                                const Slice& slice, const Open& found, uint2 before,
                                                int32_t offset, int32_t* out) {
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t threshold = found.low, ties = found.rank;
  const uint32_t words = slice.chunks * (kChunk / 32);
  const uint32_t stretch = (slice.chunks + T::kWarps - 1) / T::kWarps * (kChunk / 32);
  const uint32_t first = min(warp * stretch, words), last = min(first + stretch, words);
  uint32_t above = 0, tied = 0;
  for (uint32_t word = first; word < last; word += kWarp) {
    const uint2 mine = group_bits(slice, bits, threshold, word, last);
    above += __popc(mine.x);
    tied += __popc(mine.y);
  }
  above = __reduce_add_sync(0xffffffffu, above);
  tied = __reduce_add_sync(0xffffffffu, tied);
  if (lane == 0) {
    shared.warp_above[warp] = above;
    shared.warp_tied[warp] = tied;
  }
  __syncthreads();
  before.x += __reduce_add_sync(0xffffffffu, lane < warp ? shared.warp_above[lane] : 0);
  before.y += __reduce_add_sync(0xffffffffu, lane < warp ? shared.warp_tied[lane] : 0);
  out += before.x + min(before.y, ties);
  for (uint32_t word = first; word < last; word += kWarp) {
    const uint2 mine = group_bits(slice, bits, threshold, word, last);
    const uint32_t base = slice.first_chunk * kChunk + word * 32 - offset;
    out += write_group(shared.staged[warp], mine, ties, before.y, base, out);
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1024 / T::kThreads)
    topk_kernel(const __grid_constant__ TopkParams p, uint32_t words) {
  constexpr int kBlocks = T::kBlocks;
  extern __shared__ uint4 dynamic[];
  auto& shared = *reinterpret_cast<Shared<T>*>(dynamic);
  const SliceBits<T::kHasBits> bits{reinterpret_cast<uint32_t*>(&shared + 1),
                                    reinterpret_cast<uint32_t*>(&shared + 1) + words};

  clear_bins(shared.radix);
  if (threadIdx.x == 0) {
    reset(shared.sample);
    shared.candidates = shared.fews = shared.above_before = shared.tied_before = 0;
  }
  launch_wait();
  launch_dependents();

  // who am I, and what is there to choose
  const uint32_t block = blockIdx.x % kBlocks, row_id = blockIdx.x / kBlocks;
  const Task task = find_task<T>(shared.warp_above, p, row_id, block == 0);
  if (!task.has_choice()) return task.write_forced<T>(block, kBlocks);  // all blocks alike
  cluster_arrive_relaxed<kBlocks>();  // this block runs: its shared memory may be written to

  const uint32_t begin = task.begin, free = task.free, wanted = task.wanted;
  const Sample<T> sample(task.scores + begin, free);
  const Slice slice = Slice::make(task.scores, begin, begin + free, block, kBlocks);
  slice.prefetch<T::kThreads>();

  // 1. the bin of the threshold
  __syncthreads();
  const Open range = find_open(shared.sample, sample, wanted, free);
  count_slice(shared.radix, slice, RangeCounter(range));
  cluster_wait<kBlocks>();
  Found found = narrow<kBlocks, true>(shared.radix, range, block);
  uint32_t above_before = found.above_before;  // in earlier blocks
  while (found.open.width > 0 && found.count > kCandidates) {
    cluster_sync<kBlocks>();  // all blocks have read these bins
    clear_bins(shared.radix);
    __syncthreads();
    count_slice(shared.radix, slice, Counter(found.open));
    found = narrow<kBlocks>(shared.radix, found.open, block);
    above_before += found.above_before;
  }
  const bool is_exact = found.open.width == 0;  // all open keys are equal: the threshold is known

  mark_slice(shared, bits, slice, found);
  __syncthreads();
  if (!is_exact) share_candidates(shared, found, block);
  if constexpr (kBlocks > 1) cluster_sync<kBlocks>();  // from here on each block is by itself
  const Open threshold = pick_candidate(shared, found);
  uint2 before = make_uint2(above_before, is_exact ? found.before : 0);
  if (!is_exact) {
    const uint2 candidates = settle_candidates(shared, bits, found, threshold.low);
    before.x += candidates.x;
    before.y += candidates.y;
  }
  task.write_forced<T>(block, kBlocks);
  write_positions(shared, bits, slice, threshold, before, Slice::offset_of(task.scores),
                  task.out + task.sink);
}

template <typename T>
void launch(const TopkParams& p, uint32_t words, const DeviceLimits& limits, cudaStream_t stream) {
  const size_t bytes = sizeof(Shared<T>) + (T::kHasBits ? size_t{2} * words * sizeof(uint32_t) : 0);
  const auto blocks = static_cast<unsigned>(p.batch * p.heads * T::kBlocks);
  Launch(blocks, T::kThreads, bytes, stream)
      .cluster(T::kBlocks)
      .early(limits.major >= 9)("topk", topk_kernel<T>, p, words);
}

// Entries of a block that has a multiprocessor to itself from which on 1024 threads beat 512.
constexpr int64_t kLongSlice = 40000;

template <int kBlocks>
void dispatch(const TopkParams& p, const DeviceLimits& limits, cudaStream_t stream) {
  // two chunks more than whole ones: the first and the last may be cut
  const int64_t chunks = (p.seq_len / kChunk + 2 + kBlocks - 1) / kBlocks;
  const int64_t words = chunks * (kChunk / 32);
  const int64_t room =
      limits.shared_bytes - static_cast<int64_t>(sizeof(Shared<Traits<kBlocks, 1024, true>>));
  if (2 * words * static_cast<int64_t>(sizeof(uint32_t)) > room) {
    if constexpr (kBlocks == 1 || kBlocks == 8) {
      return launch<Traits<kBlocks, 1024, false>>(p, 0, limits, stream);
    } else {
      return dispatch<8>(p, limits, stream);
    }
  }
  const bool is_alone = p.batch * p.heads * kBlocks <= limits.multiprocessors;
  if (is_alone && chunks * kChunk >= kLongSlice) {
    launch<Traits<kBlocks, 1024, true>>(p, static_cast<uint32_t>(words), limits, stream);
  } else {
    launch<Traits<kBlocks, 512, true>>(p, static_cast<uint32_t>(words), limits, stream);
  }
}

// Blocks a row: as many as have a multiprocessor each; where they fill the GPU, the slices must be
// longer to pay for the barriers. Eight is the largest portable cluster.
int blocks_a_row(const TopkParams& p, const DeviceLimits& limits) {
  if (limits.major < 9) return 1;
  const int64_t rows = p.batch * p.heads;
  int blocks = 8;
  for (; blocks > 1; blocks /= 2) {
    const bool fills = 2 * rows * blocks > limits.multiprocessors;
    if (rows * blocks <= limits.multiprocessors && (!fills || p.seq_len >= 8192 * blocks)) break;
  }
  return blocks;
}

// Entries of a multiprocessor, one cluster after the other, from which on blocks beyond clusters
// pay for a second launch: 4 rows of 512k, 64k a block, take 21.8 us in clusters and 21.5 in two
// launches, of 1M 37.7 and 27.1; 8 of 800k, 100k a block, 34.9 and 33.0; 16 of 512k, whose clusters
// do not all run at once, 44.5 and 37.1.
constexpr int64_t kLongShare = 100'000;

bool split_pays(const TopkParams& p, const DeviceLimits& limits) {
  const int64_t rows = p.batch * p.heads;
  if (4 * rows > limits.multiprocessors) return false;
  if (limits.major < 9) return p.seq_len >= 32768;
  const int blocks = blocks_a_row(p, limits);
  const int64_t at_once = lonely_clusters(blocks), rounds = (rows + at_once - 1) / at_once;
  return rounds * p.seq_len / blocks >= kLongShare;
}

}  // namespace

int64_t topk_cuda_scratch(const TopkParams& params) {
  const bool is_split = !topk_short_pays(params) && split_pays(params, device_limits());
  return is_split ? topk_split_scratch(params) : 0;
}

void topk_cuda(const TopkParams& params, void* stream) {
  const DeviceLimits& limits = device_limits();
  const auto s = static_cast<cudaStream_t>(stream);
  if (topk_short_pays(params)) return topk_short(params, s);
  if (params.scratch != nullptr) return topk_split(params, s);
  const int blocks = blocks_a_row(params, limits);
  if (topk_once_pays(params, blocks)) return topk_once(params, blocks, s);
  switch (blocks) {
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
