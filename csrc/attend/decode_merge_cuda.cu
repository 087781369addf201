// The second launch of decode attention: merges partial results and looks at the probabilities.
//
// The first blocks merge. Where a store has many partials a block takes one query row: a warp takes
// every kMergeWarps-th partial, in the order of the workers, and the warps' sums meet in shared
// memory. Where few, a warp takes a row for itself. The next blocks, where logits are asked for,
// fill what nothing wrote with -inf. The last ones, where something is observed, take a chunk of
// entries of one store each: they add up max and sum of the store's rows for themselves, rather
// than wait for the merge, and read the logits that the workers have just left.
#include <algorithm>

#include "attend/decode_attention.h"
#include "attend/decode_kernels.cuh"
#include "attend/decode_observe.h"
#include "device/cache.cuh"
#include "device/dispatch.cuh"
#include "device/limits.cuh"

namespace kvc {
namespace {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarp;
constexpr int kUnroll = 4;   // partials a warp has under way
constexpr int kFill = 8192;  // logits that one block fills

// The grid: first the merging blocks, then the filling, then the observing ones.
struct MergeGrid {
  uint32_t merges, fills, observes;  // blocks
  uint32_t rows_a_merge, fills_a_row, observes_a_store;
  uint32_t observed_keys;  // of a block
};

// The first row of partial_stats that packed row r of a store has; a worker is slice() rows on.
__device__ __forceinline__ int64_t first_partial(const DecodeAttentionParams& p, uint32_t row,
                                                 uint32_t in_slice) {
  return attend_slot(0, row) * p.slice() + in_slice;
}

// Max and sum in base 2, and the weighted values; lane l holds elements 4 l, ... of each 128.
template <int kParts>
struct MergedRow {
  float highest = -INFINITY, sum = 0;
  float out[kParts][4] = {};

  // Partials begin, begin + kStep, ... before end.
  template <int kStep>
  __device__ __forceinline__ void add(const DecodeAttentionParams& p, int64_t first, uint32_t begin,
                                      uint32_t end, int lane) {
    const float2* stats = reinterpret_cast<const float2*>(p.partial_stats);
    for (uint32_t w = begin; w < end; w += kUnroll * kStep) {
      float2 stat[kUnroll];
      float4 part[kUnroll][kParts];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const bool is_there = w + i * kStep < end;
        const int64_t at = first + (is_there ? w + i * kStep : w) * p.slice();
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
  }
};

template <typename T>
__device__ __forceinline__ void write_row(const DecodeAttentionParams& p, uint32_t out_row, int d,
                                          float total, float sum) {
  static_cast<T*>(p.out)[out_row * p.head_dim + d] = from_float<T>(normalised(total, sum));
}

// Blocks of kMergeWarps / kRows warps a row.
template <typename T, int kParts>
__device__ __forceinline__ void merge_rows(const DecodeAttentionParams& p, const MergeGrid& grid,
                                           uint32_t block) {
  __shared__ float2 stats_of[kMergeWarps];
  __shared__ __align__(16) float out_of[kMergeWarps][kParts * 4 * kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool is_alone = grid.rows_a_merge > 1;  // a warp, with its row
  const auto rows = static_cast<uint32_t>(p.rows);
  const uint32_t out_row = is_alone ? block * kMergeWarps + warp : block;
  const uint32_t store = out_row / rows, r = out_row - store * rows;
  if (store >= p.num_stores()) return;
  const uint32_t slice = r / static_cast<uint32_t>(p.rows_a_slice);
  const uint32_t row = store * p.slices_a_store + slice;
  const int64_t first = first_partial(p, row, r - slice * p.rows_a_slice);
  launch_wait();
  const Owners owners = owners_of(p, row, length_of(p, store));
  if (owners.is_done) return;
  MergedRow<kParts> merged;
  if (is_alone) {
    merged.template add<1>(p, first, owners.begin, owners.end, lane);
#pragma unroll
    for (int i = 0; i < kParts * 4; ++i) {
      const int d = i / 4 * 4 * kWarp + lane * 4 + i % 4;
      if (d < p.head_dim) write_row<T>(p, out_row, d, merged.out[i / 4][i % 4], merged.sum);
    }
    if (lane == 0) p.lse[out_row] = natural_lse(merged.highest, merged.sum);
    return;
  }
  merged.template add<kMergeWarps>(p, first, owners.begin + warp, owners.end, lane);
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    *reinterpret_cast<float4*>(&out_of[warp][j * 4 * kWarp + lane * 4]) =
        make_float4(merged.out[j][0], merged.out[j][1], merged.out[j][2], merged.out[j][3]);
  }
  if (lane == 0) stats_of[warp] = make_float2(merged.highest, merged.sum);
  __syncthreads();
  float highest = stats_of[0].x;
#pragma unroll
  for (int w = 1; w < kMergeWarps; ++w) highest = fmaxf(highest, stats_of[w].x);
  const int d = min(static_cast<int>(threadIdx.x), kParts * 4 * kWarp - 1);
  float total = 0, sum = 0;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) {
    const float factor = decay(stats_of[w].x, highest);
    sum = fmaf(stats_of[w].y, factor, sum);
    total = fmaf(out_of[w][d], factor, total);
  }
  if (threadIdx.x < p.head_dim) write_row<T>(p, out_row, d, total, sum);
  if (threadIdx.x == 0) p.lse[out_row] = natural_lse(highest, sum);
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

// Max + log2(sum) of the rows of a store, a warp a row.
__device__ __forceinline__ void add_up_lse(const DecodeAttentionParams& p, uint32_t store,
                                           uint32_t length, float* lse_of) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float2* stats = reinterpret_cast<const float2*>(p.partial_stats);
  for (int r = warp; r < p.rows; r += kMergeWarps) {
    const uint32_t slice = r / p.rows_a_slice, row = store * p.slices_a_store + slice;
    const Owners owners = owners_of(p, row, length);
    const int64_t first = first_partial(p, row, r - slice * p.rows_a_slice);
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
}

// Where nothing but sums of all heads of a group is kept, and where more.
enum class Observe { kNothing, kSums, kAll };

// Entries [begin, end) of a store whose step_logits hold kGroup rows, one query each. A thread
// takes an entry of each half of a step at a time, whose logits of two rows lie together.
template <int kGroup, Observe kWhat>
__device__ __forceinline__ void observe_steps(const DecodeAttentionParams& p, uint32_t store,
                                              uint32_t length, uint32_t begin, uint32_t end,
                                              float* lse_of) {
  constexpr bool kIsSums = kWhat == Observe::kSums;
  constexpr int kPairs = (kGroup + 1) / 2;
  constexpr uint32_t kKeys = kStepKeys;
  const ObservedParams& o = p.observed;
  const uint32_t last = (end + kKeys - 1) / kKeys * kKeys;
  const uint32_t pairs = (p.rows + 1) / 2;
  const float4* logits =
      reinterpret_cast<const float4*>(p.step_logits + step_logit(p, store, 0, 0));
  float* sums = kIsSums ? observed_sums(p, store, 0) : nullptr;
  const float* weights = kIsSums && o.weights != nullptr ? observed_weights(p, store) : nullptr;
  uint32_t at = begin + threadIdx.x * 2, j = 0;  // entries j and j + 8
  float4 x[kPairs];
  float old[2], weight[2];
  const auto line = [&](int pair) {  // of two rows of the step
    return logits + static_cast<uint64_t>(at / kKeys * pairs + pair) * 8;
  };
  const auto load = [&] {
    if (at >= last) return;
    j = at / kKeys * kKeys + at % kKeys / 2;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      x[pair] = line(pair)[j % 8];
    }
    if constexpr (kIsSums) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool is_there = j + 8 * half < end;
        old[half] = is_there && o.decay != 0 ? sums[j + 8 * half] : 0;
        weight[half] = is_there && weights != nullptr ? weights[j + 8 * half] : 1;
      }
    }
  };
  load();  // while max and sum are added up
  if (o.sums != nullptr) {
    add_up_lse(p, store, length, lse_of);
    __syncthreads();
  }
  float lse[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) lse[g] = o.sums != nullptr ? lse_of[g] : 0;
  while (at < last) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (j + 8 * half >= end) continue;
      const auto logit2 = [&](int g) {
        const float4& y = x[g / 2];
        return half == 0 ? (g % 2 == 0 ? y.x : y.y) : (g % 2 == 0 ? y.z : y.w);
      };
      const auto share = [&](int g, int) { return exp2f(logit2(g) - lse[g]); };
      if constexpr (kIsSums) {
        const float gain = observed_gain<1>(p, length, j + 8 * half, 0, kGroup, share);
        sums[j + 8 * half] = observed_sum<1>(p, gain * weight[half], old[half]);
      } else {
        observe_entry<kGroup, 1>(
            p, store, length, j + 8 * half, [&](int g, int) { return logit2(g) * kLn2; }, share);
      }
    }
    __syncwarp();  // eight lanes have read a line
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (threadIdx.x % 8 == 0) discard_line(line(pair));
    }
    at += 2 * kMergeThreads;
    load();
  }
}

// The sums of all heads of a group alone, of an even number of queries: the logits of two queries
// lie together. A thread takes an entry of each half of a step at a time, two queries after two.
template <int kGroup>
__device__ __forceinline__ void observe_queries(const DecodeAttentionParams& p, uint32_t store,
                                                uint32_t length, uint32_t begin, uint32_t end,
                                                float* lse_of) {
  constexpr uint32_t kKeys = kStepKeys;
  const int n = static_cast<int>(p.num_queries), pairs = p.rows / 2;
  const float* weights = p.observed.weights != nullptr ? observed_weights(p, store) : nullptr;
  float* sums = observed_sums(p, store, 0);
  const float4* logits =
      reinterpret_cast<const float4*>(p.step_logits + step_logit(p, store, 0, 0));
  add_up_lse(p, store, length, lse_of);
  __syncthreads();
  const uint32_t last = (end + kKeys - 1) / kKeys * kKeys;
  for (uint32_t at = begin + threadIdx.x * 2; at < last; at += 2 * kMergeThreads) {
    const uint32_t j = at / kKeys * kKeys + at % kKeys / 2;  // entries j and j + 8
    const float4* step = logits + static_cast<uint64_t>(at / kKeys * pairs) * 8;
    float gain[2] = {0, 0};
#pragma unroll 1
    for (int i = 0; i < n; i += 2) {
      float4 x[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) x[g] = step[(g * n + i) / 2 * 8 + j % 8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto share = [&](int g, int query) {
          const float4& y = x[g];
          const float logit2 = half == 0 ? (query == i ? y.x : y.y) : (query == i ? y.z : y.w);
          return exp2f(logit2 - lse_of[g * n + query]);
        };
#pragma unroll
        for (int query = i; query < i + 2; ++query) {
          const float term = observed_term(p, length, j + 8 * half, query, 0, kGroup, share);
          gain[half] = observed_next(p, gain[half], term);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t entry = j + 8 * half;
      if (entry >= end) continue;
      if (weights != nullptr) gain[half] *= weights[entry];
      sums[entry] = observed_sum(p, gain[half], sums[entry]);
    }
    __syncwarp();  // eight lanes have read the lines
    for (int pair = 0; pair < pairs && threadIdx.x % 8 == 0; ++pair) discard_line(step + pair * 8);
  }
}

// In any order and number of queries.
__device__ __forceinline__ void observe_entries(const DecodeAttentionParams& p, uint32_t store,
                                                uint32_t length, uint32_t begin, uint32_t end,
                                                float* lse_of) {
  if (p.observed.sums != nullptr) {
    add_up_lse(p, store, length, lse_of);
    __syncthreads();
  }
  const int n = static_cast<int>(p.num_queries);
  for (uint32_t at = begin; at < end; at += kMergeThreads) {
    const uint32_t j = at + threadIdx.x;
    const bool is_there = j < end;
    if (p.step_logits == nullptr) {
      const float* logits = p.logits + store * p.packed_rows() * p.width + j;
      const auto logit = [&](int g, int i) { return logits[(g * n + i) * p.width]; };
      const auto share = [&](int g, int i) {
        return exp2f(logit(g, i) * kLog2e - lse_of[g * n + i]);
      };
      if (is_there) observe_entry(p, store, length, j, logit, share);
      continue;
    }
    const float* logits = p.step_logits + step_logit(p, store, j, 0);
    const auto logit2 = [&](int r) { return logits[r / 2 * (2 * kStepKeys) + r % 2]; };
    const auto logit = [&](int g, int i) { return logit2(g * n + i) * kLn2; };
    const auto share = [&](int g, int i) { return exp2f(logit2(g * n + i) - lse_of[g * n + i]); };
    if (is_there) observe_entry(p, store, length, j, logit, share);
    __syncwarp();  // sixteen lanes have read the lines of a step
    for (int r = 0; r < p.rows && is_there && j % kStepKeys == 0; r += 2) {
      discard_line(logits + r * kStepKeys);
    }
  }
}

template <Observe kWhat>
__device__ __forceinline__ void observe(const DecodeAttentionParams& p, const MergeGrid& grid,
                                        uint32_t store, uint32_t chunk) {
  __shared__ float lse_of[kObservedMaxRows];  // in base 2
  const uint32_t length = length_of(p, store), begin = chunk * grid.observed_keys;
  if (begin >= length) return;
  const uint32_t end = min(begin + grid.observed_keys, length);
  if (p.step_logits != nullptr && p.num_queries == 1) {
    if (p.q_per_kv == 1) return observe_steps<1, kWhat>(p, store, length, begin, end, lse_of);
    if (p.q_per_kv == 2) return observe_steps<2, kWhat>(p, store, length, begin, end, lse_of);
    if (p.q_per_kv == 4) return observe_steps<4, kWhat>(p, store, length, begin, end, lse_of);
    if (p.q_per_kv == 8) return observe_steps<8, kWhat>(p, store, length, begin, end, lse_of);
  }
  if constexpr (kWhat == Observe::kSums) {
    if (p.step_logits != nullptr && p.num_queries % 2 == 0) {
      if (p.q_per_kv == 1) return observe_queries<1>(p, store, length, begin, end, lse_of);
      if (p.q_per_kv == 2) return observe_queries<2>(p, store, length, begin, end, lse_of);
      if (p.q_per_kv == 4) return observe_queries<4>(p, store, length, begin, end, lse_of);
      if (p.q_per_kv == 8) return observe_queries<8>(p, store, length, begin, end, lse_of);
    }
  }
  observe_entries(p, store, length, begin, end, lse_of);
}

// Brings the sums that this block will change into L2, before the launches in front have ended:
// addresses of a dense store depend on parameters alone.
__device__ __forceinline__ void fetch_sums(const DecodeAttentionParams& p, const MergeGrid& grid,
                                           uint32_t store, uint32_t chunk) {
  constexpr uint32_t kLine = 128 / sizeof(float);
  const uint32_t at = threadIdx.x * kLine, j = chunk * grid.observed_keys + at;
  if (p.row_start != nullptr || p.observed.sums == nullptr || p.observed.sums_by_head) return;
  if (at < grid.observed_keys && j < p.width) {
    fetch_line(observed_sums(p, store, 0) + j);
  }
}

// kWhat apart: the plain merge is short, and waits beside the workers.
template <typename T, int kParts, Observe kWhat>
__global__ void __launch_bounds__(kMergeThreads, kWhat == Observe::kAll ? 3 : 4)
    merge_kernel(const __grid_constant__ DecodeAttentionParams p,
                 const __grid_constant__ MergeGrid grid) {
  fetch_params(p);
  launch_dependents();
  uint32_t block = blockIdx.x;
  if (block < grid.merges) return merge_rows<T, kParts>(p, grid, block);
  block -= grid.merges;
  if (block < grid.fills) {
    launch_wait();
    return fill_logits(p, block / grid.fills_a_row, block % grid.fills_a_row);
  }
  if constexpr (kWhat != Observe::kNothing) {
    block -= grid.fills;
    const uint32_t store = block / grid.observes_a_store;
    const uint32_t chunk = block - store * grid.observes_a_store;
    fetch_sums(p, grid, store, chunk);
    launch_wait();
    observe<kWhat>(p, grid, store, chunk);
  }
}

}  // namespace

void decode_merge_cuda(const DecodeAttentionParams& p, int64_t workers, cudaStream_t stream) {
  const auto stores = static_cast<uint32_t>(p.num_stores()), rows = stores * p.rows;
  // Up to four partials a row keep no block busy.
  MergeGrid grid{.rows_a_merge = workers <= 4 * p.num_rows() ? kMergeWarps : 1u};
  grid.merges = (rows + grid.rows_a_merge - 1) / grid.rows_a_merge;
  if (p.fill_logits) {
    grid.fills_a_row = static_cast<uint32_t>((p.width + kFill - 1) / kFill);
    grid.fills = rows * grid.fills_a_row;
  }
  if (p.observed.any()) {
    // Four blocks a multiprocessor, what it holds at once, but from 512 to 4096 entries each.
    constexpr int64_t kUnit = 2 * kMergeThreads;
    const int64_t blocks = 4 * device_limits().multiprocessors, all = p.width * stores;
    const int64_t units = (all + blocks * kUnit - 1) / (blocks * kUnit);
    grid.observed_keys = static_cast<uint32_t>(kUnit * std::clamp<int64_t>(units, 1, 8));
    grid.observes_a_store =
        static_cast<uint32_t>((p.width + grid.observed_keys - 1) / grid.observed_keys);
    grid.observes = stores * grid.observes_a_store;
  }
  const uint32_t blocks = grid.merges + grid.fills + grid.observes;
  visit_float_cuda(p.dtype, "decode_attention", [&](auto tag) {
    using T = decltype(tag);
    const auto launch = [&](auto kernel) {
      Launch(blocks, kMergeThreads, 0, stream)
          .early(device_limits().major >= 9)("decode_attention", kernel, p, grid);
    };
    const bool is_short = p.head_dim <= 128;
    const bool is_sums = p.observed.history == nullptr && !p.observed.sums_by_head;
    if (!p.observed.any()) {
      launch(is_short ? merge_kernel<T, 1, Observe::kNothing>
                      : merge_kernel<T, 2, Observe::kNothing>);
    } else if (is_sums) {
      launch(is_short ? merge_kernel<T, 1, Observe::kSums> : merge_kernel<T, 2, Observe::kSums>);
    } else {
      launch(is_short ? merge_kernel<T, 1, Observe::kAll> : merge_kernel<T, 2, Observe::kAll>);
    }
  });
}

}  // namespace kvc
