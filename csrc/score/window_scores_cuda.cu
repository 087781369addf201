// window_scores on CUDA, sm_80 and later, behind row_statistics_cuda:
//   pass 2  left = keys, right = queries; a column's vote is added up inside a thread over all rows
//           of a query head, two shuffles join the quad. Where all query rows of a kv head fit
//           shared memory, a block keeps them there and its warps fetch keys; else a block keeps
//           keys in registers and the rows stream past them.
//   pass 3  a thread an output column: group, pool, fills.
// Bound: k read once a pass, 2 q_per_kv window head_dim FLOP and q_per_kv window exp2 an entry and
// pass. Every order of addition follows from sizes (and the SM count, in pass 1): no atomics.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "score/attention_rows.cuh"
#include "score/pooled.cuh"
#include "score/window_scores_sm90a.h"

namespace kvc {
namespace {

constexpr const char* kOp = "window_scores";

// --- pass 2

// What pass 2 knows of the streamed query rows.
template <typename Tile>
struct Shared {
  float2 stats[2][Tile::kRight];      // (max, 1 / sum)
  int limits[2][Tile::kRight];        // last visible key, -1 for padding
  int2 bounds[2][Tile::kRight / 16];  // (least, greatest) limit of the real rows of 16
};

// A statistic of a column over the rows of a query head: how e * inverse = P joins it, how two
// parts become one.
struct SumOfRows {
  static __device__ __forceinline__ float join(float acc, float e, float inverse) {
    return fmaf(e, inverse, acc);
  }
  static __device__ __forceinline__ float merge(float a, float b) { return a + b; }
};
struct MaxOfRows {
  static __device__ __forceinline__ float join(float acc, float e, float inverse) {
    return nan_max(acc, e * inverse);
  }
  static __device__ __forceinline__ float merge(float a, float b) { return nan_max(a, b); }
};

// The votes of the columns that a thread holds a part of: Tile::kWarpRows keys from key0 on, over
// the rows that its quad divides.
template <typename Tile, typename Statistic>
struct Votes {
  using T = typename Tile::T;
  const WindowScoresParams& p;
  const Head<T>& head;
  int key0, lane;
  float factor;
  float of_head[Tile::kBlocks][2], of_group[Tile::kBlocks][2];

  __device__ __forceinline__ Votes(const WindowScoresParams& p, const Head<T>& head, int key0)
      : p(p), head(head), key0(key0), lane(threadIdx.x % kWarp), factor(1) {
#pragma unroll
    for (int i = 0; i < 2 * Tile::kBlocks; ++i) of_head[i / 2][i % 2] = of_group[i / 2][i % 2] = 0;
    if (p.window_reduce == WindowReduce::kMean) {
      const int64_t real = min(max(p.first_query + p.window - head.start, int64_t{1}), p.window);
      factor = 1.0f / static_cast<float>(real);
    }
  }

  // Products x of two rows of a query head a lane: (max, 1 / sum) and last visible key of each.
  template <bool kMasked>
  __device__ __forceinline__ void join(const float (&x)[Tile::kBlocks][2][4], int octet,
                                       const float4& stats, const int2& limit) {
#pragma unroll
    for (int i = 0; i < 4 * Tile::kBlocks; ++i) {
      const int block = i / 4, half = i / 2 % 2, j = i % 2;
      const float e = exp2_approx(
          fmaf(x[block][octet][2 * half + j], p.scale_log2, -(j == 0 ? stats.x : stats.z)));
      float& vote = of_head[block][half];
      const float joined = Statistic::join(vote, e, j == 0 ? stats.y : stats.w);
      if constexpr (kMasked) {
        const int key = key0 + 16 * block + 8 * half + lane / 4;
        const bool visible = key >= head.start && key <= (j == 0 ? limit.x : limit.y);
        vote = visible ? joined : vote;
      } else {
        vote = joined;
      }
    }
  }

  // All rows of query head g are in: the quad's parts become the vote, which is written or joins
  // the group.
  __device__ __forceinline__ void finish_head(int g) {
    const int q_per_kv = static_cast<int>(p.q_per_kv()),
              num_scored = static_cast<int>(p.num_scored);
#pragma unroll
    for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
      float vote = of_head[i / 2][i % 2];
      of_head[i / 2][i % 2] = 0;
      vote = Statistic::merge(vote, __shfl_xor_sync(0xffffffffu, vote, 1));
      vote = Statistic::merge(vote, __shfl_xor_sync(0xffffffffu, vote, 2)) * factor;
      const int key = key0 + 8 * i + lane / 4;
      if (p.weights && key < num_scored) {
        vote *= p.weights[head.b * p.weights_batch_stride + head.h * p.weights_head_stride + key];
      }
      float& all = of_group[i / 2][i % 2];
      if (p.votes_per_q_head()) {
        const int64_t row = head.b * p.num_q_heads + static_cast<int64_t>(head.h) * q_per_kv + g;
        if (lane % 4 == 0 && key < num_scored) p.votes[row * p.seq_len + key] = vote;
      } else {
        all = g == 0 ? vote : p.group_reduce == GroupReduce::kMax ? nan_max(all, vote) : all + vote;
      }
    }
  }

  // All heads are in.
  __device__ __forceinline__ void finish_group() const {
    if (p.votes_per_q_head() || lane % 4 != 0) return;
    const float divisor =
        p.group_reduce == GroupReduce::kMean ? static_cast<float>(p.q_per_kv()) : 1.0f;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
      const int key = key0 + 8 * i + lane / 4;
      if (key >= p.num_scored) continue;
      p.votes[(head.b * p.num_kv_heads + head.h) * p.seq_len + key] =
          of_group[i / 2][i % 2] / divisor;
    }
  }
};

// The products x of 16 rows from row0 on join the votes, if any of these rows sees a key of the
// warp; heads that end here are finished.
template <typename Tile, typename Statistic>
__device__ __forceinline__ void join_rows(Votes<Tile, Statistic>& votes, const RowPlan& plan,
                                          const float (&x)[Tile::kBlocks][2][4], int row0,
                                          const float2* stats, const int* limits, bool seen,
                                          bool masked) {
#pragma unroll
  for (int octet = 0; octet < 2; ++octet) {
    const int row = row0 + 8 * octet;
    if (row >= plan.padded_rows) break;
    if (seen) {
      const int at = 8 * octet + 2 * (votes.lane % 4);
      const float4 two = *reinterpret_cast<const float4*>(stats + at);
      const int2 limit = *reinterpret_cast<const int2*>(limits + at);
      if (masked) {
        votes.template join<true>(x, octet, two, limit);
      } else {
        votes.template join<false>(x, octet, two, limit);
      }
    }
    const int g = plan.padded_window.quotient(row);
    if (row + 8 == (g + 1) * static_cast<int>(plan.padded_window.divisor)) votes.finish_head(g);
  }
}

// (max, 1 / sum) and last visible key of a row, on their way to shared memory.
template <typename T>
__device__ __forceinline__ void load_row(const WindowScoresParams& p, const Head<T>& head, int r,
                                         float2* stats, int* limit) {
  const RowPlan& plan = head.plan;
  const float2* from = reinterpret_cast<const float2*>(p.row_stats);
  *limit = head.limit(r);
  if (*limit >= 0) {
    const int g = plan.padded_window.quotient(r);
    from += head.row_index(g, r - g * static_cast<int>(plan.padded_window.divisor));
  }
  copy_async_8(stats, from, *limit >= 0);
}

// (least, greatest) limit of the real rows among the 16 of a half warp, for its first lane.
__device__ __forceinline__ int2 bounds_of_sixteen(int limit) {
  int least = limit < 0 ? INT_MAX : limit, greatest = limit;
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    least = min(least, __shfl_xor_sync(0xffffffffu, least, offset));
    greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
  }
  return make_int2(least, greatest);
}

// Any number of rows: they stream through shared memory past the keys of a block.
template <typename Tile, typename Statistic>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    column_votes_kernel(const __grid_constant__ WindowScoresParams p,
                        const __grid_constant__ RowPlan plan) {
  using T = typename Tile::T;
  extern __shared__ __align__(16) unsigned char memory[];
  T* left = reinterpret_cast<T*>(memory);
  T* right = reinterpret_cast<T*>(memory + Tile::kStreamOffset);
  auto& shared = *reinterpret_cast<Shared<Tile>*>(memory + Tile::kTileBytes);

  // Early keys are seen by more rows: they come first.
  const Head<T> head(p, plan, blockIdx.x % plan.num_heads);
  const int block_key0 = static_cast<int>(blockIdx.x / plan.num_heads) * Tile::kLeft;
  const int head_dim = static_cast<int>(p.head_dim);
  if (min(block_key0 + Tile::kLeft, static_cast<int>(p.num_scored)) <= head.start)
    return;  // padding: nobody reads these votes
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int key0 = block_key0 + warp * Tile::kWarpRows;
  Votes<Tile, Statistic> votes(p, head, key0);

  const int num_tiles = (plan.padded_rows + Tile::kRight - 1) / Tile::kRight;
  const auto next_tile =
      [&](int tile) {  // the first from here on with a row that sees a key of this block
        while (tile < num_tiles &&
               head.greatest_limit(tile * Tile::kRight, (tile + 1) * Tile::kRight) < block_key0) {
          ++tile;
        }
        return tile;
      };
  const auto load_tile = [&](int tile, int buffer) {
    const int row0 = tile * Tile::kRight;
    load_rows<Tile>(right + buffer * Tile::kRight * Tile::kStride, Tile::kRight, head_dim,
                    plan.aligned, p.q, [&](int r) { return head.query(row0 + r); });
    if (threadIdx.x < Tile::kRight) {
      int& limit = shared.limits[buffer][threadIdx.x];
      load_row(p, head, row0 + threadIdx.x, &shared.stats[buffer][threadIdx.x], &limit);
      const int2 bounds = bounds_of_sixteen(limit);
      if (lane % 16 == 0) shared.bounds[buffer][threadIdx.x / 16] = bounds;
    }
    copy_async_commit();
  };

  int tile = next_tile(0);
  if (tile == num_tiles) {  // no row sees this block: votes of 0
    for (int g = 0; g < static_cast<int>(p.q_per_kv()); ++g) votes.finish_head(g);
  } else {
    load_rows<Tile>(left, Tile::kLeft, head_dim, plan.aligned, p.k,
                    [&](int j) { return head.key(block_key0 + j); });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    typename Tile::Rows rows;
    rows.load(left + warp * Tile::kWarpRows * Tile::kStride, lane);
    if (Tile::kTensorCores) __syncthreads();  // the keys are in registers, their room is free

    load_tile(tile, 0);
    for (int buffer = 0; tile < num_tiles; buffer ^= 1) {
      copy_async_wait<0>();
      __syncthreads();  // this tile has landed, and nobody reads the other any more
      const int next = next_tile(tile + 1);
      if (next < num_tiles) load_tile(next, buffer ^ 1);
      const T* queries = right + buffer * Tile::kRight * Tile::kStride;
#pragma unroll 1
      for (int n = 0; n < Tile::kRight / 16; ++n) {
        const int row0 = tile * Tile::kRight + 16 * n;
        if (row0 >= plan.padded_rows) break;
        const int2 bound = shared.bounds[buffer][n];
        const bool seen = bound.y >= key0;
        const bool masked = key0 < head.start || key0 + Tile::kWarpRows - 1 > bound.x;
        float x[Tile::kBlocks][2][4];
        if (seen) rows.product(x, queries + 16 * n * Tile::kStride, lane);
        join_rows(votes, plan, x, row0, &shared.stats[buffer][16 * n],
                  &shared.limits[buffer][16 * n], seen, masked);
      }
      tile = next;
    }
  }
  votes.finish_group();
}

// Few rows, all in shared memory for as long as the block lives; keys come past them, straight from
// memory to the registers of the warp that takes them, and no barrier stands between. The order of
// the terms of a product is free, so a lane takes 16 bytes of a row at a time for the fragments of
// two steps, of keys and queries alike. Rows lie so that eight lanes meet every bank once.
template <typename Tile>
struct Resident {
  using T = typename Tile::T;
  static constexpr int kDim = Tile::kDim, kBlocks = Tile::kBlocks, kWarpRows = Tile::kWarpRows;
  static constexpr int kWarps = 16, kThreads = kWarps * kWarp;
  static constexpr int kStride = kDim + (kDim % 64 == 0 ? 32 : 0);
  static constexpr int kPairs = kDim / 32;  // of steps
  static_assert(kDim % 32 == 0 && kStride * sizeof(T) % 128 == 64);

  static constexpr int bytes(int sixteens) {
    constexpr int kRow = kStride * sizeof(T) + sizeof(float2) + sizeof(int);
    return sixteens * (16 * kRow + static_cast<int>(sizeof(int2)));
  }

  uint32_t a[kBlocks][2 * kPairs][4];

  __device__ __forceinline__ void load(const Head<T>& head, int key0, int head_dim, int lane) {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const T* row = head.key(key0 + 8 * i + lane / 4);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int d = 32 * pair + lane % 4 * 8;
        uint4 raw = {};
        if (row != nullptr && d < head_dim) raw = __ldcs(reinterpret_cast<const uint4*>(row + d));
        a[i / 2][2 * pair][i % 2] = raw.x;
        a[i / 2][2 * pair][i % 2 + 2] = raw.y;
        a[i / 2][2 * pair + 1][i % 2] = raw.z;
        a[i / 2][2 * pair + 1][i % 2 + 2] = raw.w;
      }
    }
  }
  // Of 16 query rows, in the layout of multiply_add.
  __device__ __forceinline__ void product(float (&c)[kBlocks][2][4], const T* queries,
                                          int lane) const {
    const T* at = queries + lane / 4 * kStride + lane % 4 * 8;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 8; ++i) c[block][i / 4][i % 4] = 0;
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int octet = 0; octet < 2; ++octet) {
        const uint4 b = *reinterpret_cast<const uint4*>(at + 8 * octet * kStride + 32 * pair);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          multiply_add<T>(c[block][octet], a[block][2 * pair], b.x, b.y);
          multiply_add<T>(c[block][octet], a[block][2 * pair + 1], b.z, b.w);
        }
      }
    }
  }
};

// The rows of a query head are filled up to whole 16.
struct ResidentPlan : RowPlan {
  int chunks;  // blocks of a kv head
  int rows_a_head, num_rows, sixteens;

  ResidentPlan(const RowPlan& plan, const WindowScoresParams& p) : RowPlan(plan), chunks(1) {
    rows_a_head = static_cast<int>(ceil_div(p.window, 16)) * 16;
    num_rows = padded_rows = static_cast<int>(p.q_per_kv()) * rows_a_head;
    sixteens = num_rows / 16;
    padded_window = FastDivisor(static_cast<uint32_t>(rows_a_head));
  }
};

template <typename Keys, typename Statistic>
__global__ void __launch_bounds__(Keys::kThreads, 1)
    resident_votes_kernel(const __grid_constant__ WindowScoresParams p,
                          const __grid_constant__ ResidentPlan plan) {
  using T = typename Keys::T;
  extern __shared__ __align__(16) unsigned char memory[];
  const int num_rows = plan.num_rows;
  T* queries = reinterpret_cast<T*>(memory);
  float2* stats = reinterpret_cast<float2*>(queries + num_rows * Keys::kStride);
  int2* bounds = reinterpret_cast<int2*>(stats + num_rows);
  int* limits = reinterpret_cast<int*>(bounds + plan.sixteens);

  const Head<T> head(p, plan, blockIdx.x / plan.chunks);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int head_dim = static_cast<int>(p.head_dim), num_scored = static_cast<int>(p.num_scored);
  load_rows<Keys>(queries, num_rows, head_dim, true, p.q, [&](int r) { return head.query(r); });
  for (int r = threadIdx.x; r < num_rows; r += Keys::kThreads) {
    load_row(p, head, r, stats + r, limits + r);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int r0 = 0; r0 < num_rows; r0 += Keys::kThreads) {
    const int r = r0 + static_cast<int>(threadIdx.x);
    const int2 of_sixteen = bounds_of_sixteen(r < num_rows ? limits[r] : -1);
    if (lane % 16 == 0 && r < num_rows) bounds[r / 16] = of_sixteen;
  }
  __syncthreads();
  int least = INT_MAX;
  for (int n = 0; n < plan.sixteens; ++n) least = min(least, bounds[n].x);

  // A warp takes every (chunks * kWarps)-th group of keys, from the first with a real one on.
  const int step = plan.chunks * Keys::kWarps * Keys::kWarpRows;
  int key0 = ((blockIdx.x % plan.chunks) * Keys::kWarps + warp) * Keys::kWarpRows;
  key0 += max(head.start - Keys::kWarpRows + 1 - key0 + step - 1, 0) / step * step;
#pragma unroll 1
  for (; key0 < num_scored; key0 += step) {
    Keys keys;
    keys.load(head, key0, head_dim, lane);
    if (const T* next = head.key(key0 + step + lane % Keys::kWarpRows)) {
      for (int d = 0; d < head_dim; d += 64) {  // on their way to L2 meanwhile
        asm volatile("prefetch.global.L2 [%0];" ::"l"(next + d));
      }
    }
    Votes<Keys, Statistic> votes(p, head, key0);
    const bool masked = key0 < head.start || key0 + Keys::kWarpRows - 1 > least;
    float x[Keys::kBlocks][2][4];
    if (masked) {
#pragma unroll 1
      for (int n = 0; n < plan.sixteens; ++n) {
        const bool seen = bounds[n].y >= key0;
        if (seen) keys.product(x, queries + 16 * n * Keys::kStride, lane);
        join_rows(votes, plan, x, 16 * n, stats + 16 * n, limits + 16 * n, seen, true);
      }
    } else {  // nothing but products and exponentials between the ends of the heads
      const T* rows = queries;
      const float2* of_rows = stats + 2 * (lane % 4);
      for (int g = 0; g < plan.num_rows / plan.rows_a_head; ++g) {
#pragma unroll 1
        for (int n = 0; n < plan.rows_a_head; n += 16) {
          keys.product(x, rows, lane);
#pragma unroll
          for (int octet = 0; octet < 2; ++octet) {
            const float4 two = *reinterpret_cast<const float4*>(of_rows + 8 * octet);
            votes.template join<false>(x, octet, two, int2{});
          }
          rows += 16 * Keys::kStride;
          of_rows += 16;
        }
        votes.finish_head(g);
      }
    }
    votes.finish_group();
  }
}

// --- pass 3

// Votes of a column: of one head, or of `planes` row groups that the group's reduction joins.
__device__ __forceinline__ float joined(const WindowScoresParams& p, const float* votes,
                                        int planes) {
  float all = votes[0];
  for (int i = 1; i < planes; ++i) {
    const float one = votes[i * p.seq_len];
    all = p.group_reduce == GroupReduce::kMax ? nan_max(all, one) : all + one;
  }
  return all;
}

constexpr int kColumnThreads = 256;
constexpr int kColumns = 2 * kColumnThreads;  // of a block
constexpr int kMaxHalo = 128;                 // columns on either side that a pool may reach for

__global__ void __launch_bounds__(kColumnThreads)
    write_scores_kernel(const __grid_constant__ WindowScoresParams p, int blocks_per_row,
                        int planes) {
  __shared__ float line[kColumns + 2 * kMaxHalo];
  const int row = static_cast<int>(blockIdx.x / static_cast<unsigned>(blocks_per_row));
  const int64_t j0 =
      static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(blocks_per_row)) * kColumns;
  const int out_heads = static_cast<int>(p.out_heads()), b = row / out_heads, h = row % out_heads;
  int64_t start = 0;
  if (p.seq_start) start = min(max(static_cast<int64_t>(p.seq_start[b]), int64_t{0}), p.seq_len);
  const int64_t half = p.pool == Pool::kNone ? 0 : p.kernel_size / 2;
  const int group = static_cast<int>(p.vote_heads()) / out_heads;  // 1 unless the pool came first
  const int64_t row_votes = planes * p.seq_len;
  const float* votes = p.votes + (b * p.vote_heads() + h * group) * row_votes;

  float scores[kColumns / kColumnThreads];
  for (int g = 0; g < group; ++g, votes += row_votes) {
    if (half <= kMaxHalo) {
      if (g > 0) __syncthreads();
#pragma unroll 4
      for (int i = threadIdx.x; i < kColumns + 2 * half; i += kColumnThreads) {
        const int64_t j = j0 - half + i;
        if (j >= start && j < p.num_scored) line[i] = joined(p, votes + j, planes);
      }
      __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < kColumns / kColumnThreads; ++c) {
      const int64_t j = j0 + c * kColumnThreads + threadIdx.x;
      if (j < start || j >= p.num_scored) continue;
      const int64_t first = max(j - half, start), last = min(j + half + 1, p.num_scored);
      const float one =
          half > kMaxHalo
              ? pooled(p.pool, p.kernel_size, first, last,
                       [&](int64_t i) { return joined(p, votes + i, planes); })
              : pooled(p.pool, p.kernel_size, static_cast<int>(first - j0 + half),
                       static_cast<int>(last - j0 + half), [&](int i) { return line[i]; });
      scores[c] = g == 0                                ? one
                  : p.group_reduce == GroupReduce::kMax ? nan_max(scores[c], one)
                                                        : scores[c] + one;
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns / kColumnThreads; ++c) {
    const int64_t j = j0 + c * kColumnThreads + threadIdx.x;
    if (j >= p.seq_len) continue;
    float score = scores[c];
    if (group > 1 && p.group_reduce == GroupReduce::kMean) score /= static_cast<float>(group);
    p.out[row * p.seq_len + j] = j < start ? -kInf : j >= p.num_scored ? kInf : score;
  }
}

// Hopper's passes wherever they fit: 16-bit elements, 16-byte steps, a window within a row group
// and no maximum over it.
bool use_wgmma(const WindowScoresParams& p) {
  return device_limits().major == 9 && p.num_scored > 0 && window_scores_fits_sm90a(p);
}

// --- launch

// Blocks a head for kernels of one block a multiprocessor: fill the machine once if that leaves few
// of them idle, else about three times.
int chunks_of_keys(int64_t heads, int64_t most) {
  const int64_t slots = device_limits().multiprocessors, once = slots / heads;
  const int64_t wanted = once * heads * 10 >= slots * 9 ? once : ceil_div(3 * slots, heads);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, most));
}

template <typename Tile, typename Statistic>
void launch_votes(const WindowScoresParams& p, cudaStream_t stream) {
  const RowPlan plan = make_row_plan<typename Tile::T>(p);
  if constexpr (Tile::kTensorCores) {
    using Keys = Resident<Tile>;
    const int64_t most = device_limits().shared_bytes / Keys::bytes(1) * 16;
    if (plan.aligned && p.q_per_kv() * ceil_div(p.window, 16) * 16 <= most) {
      ResidentPlan own(plan, p);
      own.chunks = chunks_of_keys(plan.num_heads, ceil_div(p.num_scored, Keys::kWarpRows));
      return launch_tiles(resident_votes_kernel<Keys, Statistic>,
                          static_cast<int64_t>(own.num_heads) * own.chunks, Keys::kThreads,
                          Keys::bytes(own.sixteens), kOp, stream, p, own);
    }
  }
  const int64_t blocks = ceil_div(p.num_scored, Tile::kLeft) * plan.num_heads;
  constexpr int kSharedBytes = Tile::kTileBytes + sizeof(Shared<Tile>);
  launch_tiles(column_votes_kernel<Tile, Statistic>, blocks, Tile::kThreads, kSharedBytes, kOp,
               stream, p, plan);
}

template <typename T>
void launch(const WindowScoresParams& p, cudaStream_t stream) {
  const bool wgmma = use_wgmma(p);
  if (wgmma) {
    window_votes_sm90a(p, stream);
    if (window_scores_pools_sm90a(p)) return;
  } else if (p.num_scored > 0) {
    row_statistics_cuda(p, stream, kOp);
    visit_head_dim<T>(p.head_dim, [&](auto tile) {
      using Tile = decltype(tile);
      p.window_reduce == WindowReduce::kMax ? launch_votes<Tile, MaxOfRows>(p, stream)
                                            : launch_votes<Tile, SumOfRows>(p, stream);
    });
  }
  const int64_t blocks_per_row = ceil_div(p.seq_len, kColumns);
  const int64_t rows = p.batch * p.out_heads();
  const bool planes = wgmma && !p.votes_per_q_head();
  Launch(static_cast<unsigned>(blocks_per_row * rows), kColumnThreads, 0, stream)(
      kOp, write_scores_kernel, p, static_cast<int>(blocks_per_row),
      planes ? static_cast<int>(p.row_groups()) : 1);
}

}  // namespace

void window_scores_cuda(const WindowScoresParams& params, void* stream) {
  visit_float_cuda(params.dtype, kOp, [&](auto tag) {
    launch<decltype(tag)>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace kvc
