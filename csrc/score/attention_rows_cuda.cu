// Row statistics on CUDA, sm_80 and later: left = queries, right = keys. Block = (row tile, chunk
// of keys); a thread keeps a reference and a sum of exp2(x - reference) for each of its rows,
// merged over lanes and warps at the end, over chunks by finish_rows_kernel.
#include <climits>

#include "device/limits.cuh"
#include "score/attention_rows.cuh"

namespace kvc {
namespace {

constexpr float kLowest =
    -1.7e38f;  // stands for "no logit yet": finite, so that differences are never NaN

// How the work is cut; all of it follows from sizes and the SM count.
struct Plan : RowPlan {
  int warps_of_rows;  // warps that stand side by side over rows, the others over keys
  int row_tiles, chunks;
  int keys_per_chunk;
};

// Sum of exp2(x - most) of one row. `most` follows the maximum only when that runs 8 ahead: terms
// stay below 2^8, and the loop hardly ever rescales.
struct RunningSum {
  float most, sum;

  static __device__ __forceinline__ RunningSum empty() { return {kLowest, 0}; }

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

// (reference, sum) of the rows of each warp, on their way to the merge.
template <typename Tile>
struct Parts {
  float2 of_warp[Tile::kWarps][Tile::kWarpRows];
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    row_statistics_kernel(const __grid_constant__ AttentionRows p,
                          const __grid_constant__ Plan plan) {
  using T = typename Tile::T;
  extern __shared__ __align__(16) unsigned char memory[];
  T* left = reinterpret_cast<T*>(memory);
  T* right = reinterpret_cast<T*>(memory + Tile::kStreamOffset);
  auto& shared = *reinterpret_cast<Parts<Tile>*>(memory + Tile::kTileBytes);

  // Later rows see more keys: they come first, so that the longest blocks do not end the launch.
  const int chunk = blockIdx.x % plan.chunks, tile = blockIdx.x / plan.chunks % plan.row_tiles;
  const Head<T> head(p, plan, blockIdx.x / (plan.chunks * plan.row_tiles));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int block_rows = plan.warps_of_rows * Tile::kWarpRows;
  const int row0 = (plan.row_tiles - 1 - tile) * block_rows;
  const int warp_m = warp % plan.warps_of_rows, warp_n = warp / plan.warps_of_rows;
  const int warps_n = Tile::kWarps / plan.warps_of_rows;

  // [first, last): the keys of the chunk that any row sees, from a whole tile on.
  int first = chunk * plan.keys_per_chunk;
  first += max(head.start - first, 0) / Tile::kRight * Tile::kRight;
  const int last =
      min((chunk + 1) * plan.keys_per_chunk, head.greatest_limit(row0, row0 + block_rows) + 1);

  typename Tile::Rows rows;
  RunningSum sums[Tile::kBlocks][2];
  int limits[Tile::kBlocks][2], least = INT_MAX, greatest = -1;
#pragma unroll
  for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
    // Not by member initialisers: nvcc 13.0 runs them for sums[0] alone and zeroes the rest.
    sums[i / 2][i % 2] = RunningSum::empty();
    const int limit = head.limit(row0 + warp_m * Tile::kWarpRows + 8 * i + lane / 4);
    limits[i / 2][i % 2] = limit;
    least = min(least, limit < 0 ? INT_MAX : limit);
    greatest = max(greatest, limit);
  }
  least = __reduce_min_sync(0xffffffffu, least);
  greatest = __reduce_max_sync(0xffffffffu, greatest);

  if (first < last) {
    const int head_dim = static_cast<int>(p.head_dim);
    load_rows<Tile>(left, block_rows, head_dim, plan.aligned, p.q,
                    [&](int r) { return head.query(row0 + r); });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    rows.load(left + warp_m * Tile::kWarpRows * Tile::kStride, lane);
    if (Tile::kTensorCores) __syncthreads();  // the left rows are in registers, their room is free

    const auto load_tile = [&](int key0, int buffer) {
      load_rows<Tile>(right + buffer * Tile::kRight * Tile::kStride, Tile::kRight, head_dim,
                      plan.aligned, p.k, [&](int j) { return head.key(key0 + j); });
      copy_async_commit();
    };
    load_tile(first, 0);
    int buffer = 0;
    for (int key0 = first; key0 < last; key0 += Tile::kRight, buffer ^= 1) {
      copy_async_wait<0>();
      __syncthreads();  // this tile has landed, and nobody reads the other any more
      if (key0 + Tile::kRight < last) load_tile(key0 + Tile::kRight, buffer ^ 1);
      const T* keys = right + buffer * Tile::kRight * Tile::kStride;
      for (int n = warp_n; n < Tile::kRight / 16; n += warps_n) {
        const int key = key0 + 16 * n;
        if (key > greatest) break;
        float x[Tile::kBlocks][2][4];
        rows.product(x, keys + 16 * n * Tile::kStride, lane);
        const bool masked = key < head.start || key + 15 > least;
#pragma unroll
        for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
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
  for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
    RunningSum& sum = sums[i / 2][i % 2];
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      const float most = __shfl_xor_sync(0xffffffffu, sum.most, offset);
      const float other = __shfl_xor_sync(0xffffffffu, sum.sum, offset);
      sum.merge(most, other);
    }
    if (lane % 4 == 0) shared.of_warp[warp][8 * i + lane / 4] = make_float2(sum.most, sum.sum);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < block_rows; r += Tile::kThreads) {
    const int m = r / Tile::kWarpRows;
    RunningSum sum = RunningSum::empty();
    for (int n = 0; n < warps_n; ++n) {
      const float2 part = shared.of_warp[n * plan.warps_of_rows + m][r % Tile::kWarpRows];
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

// A thread a row: merges its chunks in ascending order into (max, row weight / sum), or makes the
// pair of a given log-sum-exp.
__global__ void finish_rows_kernel(const __grid_constant__ AttentionRows p, int chunks) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_rows = p.num_rows();
  if (row >= num_rows) return;
  const int64_t i = row % p.window, h = row / p.window % p.num_q_heads;
  const int64_t b = row / (p.window * p.num_q_heads);
  const float weight =
      p.row_weights
          ? p.row_weights[b * p.row_weights_batch_stride + h * p.row_weights_head_stride + i]
          : 1.0f;
  float2* stats = reinterpret_cast<float2*>(p.row_stats) + row;
  if (p.lse) {
    const float lse = p.lse[b * p.lse_batch_stride + h * p.lse_head_stride + i];
    *stats = make_float2(lse * static_cast<float>(kLog2e), weight);
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
  *stats = make_float2(most, weight / sum);
}

// --- policy and launch

template <typename Tile>
Plan make_plan(const AttentionRows& p) {
  const RowPlan rows = make_row_plan<typename Tile::T>(p);
  int warps_of_rows = 1;
  while (warps_of_rows < Tile::kWarps && warps_of_rows * Tile::kWarpRows < rows.padded_rows)
    warps_of_rows *= 2;
  const int64_t row_tiles = ceil_div(rows.padded_rows, warps_of_rows * Tile::kWarpRows);
  // Chunks fill the machine once if that leaves few slots empty, else about three times.
  const int64_t slots = static_cast<int64_t>(device_limits().multiprocessors) * Tile::kMinBlocks;
  const int64_t items = rows.num_heads * row_tiles;
  const int64_t once = slots / items;
  const int64_t wanted = once * items * 10 >= slots * 9 ? once : ceil_div(3 * slots, items);
  const int64_t most = std::min(p.max_chunks, ceil_div(p.seq_len, Tile::kRight));
  const int64_t per_chunk =
      ceil_div(ceil_div(p.seq_len, std::clamp<int64_t>(wanted, 1, most)), Tile::kRight) *
      Tile::kRight;
  return {rows, warps_of_rows, static_cast<int>(row_tiles),
          static_cast<int>(ceil_div(p.seq_len, per_chunk)), static_cast<int>(per_chunk)};
}

template <typename Tile>
void launch(const AttentionRows& p, cudaStream_t stream, const char* op) {
  const Plan plan = make_plan<Tile>(p);
  if (!p.lse) {
    const int64_t blocks = static_cast<int64_t>(plan.num_heads) * plan.row_tiles * plan.chunks;
    constexpr int kSharedBytes = Tile::kTileBytes + sizeof(Parts<Tile>);
    launch_tiles(row_statistics_kernel<Tile>, blocks, Tile::kThreads, kSharedBytes, op, stream, p,
                 plan);
  }
  finish_rows_kernel<<<static_cast<unsigned>(ceil_div(p.num_rows(), 64)), 64, 0, stream>>>(
      p, plan.chunks);
  launch_check(op);
}

}  // namespace

void row_statistics_cuda(const AttentionRows& params, void* stream, const char* op) {
  visit_float_cuda(params.dtype, op, [&](auto tag) {
    visit_head_dim<decltype(tag)>(params.head_dim, [&](auto tile) {
      launch<decltype(tile)>(params, static_cast<cudaStream_t>(stream), op);
    });
  });
}

}  // namespace kvc
