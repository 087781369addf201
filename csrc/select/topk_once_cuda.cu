// topk of long slices: scores are read once. As in topk_cuda.cu a cluster of kBlocks blocks has a
// row, or a single block, and each owns a slice of the entries that compete.
// 1. A sample of the row, the same in every block, tells a cut: two keys between which the
//    threshold lies, with few entries between them (select/sample_cut.cuh).
// 2. Every score is compared with the cut, an addition and a shift for each end and bit: what has
//    reached the upper end, what equals an end; entries in between, the candidates, go to a list. A
//    barrier, then every block fetches the counts and candidates of the others.
// 3. Every block finds the threshold among all candidates by itself. If the cut missed it, or holds
//    too many, a histogram makes a better one and step 2 is done again. Values that many entries
//    share end a cut, so equal scores need no second look.
// 4. Bits become positions: counts of the blocks, warps and words before give each lane its slots,
//    ties go to the smallest positions.
// The result does not depend on the sample.
// Bound: 4 bytes a score read from memory once, and about eight instructions a score. No scratch.
#include <array>
#include <bit>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "select/topk_once.h"
#include "select/topk_row.cuh"
#include "select/topk_task.cuh"

namespace kvc {
namespace {

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1024 / T::kThreads)
    topk_once_kernel(const __grid_constant__ TopkParams p, uint32_t words, uint32_t capacity) {
  constexpr int kBlocks = T::kBlocks;
  extern __shared__ uint4 dynamic[];
  auto& shared = *reinterpret_cast<TopkShared<T>*>(dynamic);
  const Lists lists = TopkLayout<T>::lists(shared, words, capacity);
  start(shared);
  launch_wait();
  launch_dependents();

  // who am I, and what is there to choose
  const uint32_t block = blockIdx.x % kBlocks, row_id = blockIdx.x / kBlocks;
  const Task task = find_task<T>(shared.warp_above, p, row_id, block == 0);
  if (!task.has_choice()) return task.write_forced<T>(block, kBlocks);  // all blocks alike

  const Sample<T> sample(task.scores + task.begin, task.free);
  const Groups groups =
      Groups::make(task.scores, task.begin, task.begin + task.free, block, kBlocks);
  groups.slice(block, kBlocks).template prefetch<T::kThreads>();
  __syncthreads();  // shared memory is ready
  const Cut cut = guess_cut(shared.radix, shared.sample, sample, task.wanted, task.free);
  const Settled settled = select(shared, lists, groups, true, cut, {}, task.wanted, block);
  task.write_forced<T>(block, kBlocks);
  write_positions<T::kHasWords>(shared, lists, groups, settled, Slice::offset_of(task.scores),
                                task.out + task.sink);
  if constexpr (kBlocks > 1) cluster_wait<kBlocks>();  // the others may still read from here
}

// Entries of a slice from which on one read and what it costs to find the cut beat two reads, where
// a block has a multiprocessor to itself. Two blocks hide each other's waits: 256 x 128k took 104
// us this way and 94 with two reads.
constexpr int64_t kLongSlice = 40000;

uint32_t words_of(const TopkParams& p, int blocks) {
  // two groups more than whole ones: the first and the last may be cut
  const int64_t groups = (p.seq_len / kGroupSize + 2 + blocks - 1) / blocks;
  return static_cast<uint32_t>(std::min<int64_t>(groups * kWarp, 1 << 20));
}

template <int kBlocks>
using Traits = TopkTraits<kBlocks, 1024, true>;

double candidates_of(const TopkParams& p) {
  const auto size = static_cast<double>(p.seq_len);
  const double wanted = p.indptr != nullptr ? size / 2 : static_cast<double>(p.k);
  return most_candidates(size, wanted, Traits<8>::kSamples);
}

// Candidates of a row with which one read beats two; each block lists its own. 8 x 512k, 11,300 in
// eight blocks: 24.4 us against 26.4; 64 x 128k and k 4096, 10,000 in two: 32.6 against 30.3.
constexpr double most_that_pay(int blocks) {
  return blocks == 8 ? 12288 : 6144;
}

template <int kBlocks>
void launch(const TopkParams& p, cudaStream_t stream) {
  using T = Traits<kBlocks>;
  const uint32_t words = words_of(p, kBlocks);
  const uint32_t capacity = candidate_room(candidates_of(p));
  const auto blocks = static_cast<unsigned>(p.batch * p.heads * kBlocks);
  Launch(blocks, T::kThreads, TopkLayout<T>::bytes(words, capacity), stream)
      .cluster(kBlocks)
      .early(device_limits().major >= 9)("topk", topk_once_kernel<T>, p, words, capacity);
}

}  // namespace

bool topk_once_pays(const TopkParams& p, int blocks) {
  const DeviceLimits& limits = device_limits();
  const double most = candidates_of(p);
  if (most > most_that_pay(blocks)) return false;
  const size_t bytes = TopkLayout<Traits<8>>::bytes(words_of(p, blocks), candidate_room(most));
  return p.seq_len >= kLongSlice * blocks && p.batch * p.heads * blocks <= limits.multiprocessors &&
         static_cast<int64_t>(bytes) <= limits.shared_bytes;
}

int lonely_clusters(int blocks) {
  const auto& fitting = once_a_device([](int) {
    const DeviceLimits& limits = device_limits();
    const auto ask = [&](auto traits) {
      using T = decltype(traits);
      const int clusters = Launch(T::kBlocks, T::kThreads, limits.shared_bytes, nullptr)
                               .cluster(T::kBlocks)
                               .fitting_clusters("topk", topk_once_kernel<T>);
      return std::max(clusters, 1);
    };
    return std::array{limits.multiprocessors, ask(Traits<2>{}), ask(Traits<4>{}), ask(Traits<8>{})};
  });
  return fitting[std::bit_width(static_cast<unsigned>(blocks)) - 1];
}

void topk_once(const TopkParams& params, int blocks, cudaStream_t stream) {
  switch (blocks) {
    case 8:
      return launch<8>(params, stream);
    case 4:
      return launch<4>(params, stream);
    case 2:
      return launch<2>(params, stream);
    default:
      return launch<1>(params, stream);
  }
}

}  // namespace kvc
