// compact_ on CUDA: in place, any number of tensors in one launch, no scratch.
//
// Unit = a column slice of the rows of one (tensor, batch row, head). Units never touch the same
// bytes. A unit belongs to a cluster of kBlocks blocks (a single block where units are many, and on
// sm_80), which walks its slots in rounds of kBlocks * rows: in round r block j owns the slots
// [(r * kBlocks + j) * rows, + rows). Each thread copies the words it owns to shared memory, rounds
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
// Bound: each moved row read once and written once; rows in place are skipped. Same bytes every
// run.
#include <algorithm>

#include "device/async.cuh"
#include "device/cluster.cuh"
#include "device/copy_rows.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "store/compact.h"

namespace kvc {
namespace {

constexpr int kThreads = 512;
constexpr int kWords = 4;   // of a thread in a round
constexpr int kStages = 3;  // rounds in shared memory: one being written, two being read
constexpr int kBlocksPerSm = 2;
static_assert(kStages * kWords <= 32, "a bit a word");
constexpr int64_t kMostSlice = 1024;  // bytes: even of one byte each, its words fit a round
constexpr int64_t kLeastSlice = 32;   // what one L2 access moves
constexpr int64_t kFewRows = 4096;    // largest k that may do without a cluster
static_assert(kMostSlice <= kThreads * kWords);

// How the rows of one tensor are cut.
struct Share {
  uint32_t first_unit, slices;
  int32_t slice_bytes, width;
};

struct Plan {
  Share shares[kMaxTensors];
  uint32_t units = 0;
  int blocks = 1;  // a unit
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

template <int kBlocks, typename Word>
__device__ __forceinline__ void compact_piece(const Piece& piece, uint32_t block, Word* staged) {
  const uint32_t rows = kThreads * kWords / piece.words;  // of a block in a round
  const uint32_t step = kBlocks * rows;
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
    Word* to = staged + stage * (kThreads * kWords) + threadIdx.x;
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
  // In round r: its reads have landed, those of round r + 1 are under way, round r - 1 is written,
  // r + 2 is asked for. The reads in front of a barrier have ended, so that no write can reach
  // them: it need not order memory, and no block waits for its own writes.
  uint32_t stage = 0;
  const auto k = static_cast<uint32_t>(piece.k);
  for (uint32_t first = 0; first < k + step; first += step) {
    copy_async_wait<kStages - 2>();
    const uint32_t last_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (first > 0) {
      cluster_wait<kBlocks>();  // all blocks have read round r - 1
      if (first < k) cluster_arrive_relaxed<kBlocks>();
      const Word* from = staged + last_stage * (kThreads * kWords) + threadIdx.x;
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

template <int kBlocks>
__global__ void __launch_bounds__(kThreads)
    compact_kernel(const __grid_constant__ CompactParams p, const __grid_constant__ Plan plan) {
  extern __shared__ uint4 staged[];
  const uint32_t block = blockIdx.x % kBlocks, unit = blockIdx.x / kBlocks;
  int tensor = 0;
  while (tensor + 1 < p.num_tensors && unit >= plan.shares[tensor + 1].first_unit) ++tensor;
  const Share& share = plan.shares[tensor];
  const Rows& rows = p.tensors[tensor];
  const uint32_t own = unit - share.first_unit, head = own / share.slices;
  const int32_t column = static_cast<int32_t>(own % share.slices) * share.slice_bytes;
  const int32_t bytes = min(share.slice_bytes, static_cast<int32_t>(rows.bytes) - column);
  const uint32_t words = static_cast<uint32_t>(bytes) / static_cast<uint32_t>(share.width);
  launch_wait();
  launch_dependents();
  Piece piece{compact_head(p, rows, head), rows.row_stride, words};
  piece.base += column;
  visit_word(share.width, [&](auto word) {
    compact_piece<kBlocks>(piece, block, reinterpret_cast<decltype(word)*>(staged));
  });
}

// As many blocks as run at once: larger clusters first, for wide rows move at full speed, then
// narrower slices. Where rows are few and units too, a round or two are all there is: slices of one
// sector then cost less than the barrier of a cluster (csrc/measured.md).
Plan make_plan(const CompactParams& p, const DeviceLimits& limits, int most_blocks, int64_t most) {
  Plan plan;
  const int64_t wanted = kBlocksPerSm * limits.multiprocessors;
  const auto units = [&](int64_t slice) {
    int64_t sum = 0;
    for (int i = 0; i < p.num_tensors; ++i) sum += (p.tensors[i].bytes + slice - 1) / slice;
    return sum * p.batch * p.heads;
  };
  const int64_t k = p.row_start == nullptr ? p.k : p.k / (p.batch * p.heads);  // of a mean head
  if (k <= kFewRows && units(most) < limits.multiprocessors / 2) most_blocks = 1;
  while (plan.blocks < most_blocks && units(most) * plan.blocks * 2 <= wanted) plan.blocks *= 2;
  while (most > kLeastSlice && units(most / 2) * plan.blocks <= wanted) most /= 2;
  for (int i = 0; i < p.num_tensors; ++i) {
    const int64_t bytes = p.tensors[i].bytes, slice = std::min(most, bytes);
    const int64_t slices = (bytes + slice - 1) / slice;
    plan.shares[i] = {.first_unit = plan.units,
                      .slices = static_cast<uint32_t>(slices),
                      .slice_bytes = static_cast<int32_t>(slice),
                      .width = static_cast<int32_t>(access_width(p.tensors[i]))};
    plan.units += static_cast<uint32_t>(p.batch * p.heads * slices);
  }
  return plan;
}

template <int kBlocks>
void launch(const CompactParams& p, const Plan& plan, bool may_be_early, cudaStream_t stream) {
  int width = 1;
  for (int i = 0; i < p.num_tensors; ++i) width = std::max(width, plan.shares[i].width);
  const size_t bytes = static_cast<size_t>(kStages * kThreads * kWords * width);
  Launch(plan.units * kBlocks, kThreads, bytes, stream)
      .cluster(kBlocks)
      .early(may_be_early)("compact_", compact_kernel<kBlocks>, p, plan);
}

void run(const CompactParams& params, const Plan& plan, bool may_be_early, cudaStream_t s) {
  switch (plan.blocks) {
    case 8:
      return launch<8>(params, plan, may_be_early, s);
    case 4:
      return launch<4>(params, plan, may_be_early, s);
    case 2:
      return launch<2>(params, plan, may_be_early, s);
    default:
      return launch<1>(params, plan, may_be_early, s);
  }
}

}  // namespace

void compact_cuda(const CompactParams& params, void* stream) {
  const DeviceLimits& limits = device_limits();
  const bool has_clusters = limits.major >= 9;
  const int most_blocks = has_clusters ? 8 : 1;
  const Plan plan = make_plan(params, limits, most_blocks, kMostSlice);
  run(params, plan, has_clusters, static_cast<cudaStream_t>(stream));
}

}  // namespace kvc
