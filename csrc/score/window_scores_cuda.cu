// window_scores on CUDA, sm_80 and later, behind row_statistics_cuda:
//   pass 2  left = keys, right = queries. Block = (key tile, kv head); a column's vote is added up
//   inside a thread
//           over all rows of a query head, two shuffles join the quad. Rows that see no key of the
//           tile are skipped.
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
  const int num_scored = static_cast<int>(p.num_scored), head_dim = static_cast<int>(p.head_dim);
  if (min(block_key0 + Tile::kLeft, num_scored) <= head.start)
    return;  // padding: nobody reads these votes
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int key0 = block_key0 + warp * Tile::kWarpRows;
  const int q_per_kv = static_cast<int>(p.q_per_kv());

  float votes[Tile::kBlocks][2] = {}, group[Tile::kBlocks][2] = {};
  float factor = 1;
  if (p.window_reduce == WindowReduce::kMean) {
    const int64_t real = min(max(p.first_query + p.window - head.start, int64_t{1}), p.window);
    factor = 1.0f / static_cast<float>(real);
  }
  // All rows of query head g are in: the quad's parts become the vote, which is written or joins
  // the group.
  const auto finish_head = [&](int g) {
#pragma unroll
    for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
      float vote = votes[i / 2][i % 2];
      votes[i / 2][i % 2] = 0;
      vote = Statistic::merge(vote, __shfl_xor_sync(0xffffffffu, vote, 1));
      vote = Statistic::merge(vote, __shfl_xor_sync(0xffffffffu, vote, 2)) * factor;
      const int key = key0 + 8 * i + lane / 4;
      if (p.weights && key < num_scored) {
        vote *= p.weights[head.b * p.weights_batch_stride + head.h * p.weights_head_stride + key];
      }
      float& all = group[i / 2][i % 2];
      if (p.votes_per_q_head()) {
        const int64_t row = head.b * p.num_q_heads + static_cast<int64_t>(head.h) * q_per_kv + g;
        if (lane % 4 == 0 && key < num_scored) p.votes[row * p.seq_len + key] = vote;
      } else {
        all = g == 0 ? vote : p.group_reduce == GroupReduce::kMax ? nan_max(all, vote) : all + vote;
      }
    }
  };

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
      const int r = row0 + threadIdx.x, limit = head.limit(r);
      const float2* stats = reinterpret_cast<const float2*>(p.row_stats);
      if (limit >= 0) {
        const int g = plan.padded_window.quotient(r);
        stats += head.row_index(g, r - g * static_cast<int>(plan.padded_window.divisor));
      }
      copy_async_8(&shared.stats[buffer][threadIdx.x], stats, limit >= 0);
      shared.limits[buffer][threadIdx.x] = limit;
      int least = limit < 0 ? INT_MAX : limit, greatest = limit;
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        least = min(least, __shfl_xor_sync(0xffffffffu, least, offset));
        greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
      }
      if (lane % 16 == 0) shared.bounds[buffer][threadIdx.x / 16] = make_int2(least, greatest);
    }
    copy_async_commit();
  };

  int tile = next_tile(0);
  if (tile == num_tiles) {  // no row sees this block: votes of 0
    for (int g = 0; g < q_per_kv; ++g) finish_head(g);
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
#pragma unroll
        for (int octet = 0; octet < 2; ++octet) {
          const int row = row0 + 8 * octet;
          if (row >= plan.padded_rows) break;
          if (seen) {
            const int at = 16 * n + 8 * octet + 2 * (lane % 4);
            const float4 stats = *reinterpret_cast<const float4*>(&shared.stats[buffer][at]);
            const int2 limit = *reinterpret_cast<const int2*>(&shared.limits[buffer][at]);
            const auto join = [&](auto masked_too) {
#pragma unroll
              for (int i = 0; i < 4 * Tile::kBlocks; ++i) {
                const int block = i / 4, half = i / 2 % 2, j = i % 2;
                const float e = exp2_approx(fmaf(x[block][octet][2 * half + j], p.scale_log2,
                                                 -(j == 0 ? stats.x : stats.z)));
                float& vote = votes[block][half];
                const float joined = Statistic::join(vote, e, j == 0 ? stats.y : stats.w);
                if constexpr (masked_too) {
                  const int key = key0 + 16 * block + 8 * half + lane / 4;
                  const bool visible = key >= head.start && key <= (j == 0 ? limit.x : limit.y);
                  vote = visible ? joined : vote;
                } else {
                  vote = joined;
                }
              }
            };
            if (masked) {
              join(std::true_type{});
            } else {
              join(std::false_type{});
            }
          }
          const int g = plan.padded_window.quotient(row);
          if (row + 8 == (g + 1) * static_cast<int>(plan.padded_window.divisor)) finish_head(g);
        }
      }
      tile = next;
    }
  }
  if (p.votes_per_q_head() || lane % 4 != 0) return;
  const float divisor = p.group_reduce == GroupReduce::kMean ? static_cast<float>(q_per_kv) : 1.0f;
#pragma unroll
  for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
    const int key = key0 + 8 * i + lane / 4;
    if (key >= num_scored) continue;
    p.votes[(head.b * p.num_kv_heads + head.h) * p.seq_len + key] = group[i / 2][i % 2] / divisor;
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

// Hopper's passes wherever they fit: 16-bit elements, head_dim to 128, 16-byte steps, window to 256
// and no maximum over it.
bool use_wgmma(const WindowScoresParams& p) {
  return device_limits().major == 9 && p.num_scored > 0 && window_scores_fits_sm90a(p);
}

// --- launch

template <typename Tile>
void launch_votes(const WindowScoresParams& p, cudaStream_t stream) {
  const RowPlan plan = make_row_plan<typename Tile::T>(p);
  const int64_t blocks = ceil_div(p.num_scored, Tile::kLeft) * plan.num_heads;
  const auto kernel = p.window_reduce == WindowReduce::kMax ? column_votes_kernel<Tile, MaxOfRows>
                                                            : column_votes_kernel<Tile, SumOfRows>;
  constexpr int kSharedBytes = Tile::kTileBytes + sizeof(Shared<Tile>);
  launch_tiles(kernel, blocks, Tile::kThreads, kSharedBytes, kOp, stream, p, plan);
}

template <typename T>
void launch(const WindowScoresParams& p, cudaStream_t stream) {
  const bool wgmma = use_wgmma(p);
  if (wgmma) {
    window_votes_sm90a(p, stream);
    if (window_scores_pools_sm90a(p)) return;
  } else if (p.num_scored > 0) {
    row_statistics_cuda(p, stream, kOp);
    visit_head_dim<T>(p.head_dim, [&](auto tile) { launch_votes<decltype(tile)>(p, stream); });
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
