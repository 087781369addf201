// compact_ on CUDA: read before write, without a second buffer and without a deadlock.
//
// Every block stages its rows through shared memory: read all, synchronise, write all.
// - k <= kCompactWholeRows: a block owns all k rows of a column slice of one (tensor, batch row,
// head). Slices do
//   not touch each other, so no two blocks ever look at the same bytes: one launch, no flags.
// - longer: a block owns a tile of `rows` destinations of such a slice, [a, b), and other tiles may
// have their
//   sources there. Blocks draw tickets; tiles of a slice ascend with the ticket. A block reads its
//   sources, sets its flag, waits for the flags of all tiles with sources in [a, b), then writes.
//   Which tiles: the index ascends, so those sources are its entries lb(a) .. lb(b) - 1, lb(x) =
//   entries below x, and as index[i] >= i none of them stands behind b: no tile after this one. No
//   deadlock, whatever the index holds: a block waits only for tiles of smaller tickets. Their
//   blocks run already, since they drew, and set their flags before they wait themselves; so by
//   induction every flag is set. No lost row: a source is overwritten only by the tile that owns
//   its slot, and that tile has waited for the reader's flag; read -> barrier -> release -> acquire
//   -> barrier -> write is a happens-before chain.
// Bound: each moved row read once and written once; rows in place are skipped. Same bytes every
// run.
#include <algorithm>

#include "device/async.cuh"
#include "device/check.cuh"
#include "device/copy_rows.cuh"
#include "device/flag.cuh"
#include "device/reduce.cuh"
#include "store/compact.h"

namespace kvc {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;
constexpr int64_t kWholeBytes =
    96 << 10;                    // shared memory of a block: two fit an H100's SM, one any sm_8x
constexpr int64_t kSector = 32;  // least bytes of a slice: what one L2 access moves
constexpr int64_t kWantedBlocks = 128;  // about one wave of an A100 or H100

// How one tensor is spread over blocks.
struct Share {
  int64_t first_block;
  int64_t slice_bytes, slices;
  int64_t rows;  // of a tile, all k in the first form
  int32_t width;
};

struct Plan {
  Share shares[kMaxTensors];
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
};

// What a block owns.
struct Piece {
  char* base;            // row 0 of its (batch row, head), at its first column
  const int32_t* index;  // of its (batch row, head)
  int64_t stride;
  int64_t first, rows;  // destinations [first, first + rows)
  int64_t seq_len;
  uint32_t words;  // a row

  // Where slot first + row comes from, or -1 if it stays.
  __device__ __forceinline__ int64_t source(uint32_t row) const {
    const int64_t entry = index[first + row];
    return entry > first + row && entry < seq_len ? entry : -1;
  }
};

template <typename Word>
__device__ __forceinline__ void read_piece(const Piece& piece, Word* staged) {
  WordWalk walk(threadIdx.x, kThreads, piece.words);
  while (walk.row < piece.rows) {
    int64_t sources[kUnroll];
    uint32_t rows[kUnroll], columns[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      rows[j] = walk.row;
      columns[j] = walk.column;
      sources[j] = walk.row < piece.rows ? piece.source(walk.row) : -1;
      walk.advance();
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (sources[j] < 0) continue;
      const Word* from = reinterpret_cast<const Word*>(piece.base + sources[j] * piece.stride);
      copy_async(staged + rows[j] * piece.words + columns[j], from + columns[j]);
    }
  }
  copy_async_wait();
}

template <typename Word>
__device__ __forceinline__ void write_piece(const Piece& piece, const Word* staged) {
  WordWalk walk(threadIdx.x, kThreads, piece.words);
  for (; walk.row < piece.rows; walk.advance()) {
    if (piece.source(walk.row) < 0) continue;
    Word* to = reinterpret_cast<Word*>(piece.base + (piece.first + walk.row) * piece.stride);
    to[walk.column] = staged[walk.row * piece.words + walk.column];
  }
}

// Entries of index[0, k) below x, for all lanes of a warp: 32 probes a round, -1 counts as
// infinite.
__device__ __forceinline__ int64_t lower_bound(const int32_t* index, int64_t k, int64_t x) {
  const int lane = threadIdx.x % kWarp;
  int64_t low = 0, left = k;  // the answer lies in [low, low + left]
  while (left > 0) {
    const int64_t chunk = (left + kWarp - 1) / kWarp;
    const int64_t probe = (lane + 1) * chunk - 1;
    const bool is_below = probe < left && static_cast<uint32_t>(index[low + probe]) < x;
    const int64_t passed = __popc(__ballot_sync(0xffffffffu, is_below)) * chunk;
    low += passed;
    left = min(chunk - 1, left - passed);
  }
  return low;
}

template <bool kTiled>
__global__ void __launch_bounds__(kThreads)
    compact_kernel(const __grid_constant__ CompactParams p, const __grid_constant__ Plan plan) {
  extern __shared__ uint4 staged[];
  __shared__ unsigned drawn;
  __shared__ int64_t bounds[2];

  // who am I: tiles ascend with the ticket, heads fastest
  int64_t block = blockIdx.x;
  if constexpr (kTiled) {
    if (threadIdx.x == 0) {
      drawn = atomicAdd(reinterpret_cast<unsigned*>(p.scratch + p.scratch_size - 1), 1u);
    }
    __syncthreads();
    block = drawn;
  }
  int tensor = 0;
  while (tensor + 1 < p.num_tensors && block >= plan.shares[tensor + 1].first_block) ++tensor;
  const Share& share = plan.shares[tensor];
  const Rows& rows = p.tensors[tensor];
  const int64_t pieces = p.batch * p.heads * share.slices;  // of one tile
  const int64_t local = block - share.first_block;
  const int64_t tile = local / pieces, bh = local % pieces % (p.batch * p.heads);
  const int64_t slice = local % pieces / (p.batch * p.heads);
  const int64_t b = bh / p.heads, h = bh % p.heads;
  const int64_t column = slice * share.slice_bytes;
  const Piece piece{
      .base = row_address(rows, b, h, 0) + column,
      .index = p.index + b * p.index_batch_stride + h * p.index_head_stride,
      .stride = rows.row_stride,
      .first = tile * share.rows,
      .rows = min(share.rows, p.k - tile * share.rows),
      .seq_len = p.seq_len,
      .words = static_cast<uint32_t>(min(share.slice_bytes, rows.bytes - column) / share.width),
  };

  visit_word(share.width,
             [&](auto word) { read_piece(piece, reinterpret_cast<decltype(word)*>(staged)); });
  if constexpr (kTiled) {
    const int warp = threadIdx.x / kWarp;
    if (warp < 2) {
      const int64_t end = warp == 0 ? piece.first : piece.first + piece.rows;
      const int64_t bound = lower_bound(piece.index, p.k, end);
      if (threadIdx.x % kWarp == 0) bounds[warp] = bound;
    }
  }
  __syncthreads();  // all rows of this block are read

  if constexpr (kTiled) {
    // a flag a ticket, so that those of one slice lie `pieces` apart
    int32_t* flags = p.scratch + share.first_block + local % pieces;
    if (threadIdx.x == 0) flag_set(flags + tile * pieces);
    const int64_t first = bounds[0] / share.rows;
    const int64_t last = min(tile - 1, (bounds[1] - 1) / share.rows);
    if (bounds[1] > bounds[0]) {
      for (int64_t other = first + threadIdx.x; other <= last; other += kThreads) {
        flag_wait(flags + other * pieces);
      }
    }
    __syncthreads();  // all rows that this block overwrites are read
  }
  visit_word(share.width, [&](auto word) {
    write_piece(piece, reinterpret_cast<const decltype(word)*>(staged));
  });
}

Plan plan_whole(const CompactParams& p) {
  // the widest slices that fit, halved until the blocks fill the GPU
  int64_t most = kSector;
  while (most * 2 * p.k <= kWholeBytes) most *= 2;
  const auto blocks = [&](int64_t slice) {
    int64_t sum = 0;
    for (int i = 0; i < p.num_tensors; ++i) sum += (p.tensors[i].bytes + slice - 1) / slice;
    return sum * p.batch * p.heads;
  };
  while (most > kSector && blocks(most) < kWantedBlocks) most /= 2;
  Plan plan;
  for (int i = 0; i < p.num_tensors; ++i) {
    const int64_t slice = std::min(most, p.tensors[i].bytes);
    const int64_t slices = (p.tensors[i].bytes + slice - 1) / slice;
    plan.shares[i] = {
        .first_block = plan.blocks, .slice_bytes = slice, .slices = slices, .rows = p.k};
    plan.blocks += p.batch * p.heads * slices;
    plan.shared_bytes = std::max(plan.shared_bytes, p.k * slice);
  }
  return plan;
}

Plan plan_tiled(const CompactParams& p) {
  Plan plan;
  for (int i = 0; i < p.num_tensors; ++i) {
    const CompactTile tile = compact_tile(p.tensors[i].bytes, p.k);
    plan.shares[i] = {.first_block = plan.blocks,
                      .slice_bytes = tile.slice_bytes,
                      .slices = tile.slices,
                      .rows = tile.rows};
    plan.blocks += p.batch * p.heads * tile.slices * tile.tiles;
    plan.shared_bytes = std::max(plan.shared_bytes, tile.rows * tile.slice_bytes);
  }
  return plan;
}

}  // namespace

void compact_cuda(const CompactParams& params, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool is_tiled = params.k > kCompactWholeRows;
  Plan plan = is_tiled ? plan_tiled(params) : plan_whole(params);
  for (int i = 0; i < params.num_tensors; ++i) {
    // slices begin at multiples of 32 bytes, or of kCompactMaxSlice: no narrower than the rows
    // allow
    plan.shares[i].width = static_cast<int32_t>(access_width(params.tensors[i]));
  }
  const auto kernel = is_tiled ? compact_kernel<true> : compact_kernel<false>;
  if (is_tiled) {
    cuda_check(cudaMemsetAsync(params.scratch, 0, params.scratch_size * sizeof(int32_t), s),
               "compact_");
  }
  if (plan.shared_bytes > 48 << 10) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(plan.shared_bytes)),
               "compact_");
  }
  kernel<<<static_cast<unsigned>(plan.blocks), kThreads, plan.shared_bytes, s>>>(params, plan);
  launch_check("compact_");
}

}  // namespace kvc
