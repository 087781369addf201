// topk of a few long rows in more blocks than a cluster has, and without clusters (sm_80): the same
// parts as in topk_once_cuda.cu, cut in two launches where the cluster has its barrier. The first
// guesses the cut and gathers; the second reads the counts and candidates of all blocks of its row
// from memory, settles and writes. Where the cut was not good enough, which is rare, one block does
// the whole row anew.
//
// Bound: as in topk_once_cuda.cu, and a second launch. Scratch: of a slice its bits, and as many
// candidates as it can have.
#include <algorithm>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "select/topk_row.cuh"
#include "select/topk_split.h"
#include "select/topk_task.cuh"

namespace kvc {
namespace {

// Samples of a row, and candidates that they may leave; the second where the first is too little.
constexpr int kSampleSizes[] = {1024, 8192};
constexpr double kMostCandidates[] = {6144, 16384};

// What a block of the first launch leaves.
struct alignas(16) Header {
  Counts counts;
  Cut cut;
};

// How the scratch is divided, `blocks` of each kind a row.
struct Stored {
  Header* headers;
  uint32_t *candidates, *codes;  // room for `listed` a block
  uint32_t* slices;              // `words` a block
  uint32_t blocks, listed, words, capacity;

  static constexpr int64_t bytes(int64_t all_blocks, uint32_t listed, uint32_t words) {
    return all_blocks *
           (static_cast<int64_t>(sizeof(Header)) + 8 * int64_t{listed} + 4 * int64_t{words});
  }
  // Pointers of one row.
  __device__ __forceinline__ Stored of(uint32_t row) const {
    const int64_t first = int64_t{row} * blocks;
    return {headers + first,
            candidates + first * listed,
            codes + first * listed,
            slices + first * words,
            blocks,
            listed,
            words,
            capacity};
  }
};

struct StoredPeers {
  static constexpr bool kMustCopy = true;
  Stored row;

  __device__ __forceinline__ uint32_t blocks() const { return row.blocks; }
  __device__ __forceinline__ Counts counts(uint32_t block) const {
    return row.headers[block].counts;
  }
  // The i-th candidate of the row, if there is one; for whole warps.
  __device__ __forceinline__ uint32_t candidate(uint32_t i, uint32_t count, uint32_t start) const {
    uint32_t block = 0;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const uint32_t later = __shfl_sync(0xffffffffu, start, block + step);
      if (block + step < row.blocks && later <= i) block += step;
    }
    const uint32_t first = __shfl_sync(0xffffffffu, start, block);
    return i < count ? row.candidates[block * row.listed + i - first] : 0;
  }
  __device__ __forceinline__ void leave() const {}
};

using Settling = TopkTraits<1, 512, true>;

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 2)
    topk_gather_kernel(const __grid_constant__ TopkParams p, const __grid_constant__ Stored all) {
  extern __shared__ uint4 dynamic[];
  auto& shared = *reinterpret_cast<TopkShared<T>*>(dynamic);
  const Lists lists = TopkLayout<T>::lists(shared, all.words, all.capacity);
  start(shared);
  launch_wait();
  launch_dependents();

  const uint32_t block = blockIdx.x % all.blocks, row_id = blockIdx.x / all.blocks;
  const Task task = find_task<T>(shared.warp_above, p, row_id, false);
  if (!task.has_choice()) return;
  const Sample<T> sample(task.scores + task.begin, task.free);
  const Groups groups =
      Groups::make(task.scores, task.begin, task.begin + task.free, block, all.blocks);
  groups.slice(block, all.blocks).prefetch<T::kThreads>();
  __syncthreads();  // shared memory is ready
  const Cut cut = guess_cut(shared.radix, shared.sample, sample, task.wanted, task.free);
  gather<T>(shared.counts, lists, groups, cut);
  __syncthreads();

  const Stored row = all.of(row_id);
  if (threadIdx.x == 0) row.headers[block] = {shared.counts, cut};
  const uint32_t candidates = min(shared.counts.inside, all.capacity);
  for (uint32_t j = threadIdx.x; j < candidates; j += T::kThreads) {
    row.candidates[block * row.listed + j] = lists.own[j];
    row.codes[block * row.listed + j] = lists.codes[j];
  }
  for (uint32_t word = threadIdx.x; word < groups.count * kWarp; word += T::kThreads) {
    row.slices[block * row.words + word] = lists.words[word];
  }
}

__global__ void __launch_bounds__(Settling::kThreads, 2)
    topk_settle_kernel(const __grid_constant__ TopkParams p, const __grid_constant__ Stored all) {
  using T = Settling;
  using Alone = TopkTraits<1, T::kThreads, false>;
  extern __shared__ uint4 dynamic[];
  auto& shared = *reinterpret_cast<TopkShared<T>*>(dynamic);
  const Lists lists = TopkLayout<T>::lists(shared, all.words, all.capacity);
  start(shared);
  launch_wait();
  launch_dependents();

  const uint32_t block = blockIdx.x % all.blocks, row_id = blockIdx.x / all.blocks;
  const Task task = find_task<T>(shared.warp_above, p, row_id, block == 0);
  task.write_forced<T>(block, all.blocks);
  if (!task.has_choice()) return;
  const uint32_t begin = task.begin, end = begin + task.free, wanted = task.wanted;
  const int32_t offset = Slice::offset_of(task.scores);
  int32_t* out = task.out + task.sink;
  const Groups groups = Groups::make(task.scores, begin, end, block, all.blocks);
  const StoredPeers peers{all.of(row_id)};
  const Stored& row = peers.row;
  for (uint32_t word = threadIdx.x; word < groups.count * kWarp; word += T::kThreads) {
    lists.words[word] = row.slices[block * row.words + word];
  }
  const Totals& totals = add_up(shared, peers, block);
  const Header& header = row.headers[block];
  const Cut cut = header.cut;
  const Where where = locate(totals.all, cut, wanted, all.capacity);
  __syncthreads();  // shared memory is ready
  if (where != Where::kMissed) {
    const uint32_t own = min(header.counts.inside, all.capacity);
    for (uint32_t j = threadIdx.x; j < own; j += T::kThreads) {
      lists.codes[j] = row.codes[block * row.listed + j];
    }
    const Settled settled = settle(shared, lists, peers, groups, cut, totals, where, wanted, own);
    write_positions<true>(shared, lists, groups, settled, offset, out);
  } else if (block == 0) {
    auto& alone = *reinterpret_cast<TopkShared<Alone>*>(dynamic);
    const Groups whole = Groups::make(task.scores, begin, end, 0, 1);
    const Open open = still_open(totals.all, cut, wanted);
    __syncthreads();  // all threads have read the totals
    clear_bins(alone.radix);
    if (threadIdx.x == 0) reset(alone.counts);
    __syncthreads();
    const Settled settled = select(alone, lists, whole, false, {}, open, wanted, 0);
    write_positions<false>(alone, lists, whole, settled, offset, out);
  }
}

// Blocks a row: as many as have a multiprocessor each, in slices that are more than overhead.
uint32_t blocks_a_row(const TopkParams& p, const DeviceLimits& limits) {
  int64_t blocks = kWarp;
  while (blocks > 1 &&
         (blocks * p.batch * p.heads > limits.multiprocessors || p.seq_len < 2048 * blocks)) {
    blocks /= 2;
  }
  return static_cast<uint32_t>(blocks);
}

struct Sizes {
  uint32_t blocks, listed, words, capacity;
  bool is_large;  // the second of kSampleSizes
};

// One block a row where this form does not pay, or too much competes for it.
Sizes sizes(const TopkParams& p) {
  const DeviceLimits& limits = device_limits();
  const uint32_t blocks = blocks_a_row(p, limits);
  if (blocks == 1) return {.blocks = 1};
  // two groups more than whole ones: the first and the last may be cut
  const int64_t groups = (p.seq_len / kGroupSize + 2 + blocks - 1) / blocks;
  const auto words = static_cast<uint32_t>(std::min<int64_t>(groups * kWarp, 1 << 20));
  const auto size = static_cast<double>(p.seq_len);
  const double wanted = p.indptr != nullptr ? size / 2 : static_cast<double>(p.k);
  for (int i = 0; i < 2; ++i) {
    const double most = most_candidates(size, wanted, kSampleSizes[i]);
    if (most > kMostCandidates[i]) continue;
    const uint32_t capacity = candidate_room(most);
    if (static_cast<int64_t>(TopkLayout<Settling>::bytes(words, capacity)) <= limits.shared_bytes) {
      const auto listed = static_cast<uint32_t>(std::min<int64_t>(capacity, groups * kGroupSize));
      return {blocks, listed, words, capacity, i == 1};
    }
  }
  return {.blocks = 1};
}

}  // namespace

int64_t topk_split_scratch(const TopkParams& p) {
  const Sizes s = sizes(p);
  return s.blocks > 1 ? Stored::bytes(p.batch * p.heads * s.blocks, s.listed, s.words) : 0;
}

void topk_split(const TopkParams& p, cudaStream_t stream) {
  const Sizes s = sizes(p);
  const int64_t blocks = p.batch * p.heads * s.blocks;
  Stored all{.blocks = s.blocks, .listed = s.listed, .words = s.words, .capacity = s.capacity};
  all.headers = static_cast<Header*>(p.scratch);
  all.candidates = reinterpret_cast<uint32_t*>(all.headers + blocks);
  all.codes = all.candidates + blocks * s.listed;
  all.slices = all.codes + blocks * s.listed;
  Launch launch(static_cast<unsigned>(blocks), Settling::kThreads,
                TopkLayout<Settling>::bytes(s.words, s.capacity), stream);
  launch.early(device_limits().major >= 9);
  launch("topk",
         s.is_large ? topk_gather_kernel<TopkTraits<1, 512, true, kSampleSizes[1]>>
                    : topk_gather_kernel<TopkTraits<1, 512, true, kSampleSizes[0]>>,
         p, all);
  launch("topk", topk_settle_kernel, p, all);
}

}  // namespace kvc
