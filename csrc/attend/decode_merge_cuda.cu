// The second launch of decode attention: merges partial results and looks at the probabilities.
//
// The first blocks merge, one query row each: a warp takes every kMergeWarps-th partial of the row,
// in the order of the workers, and the warps' sums meet in shared memory. The next ones, where
// logits are asked for, fill what nothing wrote with -inf. The last ones, where something is
// observed, take kObserveKeys entries of one store each: they add up max and sum of the store's
// rows for themselves, rather than wait for the merge, and read the logits from L2 where the
// workers have just left them.
#include <algorithm>

#include "attend/decode_attention.h"
#include "attend/decode_kernels.cuh"
#include "attend/decode_observe.h"
#include "device/dispatch.cuh"
#include "device/limits.cuh"

namespace kvc {
namespace {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarp;
constexpr int kUnroll = 4;         // partials a warp has under way
constexpr int kFill = 8192;        // logits that one block fills
constexpr int kObserveKeys = 256;  // entries that one block observes, one a thread

// The grid: first the merging blocks, then the filling, then the observing ones.
struct MergeGrid {
  uint32_t merges, fills, observes;  // blocks
  uint32_t fills_a_row, observes_a_store;
};

// The workers [begin, end) that hold partials of a slice of a store.
struct Owners {
  uint32_t begin, end;
};

__device__ __forceinline__ Owners owners_of(const DecodeAttentionParams& p, int64_t workers,
                                            int64_t store, int64_t slice) {
  if (workers == 0) return {0, 0};
  const int64_t before = p.tile_start[store], tiles = p.tile_start[store + 1] - before;
  if (tiles == 0) return {0, 0};
  const AttendParts parts(p.tile_start[p.num_stores()] * p.slices(), workers,
                          static_cast<uint32_t>(p.tile_start[p.num_stores() + 1]));
  const auto first = static_cast<uint32_t>(before * p.slices() + slice * tiles);
  return {parts.owner(first), parts.owner(first + static_cast<uint32_t>(tiles) - 1) + 1};
}

// Where the partials of packed row r of a store begin, in rows of partial_stats; a worker is
// slice() rows on.
__device__ __forceinline__ int64_t first_partial(const DecodeAttentionParams& p, int64_t store,
                                                 uint32_t r) {
  const auto each = static_cast<uint32_t>(p.rows_a_slice);
  return attend_slot(0, store * p.slices() + r / each) * p.slice() + r % each;
}

template <typename T, int kParts>
__device__ __forceinline__ void merge_row(const DecodeAttentionParams& p, int64_t workers,
                                          uint32_t out_row) {
  __shared__ float2 stats_of[kMergeWarps];
  __shared__ __align__(16) float out_of[kMergeWarps][kParts * 4 * kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto rows = static_cast<uint32_t>(p.rows);
  const uint32_t store = out_row / rows, r = out_row - store * rows;
  const Owners owners = owners_of(p, workers, store, r / static_cast<uint32_t>(p.rows_a_slice));
  const int64_t first = first_partial(p, store, r);
  const float2* stats = reinterpret_cast<const float2*>(p.partial_stats);

  float out[kParts][4] = {};
  float highest = -INFINITY, sum = 0;
  for (uint32_t w = owners.begin + warp; w < owners.end; w += kUnroll * kMergeWarps) {
    float2 stat[kUnroll];
    float4 part[kUnroll][kParts];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const bool is_there = w + i * kMergeWarps < owners.end;
      const int64_t at = first + (is_there ? w + i * kMergeWarps : w) * p.slice();
      stat[i] = is_there ? stats[at] : make_float2(-INFINITY, 0.0f);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int d = j * 4 * kWarp + lane * 4;
        part[i][j] = make_float4(0, 0, 0, 0);
        if (is_there && d < p.head_dim) {
          part[i][j] = *reinterpret_cast<const float4*>(p.partial_out + at * p.head_dim + d);
        }
      }
    }
    float now = highest;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) now = fmaxf(now, stat[i].x);
    const float shrink = decay(highest, now);
    highest = now;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < kParts * 4; ++j) out[j / 4][j % 4] *= shrink;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const float factor = decay(stat[i].x, now);
      sum = fmaf(stat[i].y, factor, sum);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        out[j][0] = fmaf(part[i][j].x, factor, out[j][0]);
        out[j][1] = fmaf(part[i][j].y, factor, out[j][1]);
        out[j][2] = fmaf(part[i][j].z, factor, out[j][2]);
        out[j][3] = fmaf(part[i][j].w, factor, out[j][3]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    *reinterpret_cast<float4*>(&out_of[warp][j * 4 * kWarp + lane * 4]) =
        make_float4(out[j][0], out[j][1], out[j][2], out[j][3]);
  }
  if (lane == 0) stats_of[warp] = make_float2(highest, sum);
  __syncthreads();
  highest = stats_of[0].x;
#pragma unroll
  for (int w = 1; w < kMergeWarps; ++w) highest = fmaxf(highest, stats_of[w].x);
  const int d = min(static_cast<int>(threadIdx.x), kParts * 4 * kWarp - 1);
  float total = 0;
  sum = 0;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) {
    const float factor = decay(stats_of[w].x, highest);
    sum = fmaf(stats_of[w].y, factor, sum);
    total = fmaf(out_of[w][d], factor, total);
  }
  if (threadIdx.x < p.head_dim) {
    static_cast<T*>(p.out)[out_row * p.head_dim + d] = from_float<T>(sum == 0 ? 0.0f : total / sum);
  }
  if (threadIdx.x == 0) p.lse[out_row] = (highest + log2f(sum)) * kLn2;
}
static_assert(kMergeThreads == kAttendMaxHeadDim, "a thread an element of the output");

__device__ __forceinline__ void fill_logits(const DecodeAttentionParams& p, uint32_t out_row,
                                            uint32_t chunk) {
  const auto rows = static_cast<uint32_t>(p.rows);
  const uint32_t store = out_row / rows, r = out_row - store * rows;
  const int64_t seen = p.visible(p.length(store), r % static_cast<uint32_t>(p.num_queries));
  const int64_t begin = chunk * static_cast<int64_t>(kFill), end = min(begin + kFill, p.width);
  for (int64_t j = max(begin, seen) + threadIdx.x; j < end; j += kMergeThreads) {
    p.logits[out_row * p.width + j] = -INFINITY;
  }
}

__device__ __forceinline__ void observe(const DecodeAttentionParams& p, int64_t workers,
                                        uint32_t store, uint32_t chunk) {
  __shared__ float lse_of[kObservedMaxRows];  // in base 2
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t length = p.length(store), begin = chunk * static_cast<int64_t>(kObserveKeys);
  if (begin >= length) return;
  const int rows = static_cast<int>(p.packed_rows());
  const float2* stats = reinterpret_cast<const float2*>(p.partial_stats);
  if (p.observed.sums != nullptr) {
    for (int r = warp; r < rows; r += kMergeWarps) {
      const Owners owners = owners_of(p, workers, store, r / static_cast<uint32_t>(p.rows_a_slice));
      const int64_t first = first_partial(p, store, r);
      float highest = -INFINITY, sum = 0;
      for (uint32_t w = owners.begin + lane; w < owners.end; w += kWarp) {
        const float2 stat = stats[first + w * p.slice()];
        const float now = fmaxf(highest, stat.x);
        sum = sum * decay(highest, now) + stat.y * decay(stat.x, now);
        highest = now;
      }
      const float most = warp_max(highest);
      sum = warp_sum(sum * decay(highest, most));
      if (lane == 0) lse_of[r] = most + log2f(sum);
    }
    __syncthreads();
  }
  const int64_t j = begin + threadIdx.x;
  if (j >= length) return;
  const int n = static_cast<int>(p.num_queries);
  if (p.step_logits != nullptr) {
    const float* logits = p.step_logits + step_logit(p, store, j, 0);
    const auto logit2 = [&](int r) { return logits[r / 2 * (2 * kStepKeys) + r % 2]; };
    observe_entry(
        p, store, length, j, [&](int g, int i) { return logit2(g * n + i) * kLn2; },
        [&](int g, int i) { return exp2f(logit2(g * n + i) - lse_of[g * n + i]); });
    return;
  }
  const float* logits = p.logits + store * p.packed_rows() * p.width + j;
  const auto logit = [&](int g, int i) { return logits[(g * n + i) * p.width]; };
  observe_entry(p, store, length, j, logit,
                [&](int g, int i) { return exp2f(logit(g, i) * kLog2e - lse_of[g * n + i]); });
}
static_assert(kObserveKeys == kMergeThreads);

template <typename T, int kParts>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ DecodeAttentionParams p,
                 const __grid_constant__ MergeGrid grid, int64_t workers) {
  launch_wait();
  launch_dependents();
  uint32_t block = blockIdx.x;
  if (block < grid.merges) return merge_row<T, kParts>(p, workers, block);
  block -= grid.merges;
  if (block < grid.fills) {
    return fill_logits(p, block / grid.fills_a_row, block % grid.fills_a_row);
  }
  block -= grid.fills;
  observe(p, workers, block / grid.observes_a_store, block % grid.observes_a_store);
}

}  // namespace

void decode_merge_cuda(const DecodeAttentionParams& p, int64_t workers, cudaStream_t stream) {
  MergeGrid grid{.merges = static_cast<uint32_t>(p.num_stores() * p.packed_rows())};
  if (p.fill_logits) {
    grid.fills_a_row = static_cast<uint32_t>((p.width + kFill - 1) / kFill);
    grid.fills = grid.merges * grid.fills_a_row;
  }
  if (p.observed.any()) {
    grid.observes_a_store = static_cast<uint32_t>((p.width + kObserveKeys - 1) / kObserveKeys);
    grid.observes = static_cast<uint32_t>(p.num_stores()) * grid.observes_a_store;
  }
  const uint32_t blocks = grid.merges + grid.fills + grid.observes;
  visit_float_cuda(p.dtype, "decode_attention", [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = p.head_dim <= 128 ? merge_kernel<T, 1> : merge_kernel<T, 2>;
    Launch(blocks, kMergeThreads, 0, stream)
        .early(device_limits().major >= 9)("decode_attention", kernel, p, grid, workers);
  });
}

}  // namespace kvc
