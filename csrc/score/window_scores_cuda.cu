// window_scores on CUDA, sm_80 and later.
//
// The query rows of a kv head are packed: r = head in group * padded window + i, the window padded
// to whole groups of 8 rows, so that the 8 right rows of one tensor-core product belong to one
// query head. Both passes multiply rows that a warp keeps (left, in registers) with tiles of rows
// that stream through two shared-memory buffers (right):
//   pass 1  left = queries, right = keys. Block = (row tile, chunk of keys); a thread keeps a
//   reference and a sum of
//           exp2(x - reference) for each of its rows, merged over lanes and warps at the end, over
//           chunks by finish.
//   pass 2  left = keys, right = queries. Block = (key tile, kv head); a column's vote is added up
//   inside a thread
//           over all rows of a query head, two shuffles join the quad. Rows that see no key of the
//           tile are skipped.
//   pass 3  a thread an output column: group, pool, fills.
// Bound: k read once a pass, 2 q_per_kv window head_dim FLOP and q_per_kv window exp2 an entry and
// pass. Every order of addition follows from sizes (and the SM count, in pass 1): no atomics. NaN
// goes through maxima by max.NaN.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "device/check.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "score/window_scores_sm90a.h"

namespace kvc {
namespace {

constexpr const char* kOp = "window_scores";
constexpr float kInf = __builtin_huge_valf();
constexpr float kLowest =
    -1.7e38f;  // stands for "no logit yet": finite, so that differences are never NaN

template <typename T_, int kDim_>
struct Traits {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim, filled up with zeros in shared memory
  static constexpr bool kTensorCores = sizeof(T) == 2;
  // Of 16 rows a warp keeps: 64 registers at most. For float32 as many warps and rows as 99 KB of
  // shared memory hold.
  static constexpr int kBlocks = kDim <= (kTensorCores ? 128 : 64) ? 2 : 1;
  static constexpr int kWarps = kTensorCores ? 8 : kDim <= 128 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kMinBlocks = kTensorCores ? 2 : 1;  // an SM
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kLeft = kWarps * kWarpRows;              // rows a block keeps
  static constexpr int kRight = kTensorCores ? kLeft / 2 : 32;  // rows of a streamed tile
  using Rows = ResidentRows<T, kDim, kBlocks>;
  static constexpr int kStride = Rows::kStride;
  static constexpr int kLeftBytes = kLeft * kStride * sizeof(T);
  static constexpr int kRightBytes = kRight * kStride * sizeof(T);
  // Left rows on their way to registers share the room with the streamed tiles.
  static constexpr int kStreamOffset = kTensorCores ? 0 : kLeftBytes;
  static constexpr int kTileBytes = kStreamOffset + 2 * kRightBytes;
  static_assert(kTileBytes >= kLeftBytes && kLeftBytes % 16 == 0 && kRightBytes % 16 == 0);
  static_assert(kRight % kWarp == 0 && kRight <= kThreads);
  static_assert(kTensorCores || kTileBytes <= 99 * 1024 - 1088);

  // What pass 2 knows of a streamed query row, and pass 1 merges.
  struct Shared {
    float2 stats[2][kRight];      // (max, 1 / sum)
    int limits[2][kRight];        // last visible key, -1 for padding
    int2 bounds[2][kRight / 16];  // (least, greatest) limit of the real rows of 16
    float2 parts[kWarps][kWarpRows];
  };
  static constexpr int kSharedBytes = kTileBytes + sizeof(Shared);
};

// How the work is cut; all of it follows from sizes and the SM count.
struct Plan {
  FastDivisor padded_window;
  int padded_rows;        // q_per_kv * padded window
  int num_heads;          // batch * num_kv_heads
  int warps_of_rows;      // pass 1: warps that stand side by side over rows, the others over keys
  int row_tiles, chunks;  // pass 1
  int keys_per_chunk;
  bool aligned;  // 16-byte loads
};

// --- who am I

// One batch row and kv head, and its packed query rows.
template <typename T>
struct Head {
  const WindowScoresParams& p;
  const Plan& plan;
  int b, h, start, seq_len;

  __device__ __forceinline__ Head(const WindowScoresParams& p, const Plan& plan, int head)
      : p(p),
        plan(plan),
        b(head / static_cast<int>(p.num_kv_heads)),
        h(head % static_cast<int>(p.num_kv_heads)),
        start(0),
        seq_len(static_cast<int>(p.seq_len)) {
    if (p.seq_start) start = min(max(p.seq_start[b], 0), seq_len);
  }

  // Last key that query i sees, -1 if it is padding.
  __device__ __forceinline__ int limit_of_query(int64_t i) const {
    const int64_t position = p.first_query + i;
    if (i >= p.window || position < start) return -1;
    return static_cast<int>(min(position, p.seq_len - 1));
  }
  __device__ __forceinline__ int limit(int r) const {
    if (r >= plan.padded_rows) return -1;
    const int g = plan.padded_window.quotient(r);
    return limit_of_query(r - g * static_cast<int>(plan.padded_window.divisor));
  }
  // The greatest limit of the rows [first, last).
  __device__ __forceinline__ int greatest_limit(int first, int last) const {
    last = min(last, plan.padded_rows) - 1;
    if (first > last) return -1;
    const int padded = static_cast<int>(plan.padded_window.divisor);
    const int g = plan.padded_window.quotient(last), i = last - g * padded;
    const bool has_end = plan.padded_window.quotient(first) != g || i >= p.window;
    return limit_of_query(has_end ? p.window - 1 : i);
  }
  // Index of a real row among all rows [batch, num_q_heads, window].
  __device__ __forceinline__ int64_t row_index(int g, int i) const {
    return ((b * p.num_kv_heads + h) * p.q_per_kv() + g) * p.window + i;
  }

  // Null for padding, which then counts as zeros.
  __device__ __forceinline__ const T* query(int r) const {
    if (r >= plan.padded_rows) return nullptr;
    const int g = plan.padded_window.quotient(r);
    const int i = r - g * static_cast<int>(plan.padded_window.divisor);
    if (limit_of_query(i) < 0) return nullptr;
    return static_cast<const T*>(p.q) + b * p.q_batch_stride +
           (h * p.q_per_kv() + g) * p.q_head_stride + i * p.q_row_stride;
  }
  __device__ __forceinline__ const T* key(int j) const {
    if (j >= seq_len) return nullptr;
    return static_cast<const T*>(p.k) + b * p.k_batch_stride + h * p.k_head_stride +
           j * p.k_row_stride;
  }
};

// --- loading

// `rows` rows to shared memory, row_at(r) each, zeros where it is null and beyond head_dim.
template <typename Traits, typename RowAt>
__device__ __forceinline__ void load_rows(typename Traits::T* to, int rows, int head_dim,
                                          bool aligned, const void* somewhere, RowAt&& row_at) {
  using T = typename Traits::T;
  constexpr int kVec = Vec<T>::kSize, kVecs = Traits::kDim / kVec;
  for (int item = threadIdx.x; item < rows * kVecs; item += Traits::kThreads) {
    const int r = item / kVecs, d = item % kVecs * kVec;
    const T* from = row_at(r);
    T* at = to + r * Traits::kStride + d;
    const bool inside = from != nullptr && d < head_dim;
    if (aligned) {
      copy_async_16(at, inside ? static_cast<const void*>(from + d) : somewhere, inside);
    } else {
      Vec<T> vec;
#pragma unroll
      for (int i = 0; i < kVec; ++i) vec.data[i] = inside ? from[d + i] : from_float<T>(0.0f);
      *reinterpret_cast<Vec<T>*>(at) = vec;
    }
  }
}

// --- pass 1

// Sum of exp2(x - most) of one row. `most` follows the maximum only when that runs 8 ahead: terms
// stay below 2^8, and the loop hardly ever rescales.
struct RunningSum {
  float most = kLowest, sum = 0;

  __device__ __forceinline__ void add(const float (&x)[4], float scale) {
    const float top = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) * scale;
    if (top > most + 8.0f) {
      sum *= exp2_approx(most - top);
      most = top;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += exp2_approx(fmaf(x[i], scale, -most));
  }
  __device__ __forceinline__ void merge(float other_most, float other_sum) {
    const float top = fmaxf(most, other_most);
    sum = sum * exp2_approx(most - top) + other_sum * exp2_approx(other_most - top);
    most = top;
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    row_statistics_kernel(const __grid_constant__ WindowScoresParams p,
                          const __grid_constant__ Plan plan) {
  using T = typename Traits::T;
  extern __shared__ __align__(16) unsigned char memory[];
  T* left = reinterpret_cast<T*>(memory);
  T* right = reinterpret_cast<T*>(memory + Traits::kStreamOffset);
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory + Traits::kTileBytes);

  // Later rows see more keys: they come first, so that the longest blocks do not end the launch.
  const int chunk = blockIdx.x % plan.chunks, tile = blockIdx.x / plan.chunks % plan.row_tiles;
  const Head<T> head(p, plan, blockIdx.x / (plan.chunks * plan.row_tiles));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int block_rows = plan.warps_of_rows * Traits::kWarpRows;
  const int row0 = (plan.row_tiles - 1 - tile) * block_rows;
  const int warp_m = warp % plan.warps_of_rows, warp_n = warp / plan.warps_of_rows;
  const int warps_n = Traits::kWarps / plan.warps_of_rows;

  // [first, last): the keys of the chunk that any row sees, from a whole tile on.
  int first = chunk * plan.keys_per_chunk;
  first += max(head.start - first, 0) / Traits::kRight * Traits::kRight;
  const int last =
      min((chunk + 1) * plan.keys_per_chunk, head.greatest_limit(row0, row0 + block_rows) + 1);

  typename Traits::Rows rows;
  RunningSum sums[Traits::kBlocks][2];
  int limits[Traits::kBlocks][2], least = INT_MAX, greatest = -1;
#pragma unroll
  for (int i = 0; i < 2 * Traits::kBlocks; ++i) {
    const int limit = head.limit(row0 + warp_m * Traits::kWarpRows + 8 * i + lane / 4);
    limits[i / 2][i % 2] = limit;
    least = min(least, limit < 0 ? INT_MAX : limit);
    greatest = max(greatest, limit);
  }
  least = __reduce_min_sync(0xffffffffu, least);
  greatest = __reduce_max_sync(0xffffffffu, greatest);

  if (first < last) {
    const int head_dim = static_cast<int>(p.head_dim);
    load_rows<Traits>(left, block_rows, head_dim, plan.aligned, p.q,
                      [&](int r) { return head.query(row0 + r); });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    rows.load(left + warp_m * Traits::kWarpRows * Traits::kStride, lane);
    if (Traits::kTensorCores)
      __syncthreads();  // the left rows are in registers, their room is free

    const auto load_tile = [&](int key0, int buffer) {
      load_rows<Traits>(right + buffer * Traits::kRight * Traits::kStride, Traits::kRight, head_dim,
                        plan.aligned, p.k, [&](int j) { return head.key(key0 + j); });
      copy_async_commit();
    };
    load_tile(first, 0);
    int buffer = 0;
    for (int key0 = first; key0 < last; key0 += Traits::kRight, buffer ^= 1) {
      copy_async_wait<0>();
      __syncthreads();  // this tile has landed, and nobody reads the other any more
      if (key0 + Traits::kRight < last) load_tile(key0 + Traits::kRight, buffer ^ 1);
      const T* keys = right + buffer * Traits::kRight * Traits::kStride;
      for (int n = warp_n; n < Traits::kRight / 16; n += warps_n) {
        const int key = key0 + 16 * n;
        if (key > greatest) break;
        float x[Traits::kBlocks][2][4];
        rows.product(x, keys + 16 * n * Traits::kStride, lane);
        const bool masked = key < head.start || key + 15 > least;
#pragma unroll
        for (int i = 0; i < 2 * Traits::kBlocks; ++i) {
          const int block = i / 2, half = i % 2;
          float row[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) row[j] = x[block][j / 2][2 * half + j % 2];
          if (masked) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int column = key + 8 * (j / 2) + 2 * (lane % 4) + j % 2;
              if (column < head.start || column > limits[block][half]) row[j] = -kInf;
            }
          }
          sums[block][half].add(row, p.scale_log2);
        }
      }
    }
  }

  // Merge over the four lanes of a row, then over the warps that shared it.
#pragma unroll
  for (int i = 0; i < 2 * Traits::kBlocks; ++i) {
    RunningSum& sum = sums[i / 2][i % 2];
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      const float most = __shfl_xor_sync(0xffffffffu, sum.most, offset);
      const float other = __shfl_xor_sync(0xffffffffu, sum.sum, offset);
      sum.merge(most, other);
    }
    if (lane % 4 == 0) shared.parts[warp][8 * i + lane / 4] = make_float2(sum.most, sum.sum);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < block_rows; r += Traits::kThreads) {
    const int m = r / Traits::kWarpRows;
    RunningSum sum;
    for (int n = 0; n < warps_n; ++n) {
      const float2 part = shared.parts[n * plan.warps_of_rows + m][r % Traits::kWarpRows];
      sum.merge(part.x, part.y);
    }
    if (row0 + r >= plan.padded_rows) continue;
    const int g = plan.padded_window.quotient(row0 + r);
    const int i = row0 + r - g * static_cast<int>(plan.padded_window.divisor);
    if (i >= p.window) continue;
    float2* to =
        reinterpret_cast<float2*>(p.row_stats) + chunk * p.num_rows() + head.row_index(g, i);
    *to = make_float2(sum.most, sum.sum);
  }
}

// A thread a row: merges its chunks in ascending order into (max, 1 / sum), or makes the pair of a
// given log-sum-exp.
__global__ void finish_rows_kernel(const __grid_constant__ WindowScoresParams p, int chunks) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_rows = p.num_rows();
  if (row >= num_rows) return;
  float2* stats = reinterpret_cast<float2*>(p.row_stats) + row;
  if (p.lse) {
    const int64_t i = row % p.window, h = row / p.window % p.num_q_heads;
    const int64_t b = row / (p.window * p.num_q_heads);
    const float lse = p.lse[b * p.lse_batch_stride + h * p.lse_head_stride + i];
    *stats = make_float2(lse * static_cast<float>(kLog2e), 1.0f);
    return;
  }
  float most = kLowest, sum = 0;
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) most = fmaxf(most, stats[c * num_rows].x);
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) {
    const float2 part = stats[c * num_rows];
    sum += part.y * exp2_approx(part.x - most);
  }
  *stats = make_float2(most, 1.0f / sum);
}

// --- pass 2

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

template <typename Traits, typename Statistic>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    column_votes_kernel(const __grid_constant__ WindowScoresParams p,
                        const __grid_constant__ Plan plan) {
  using T = typename Traits::T;
  extern __shared__ __align__(16) unsigned char memory[];
  T* left = reinterpret_cast<T*>(memory);
  T* right = reinterpret_cast<T*>(memory + Traits::kStreamOffset);
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory + Traits::kTileBytes);

  // Early keys are seen by more rows: they come first.
  const Head<T> head(p, plan, blockIdx.x % plan.num_heads);
  const int block_key0 = static_cast<int>(blockIdx.x / plan.num_heads) * Traits::kLeft;
  const int num_scored = static_cast<int>(p.num_scored), head_dim = static_cast<int>(p.head_dim);
  if (min(block_key0 + Traits::kLeft, num_scored) <= head.start)
    return;  // padding: nobody reads these votes
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int key0 = block_key0 + warp * Traits::kWarpRows;
  const int q_per_kv = static_cast<int>(p.q_per_kv());

  float votes[Traits::kBlocks][2] = {}, group[Traits::kBlocks][2] = {};
  float factor = 1;
  if (p.window_reduce == WindowReduce::kMean) {
    const int64_t real = min(max(p.first_query + p.window - head.start, int64_t{1}), p.window);
    factor = 1.0f / static_cast<float>(real);
  }
  // All rows of query head g are in: the quad's parts become the vote, which is written or joins
  // the group.
  const auto finish_head = [&](int g) {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kBlocks; ++i) {
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

  const int num_tiles = (plan.padded_rows + Traits::kRight - 1) / Traits::kRight;
  const auto next_tile =
      [&](int tile) {  // the first from here on with a row that sees a key of this block
        while (tile < num_tiles && head.greatest_limit(tile * Traits::kRight,
                                                       (tile + 1) * Traits::kRight) < block_key0) {
          ++tile;
        }
        return tile;
      };
  const auto load_tile = [&](int tile, int buffer) {
    const int row0 = tile * Traits::kRight;
    load_rows<Traits>(right + buffer * Traits::kRight * Traits::kStride, Traits::kRight, head_dim,
                      plan.aligned, p.q, [&](int r) { return head.query(row0 + r); });
    if (threadIdx.x < Traits::kRight) {
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
    load_rows<Traits>(left, Traits::kLeft, head_dim, plan.aligned, p.k,
                      [&](int j) { return head.key(block_key0 + j); });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    typename Traits::Rows rows;
    rows.load(left + warp * Traits::kWarpRows * Traits::kStride, lane);
    if (Traits::kTensorCores) __syncthreads();  // the keys are in registers, their room is free

    load_tile(tile, 0);
    for (int buffer = 0; tile < num_tiles; buffer ^= 1) {
      copy_async_wait<0>();
      __syncthreads();  // this tile has landed, and nobody reads the other any more
      const int next = next_tile(tile + 1);
      if (next < num_tiles) load_tile(next, buffer ^ 1);
      const T* queries = right + buffer * Traits::kRight * Traits::kStride;
#pragma unroll 1
      for (int n = 0; n < Traits::kRight / 16; ++n) {
        const int row0 = tile * Traits::kRight + 16 * n;
        if (row0 >= plan.padded_rows) break;
        const int2 bound = shared.bounds[buffer][n];
        const bool seen = bound.y >= key0;
        const bool masked = key0 < head.start || key0 + Traits::kWarpRows - 1 > bound.x;
        float x[Traits::kBlocks][2][4];
        if (seen) rows.product(x, queries + 16 * n * Traits::kStride, lane);
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
              for (int i = 0; i < 4 * Traits::kBlocks; ++i) {
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
  for (int i = 0; i < 2 * Traits::kBlocks; ++i) {
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
constexpr int kColumns = 4 * kColumnThreads;  // of a block
constexpr int kMaxHalo = 128;                 // columns on either side that a pool may reach for

// Columns [first, last) of votes, or of a copy of them in shared memory.
template <typename VoteAt>
__device__ __forceinline__ float pooled(const WindowScoresParams& p, int64_t first, int64_t last,
                                        VoteAt&& vote_at) {
  float all = p.pool == Pool::kMax ? -kInf : 0.0f;
  for (int64_t i = first; i < last; ++i) {
    const float vote = vote_at(i);
    all = p.pool == Pool::kMax ? nan_max(all, vote) : all + vote;
  }
  return p.pool == Pool::kAvg ? all / static_cast<float>(p.kernel_size) : all;
}

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
  launch_wait();  // for the votes

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
              ? pooled(p, first, last, [&](int64_t i) { return joined(p, votes + i, planes); })
              : pooled(p, first - j0 + half, last - j0 + half, [&](int64_t i) { return line[i]; });
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

// --- policy

// Hopper's passes wherever they fit: 16-bit elements, head_dim to 128, 16-byte steps, window to 256
// and no maximum over it.
bool use_wgmma(const WindowScoresParams& p) {
  return device_limits().major == 9 && p.num_scored > 0 && window_scores_fits_sm90a(p);
}

template <typename T>
bool loads_of_16_bytes(const WindowScoresParams& p) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const int64_t all = p.q_batch_stride | p.q_head_stride | p.q_row_stride | p.k_batch_stride |
                      p.k_head_stride | p.k_row_stride;
  return aligned(p.q) && aligned(p.k) && all % Vec<T>::kSize == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename Traits>
Plan make_plan(const WindowScoresParams& p) {
  const int64_t padded_window = ceil_div(p.window, 8) * 8;
  const int64_t rows = p.q_per_kv() * padded_window, heads = p.batch * p.num_kv_heads;
  int warps_of_rows = 1;
  while (warps_of_rows < Traits::kWarps && warps_of_rows * Traits::kWarpRows < rows)
    warps_of_rows *= 2;
  const int64_t row_tiles = ceil_div(rows, warps_of_rows * Traits::kWarpRows);
  // Chunks fill the machine once if that leaves few slots empty, else about three times.
  const int64_t slots = static_cast<int64_t>(device_limits().multiprocessors) * Traits::kMinBlocks;
  const int64_t items = heads * row_tiles;
  const int64_t once = slots / items;
  const int64_t wanted = once * items * 10 >= slots * 9 ? once : ceil_div(3 * slots, items);
  const int64_t most = std::min(p.max_chunks, ceil_div(p.seq_len, Traits::kRight));
  const int64_t per_chunk =
      ceil_div(ceil_div(p.seq_len, std::clamp<int64_t>(wanted, 1, most)), Traits::kRight) *
      Traits::kRight;
  return {
      .padded_window = FastDivisor(static_cast<uint32_t>(padded_window)),
      .padded_rows = static_cast<int>(rows),
      .num_heads = static_cast<int>(heads),
      .warps_of_rows = warps_of_rows,
      .row_tiles = static_cast<int>(row_tiles),
      .chunks = static_cast<int>(ceil_div(p.seq_len, per_chunk)),
      .keys_per_chunk = static_cast<int>(per_chunk),
      .aligned = loads_of_16_bytes<typename Traits::T>(p),
  };
}

// --- launch

template <typename Traits, typename Kernel>
void launch_tiles(Kernel kernel, int64_t blocks, const WindowScoresParams& p, const Plan& plan,
                  cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Traits::kSharedBytes),
             kOp);
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(p,
                                                                                            plan);
  launch_check(kOp);
}

template <typename T, int kDim>
void launch_passes(const WindowScoresParams& p, cudaStream_t stream) {
  using Tr = Traits<T, kDim>;
  const Plan plan = make_plan<Tr>(p);
  if (!p.lse) {
    launch_tiles<Tr>(row_statistics_kernel<Tr>,
                     static_cast<int64_t>(plan.num_heads) * plan.row_tiles * plan.chunks, p, plan,
                     stream);
  }
  finish_rows_kernel<<<static_cast<unsigned>(ceil_div(p.num_rows(), 64)), 64, 0, stream>>>(
      p, plan.chunks);
  launch_check(kOp);
  const int64_t blocks = ceil_div(p.num_scored, Tr::kLeft) * plan.num_heads;
  if (p.window_reduce == WindowReduce::kMax) {
    launch_tiles<Tr>(column_votes_kernel<Tr, MaxOfRows>, blocks, p, plan, stream);
  } else {
    launch_tiles<Tr>(column_votes_kernel<Tr, SumOfRows>, blocks, p, plan, stream);
  }
}

// The head_dims with a kernel of their own; the others take the next larger.
template <typename T>
void launch(const WindowScoresParams& p, cudaStream_t stream) {
  const bool wgmma = use_wgmma(p);
  if (wgmma) {
    window_votes_sm90a(p, stream);
  } else if (p.num_scored > 0) {
    constexpr bool kAll = sizeof(T) == 2;
    if (p.head_dim <= 64) {
      launch_passes<T, 64>(p, stream);
    } else if (kAll && p.head_dim <= 96) {
      launch_passes<T, kAll ? 96 : 128>(p, stream);
    } else if (p.head_dim <= 128) {
      launch_passes<T, 128>(p, stream);
    } else if (kAll && p.head_dim <= 192) {
      launch_passes<T, kAll ? 192 : 256>(p, stream);
    } else {
      launch_passes<T, 256>(p, stream);
    }
  }
  const int64_t blocks_per_row = ceil_div(p.seq_len, kColumns);
  const int64_t rows = p.batch * p.out_heads();
  const bool planes = wgmma && !p.votes_per_q_head();
  Launch(static_cast<unsigned>(blocks_per_row * rows), kColumnThreads, 0, stream)
      .early(wgmma)(kOp, write_scores_kernel, p, static_cast<int>(blocks_per_row),
                    planes ? static_cast<int>(p.row_groups()) : 1);
}

}  // namespace

void window_scores_cuda(const WindowScoresParams& params, void* stream) {
  visit_float_cuda(params.dtype, kOp, [&](auto tag) {
    launch<decltype(tag)>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace kvc
