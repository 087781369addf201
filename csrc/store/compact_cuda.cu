// compact_ on CUDA: in place, any number of tensors in one launch, no scratch.
//
// Unit = a column slice of the rows of one (tensor, batch row, head). Units never touch the same
// bytes. A unit belongs to a cluster of blocks (a single block where units are many, and on sm_80),
// which walks its slots in rounds of blocks * rows: in round r block j owns the slots
// [(r * blocks + j) * rows, + rows). Each thread copies the words it owns to shared memory, rounds
// ahead of the one it writes; before round r is written, a barrier of the cluster says that all its
// blocks have read the rounds up to r. A block arrives at it as soon as its reads have landed and
// waits a round later.
//
// Why no row is lost: index ascends, so index[i] >= i. (1) A slot of round r, once written, is no
// longer needed: it can be the source only of slots i <= index[i], so of rounds <= r, and the
// barrier of round r comes after all reads of those. (2) A read of a later round q > r, which may
// be under way while round r is written, finds its source untouched: index[i] >= i lies in round q
// or behind, and slots of rounds >= q are written only after the barrier of round q, which this
// read comes before. A read counts as done when its data lies in shared memory
// (cp.async.wait_group). Nothing waits for another cluster, so there is no order of blocks in which
// it could hang, whatever the index holds.
//
// A head of compact_ragged_ has a first row and a count of its own; its units walk as many rounds
// as that count asks for, and stretches of heads do not overlap. Nothing else differs.
//
// Bound: each moved row read once and written once; rows in place are skipped. Same bytes every
// run.
#include <algorithm>
#include <array>

#include "device/async.cuh"
#include "device/cluster.cuh"
#include "device/copy_rows.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "store/compact.h"

namespace kvc {
namespace {

// What a block is made of: alone, one of a pair, one of a larger cluster. The last has two stages,
// so that three blocks share a multiprocessor and clusters of 16 find room.
template <int kThreadsOf, int kWordsOf, int kStagesOf, bool kHasOthers>
struct Shape {
  static constexpr int kThreads = kThreadsOf;
  static constexpr int kWords = kWordsOf;    // of a thread in a round
  static constexpr int kStages = kStagesOf;  // rounds in shared memory, one being written
  static constexpr int kRound = kThreads * kWords;
  static constexpr int kBlocks =
      kHasOthers ? 2 : 1;  // the barriers ask only whether there are others
  static_assert(kStages * kWords <= 32, "a bit a word");
};
using Alone = Shape<512, 4, 3, false>;
using Pair = Shape<512, 4, 3, true>;
using Many = Shape<512, 4, 2, true>;
constexpr int kRound = Alone::kRound;
static_assert(kRound == Pair::kRound && kRound == Many::kRound);

constexpr int64_t kMostSlice = 1024;  // bytes: even of one byte each, its words fit a round
static_assert(kMostSlice <= kRound);
constexpr int64_t kBurst = 64;        // bytes: what memory moves at once
constexpr int64_t kLeastSlice = 32;   // bytes: what L2 moves at once
constexpr uint32_t kMostBlocks = 16;  // of a cluster
constexpr int kMostWidth = 16;
constexpr int64_t kFewRows = 2 * kRound * kMostWidth / kBurst;  // a pair's round

// How the rows of one tensor are cut.
struct Share {
  uint32_t first_unit, slices;
  int32_t slice_bytes, width;
};

struct Plan {
  Share shares[kMaxTensors];
  uint32_t units = 0;
  uint32_t blocks = 1;  // a unit
};

// What a unit works on: a head, `base` at the unit's first column.
struct Piece : CompactHead {
  int64_t stride;
  uint32_t words;  // a row

  template <typename Word>
  __device__ __forceinline__ Word* word(uint32_t row, uint32_t column) const {
    return reinterpret_cast<Word*>(base + static_cast<int64_t>(row) * stride) + column;
  }
};

template <typename S, typename Word>
__device__ __forceinline__ void compact_piece(const Piece& piece, uint32_t block, uint32_t blocks,
                                              Word* staged) {
  constexpr int kThreads = S::kThreads, kWords = S::kWords, kStages = S::kStages;
  constexpr int kBlocks = S::kBlocks;
  const uint32_t rows = kRound / piece.words;  // of a block in a round
  const uint32_t step = blocks * rows;
  // the words of this thread: what a round adds to their slots is `step`
  uint32_t slots[kWords], columns[kWords];
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const uint32_t word = j * kThreads + threadIdx.x, row = word / piece.words;
    columns[j] = word - row * piece.words;
    slots[j] = row < rows ? block * rows + row : UINT32_MAX / 2;
  }
  int32_t sources[kWords];  // of the round that is read next
  const auto look_up = [&](uint32_t first) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const uint32_t slot = first + slots[j];
      sources[j] = slot < static_cast<uint32_t>(piece.k) ? __ldg(piece.index + slot) : -1;
    }
  };
  uint32_t moving = 0;  // kWords bits a round, the newest lowest: words that move
  const auto read = [&](uint32_t first, uint32_t stage) {
    moving <<= kWords;
    Word* to = staged + stage * kRound + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (sources[j] > int64_t{first} + slots[j] && sources[j] < piece.seq_len) {
        copy_async(to + j * kThreads, piece.word<const Word>(sources[j], columns[j]));
        moving |= 1u << j;
      }
    }
    copy_async_commit();
  };
  look_up(0);
#pragma unroll
  for (int round = 0; round < kStages - 1; ++round) {
    read(round * step, round);
    look_up((round + 1) * step);
  }
  // In round r: its reads have landed, round r - 1 is written, and its stage takes the reads of the
  // next round that has none. The reads in front of a barrier have ended, so that no write can
  // reach them: it need not order memory, and no block waits for its own writes.
  uint32_t stage = 0;
  const auto k = static_cast<uint32_t>(piece.k);
  for (uint32_t first = 0; first < k + step; first += step) {
    copy_async_wait<kStages - 2>();
    const uint32_t last_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (first > 0) {
      cluster_wait<kBlocks>();  // all blocks have read round r - 1
      if (first < k) cluster_arrive_relaxed<kBlocks>();
      const Word* from = staged + last_stage * kRound + threadIdx.x;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        if (moving >> ((kStages - 1) * kWords + j) & 1) {
          *piece.word<Word>(first - step + slots[j], columns[j]) = from[j * kThreads];
        }
      }
    } else {
      cluster_arrive_relaxed<kBlocks>();
    }
    read(first + (kStages - 1) * step,
         last_stage);  // into the stage that this thread has just emptied
    look_up(first + kStages * step);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads)
    compact_kernel(const __grid_constant__ CompactParams p, const __grid_constant__ Plan plan) {
  extern __shared__ uint4 staged[];
  const uint32_t unit = blockIdx.x / plan.blocks, block = blockIdx.x - unit * plan.blocks;
  int tensor = 0;
  while (tensor + 1 < p.num_tensors && unit >= plan.shares[tensor + 1].first_unit) ++tensor;
  const Share& share = plan.shares[tensor];
  const Rows& rows = p.tensors[tensor];
  const uint32_t own = unit - share.first_unit, head = own / share.slices;
  const int32_t column = static_cast<int32_t>(own % share.slices) * share.slice_bytes;
  const int32_t bytes = min(share.slice_bytes, static_cast<int32_t>(rows.bytes) - column);
  const uint32_t words = static_cast<uint32_t>(bytes) / static_cast<uint32_t>(share.width);
  if (p.row_start != nullptr) launch_wait();
  Piece piece{compact_head(p, rows, head), rows.row_stride, words};
  piece.base += column;
  launch_wait();
  launch_dependents();
  visit_word(share.width, [&](auto word) {
    compact_piece<S>(piece, block, plan.blocks, reinterpret_cast<decltype(word)*>(staged));
  });
}

// Clusters of each size that run at once, for the widest words; of one block: blocks.
using Fitting = std::array<int, kMostBlocks + 1>;

template <typename S>
Launch launch_of(int64_t units, uint32_t blocks, int width, cudaStream_t stream) {
  Launch launch(static_cast<unsigned>(units * blocks), S::kThreads,
                static_cast<size_t>(S::kStages * kRound * width), stream);
  launch.cluster(blocks);
  return launch;
}

const Fitting& fitting_clusters() {
  return once_a_device([](int) {
    const DeviceLimits& limits = device_limits();
    Fitting fitting{};
    const int alone = Alone::kStages * kRound * kMostWidth + (1 << 10);
    fitting[1] = std::min(2, limits.shared_bytes_all / alone) * limits.multiprocessors;
    if (limits.major < 9) return fitting;
    const auto ask = [&]<typename S>(S, uint32_t blocks) {
      return launch_of<S>(limits.multiprocessors, blocks, kMostWidth, nullptr)
          .fitting_clusters("compact_", compact_kernel<S>);
    };
    fitting[2] = ask(Pair{}, 2);
    for (uint32_t blocks = 3; blocks <= kMostBlocks; ++blocks) {
      fitting[blocks] = ask(Many{}, blocks);
    }
    return fitting;
  });
}

// All units run at once, since one that waits for its turn works alone at the end. Whole rows, in
// clusters as large as that allows, move at full speed; then narrower slices. Few rows are a single
// round: pairs of blocks, or narrow slices, then cost less than a large cluster. (csrc/measured.md)
Plan make_plan(const CompactParams& p) {
  const Fitting& fitting = fitting_clusters();
  const int64_t multiprocessors = device_limits().multiprocessors;
  const auto units = [&](int64_t slice) {
    int64_t sum = 0;
    for (int i = 0; i < p.num_tensors; ++i) sum += (p.tensors[i].bytes + slice - 1) / slice;
    return sum * p.batch * p.heads;
  };
  const auto fits = [&](int64_t slice, uint32_t blocks) { return units(slice) <= fitting[blocks]; };
  const int64_t k = p.row_start == nullptr ? p.k : p.k / (p.batch * p.heads);  // of a mean head
  Plan plan;
  int64_t slice = kMostSlice;
  const bool few = k <= kFewRows;
  if (few && fits(kBurst, 2) && 2 * units(kBurst) <= multiprocessors) {
    plan.blocks = 2;
    slice = kBurst;
  } else {
    while (plan.blocks < kMostBlocks && fits(slice, plan.blocks + 1)) ++plan.blocks;
    const int64_t least = few ? kLeastSlice : kBurst;
    while (slice > least && fits(slice / 2, plan.blocks)) slice /= 2;
  }
  while (slice > kLeastSlice && 2 * units(slice / 2) * plan.blocks <= multiprocessors) slice /= 2;
  for (int i = 0; i < p.num_tensors; ++i) {
    const int64_t bytes = p.tensors[i].bytes, own = std::min(slice, bytes);
    const int64_t slices = (bytes + own - 1) / own;
    plan.shares[i] = {.first_unit = plan.units,
                      .slices = static_cast<uint32_t>(slices),
                      .slice_bytes = static_cast<int32_t>(own),
                      .width = static_cast<int32_t>(access_width(p.tensors[i]))};
    plan.units += static_cast<uint32_t>(p.batch * p.heads * slices);
  }
  return plan;
}

template <typename S>
void launch(const CompactParams& p, const Plan& plan, cudaStream_t stream) {
  int width = 1;
  for (int i = 0; i < p.num_tensors; ++i) width = std::max(width, plan.shares[i].width);
  launch_of<S>(plan.units, plan.blocks, width, stream)
      .early(device_limits().major >= 9)("compact_", compact_kernel<S>, p, plan);
}

}  // namespace

void compact_cuda(const CompactParams& params, void* stream) {
  const Plan plan = make_plan(params);
  const auto s = static_cast<cudaStream_t>(stream);
  if (plan.blocks == 1) return launch<Alone>(params, plan, s);
  if (plan.blocks == 2) return launch<Pair>(params, plan, s);
  launch<Many>(params, plan, s);
}

}  // namespace kvc
