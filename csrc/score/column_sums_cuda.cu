// column_sums on CUDA, sm_80 and later, behind row_statistics_cuda: left = keys (and values), right
// = queries (and outputs). Block = (key tile, query head): the keys stay in registers, the rows
// that see any of them stream through; a thread adds up its part of each column over all of them,
// two shuffles join the quad. The diagonal costs at most 16 rows by 32 keys a warp. Early keys are
// seen by most rows and come first: the last blocks are the short ones, which levels the SMs. Then
// a thread an output column: group, count, fill. Bound: q_per_kv window (seq_len - window / 2)
// entries a kv head, each 2 head_dim FLOP and one exp2 (without log-sum-exp twice, output-aware one
// product more).
#include "score/column_sums.h"

#include <climits>
#include <type_traits>

#include "score/attention_rows.cuh"

namespace kvc {
namespace {

constexpr const char* kOp = "column_sums";
constexpr float kLn2 = 0.693147180559945309f;

// What a block knows of the streamed rows, and of its columns.
template <typename Tile>
struct Shared {
  float2 stats[Tile::kBuffers][Tile::kRight];  // (max, row weight / sum)
  float output_squares[Tile::kBuffers][Tile::kRight];
  int limits[Tile::kBuffers][Tile::kRight];        // last visible key, -1 behind the last row
  int2 bounds[Tile::kBuffers][Tile::kRight / 16];  // (least, greatest) limit of the rows of 16
  float value_squares[Tile::kLeft];
};

// |row|^2 of rows in shared memory, whose tails are zeros.
template <typename Tile>
__device__ __forceinline__ float square_of_row(const typename Tile::T* row) {
  using T = typename Tile::T;
  float sum = 0;
#pragma unroll 4
  for (int d = 0; d < Tile::kDim; d += Vec<T>::kSize) {
    const Vec<T> vec = *reinterpret_cast<const Vec<T>*>(row + d);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i)
      sum = fmaf(to_float(vec.data[i]), to_float(vec.data[i]), sum);
  }
  return sum;
}

template <typename Tile, typename Statistic>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    column_sums_kernel(const __grid_constant__ ColumnSumsParams p,
                       const __grid_constant__ RowPlan plan) {
  using T = typename Tile::T;
  constexpr bool kOutputAware = Statistic::kOutputAware;
  constexpr int kRowElements = Tile::kRight * Tile::kStride;
  extern __shared__ __align__(16) unsigned char memory[];
  T* left = reinterpret_cast<T*>(memory);
  T* right = reinterpret_cast<T*>(memory + Tile::kStreamOffset);
  auto& shared = *reinterpret_cast<Shared<Tile>*>(memory + Tile::kTileBytes);

  const int num_q_heads = static_cast<int>(p.batch * p.num_q_heads);
  const int q_per_kv = static_cast<int>(p.q_per_kv());
  const int q_head = blockIdx.x % num_q_heads, g = q_head % q_per_kv;
  const Head<T> head(p, plan, q_head / q_per_kv);
  const int block_key0 = static_cast<int>(blockIdx.x / num_q_heads) * Tile::kLeft;
  if (min(block_key0 + Tile::kLeft, head.seq_len) <= head.start) return;  // nobody reads these sums
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int key0 = block_key0 + warp * Tile::kWarpRows;
  const int head_dim = static_cast<int>(p.head_dim);

  const auto query = [&](int i) -> const T* {
    if (i >= p.window) return nullptr;
    return static_cast<const T*>(p.q) + head.b * p.q_batch_stride +
           (head.h * q_per_kv + g) * p.q_head_stride + i * p.q_row_stride;
  };
  const auto output = [&](int i) -> const T* {
    if (i >= p.window) return nullptr;
    return static_cast<const T*>(p.output) + head.b * p.output_batch_stride +
           (head.h * q_per_kv + g) * p.output_head_stride + i * p.output_row_stride;
  };
  const auto value = [&](int j) -> const T* {
    if (j >= head.seq_len) return nullptr;
    return static_cast<const T*>(p.v) + head.b * p.v_batch_stride + head.h * p.v_head_stride +
           j * p.v_row_stride;
  };

  const auto load_tile = [&](int row0, int buffer) {
    T* to = right + buffer * Tile::kProducts * kRowElements;
    load_rows<Tile>(to, Tile::kRight, head_dim, plan.aligned, p.q,
                    [&](int r) { return query(row0 + r); });
    if constexpr (kOutputAware) {
      load_rows<Tile>(to + kRowElements, Tile::kRight, head_dim, plan.aligned, p.q,
                      [&](int r) { return output(row0 + r); });
    }
    constexpr int kLanes = std::max(Tile::kRight, kWarp);  // whole warps, for the shuffles
    if (threadIdx.x < kLanes) {
      const int i = row0 + threadIdx.x, limit = head.limit_of_query(i);
      int least = limit < 0 ? INT_MAX : limit, greatest = limit;
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        least = min(least, __shfl_xor_sync(0xffffffffu, least, offset));
        greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
      }
      if (Tile::kRight >= kWarp || threadIdx.x < Tile::kRight) {
        const int64_t row = limit >= 0 ? head.row_index(g, i) : 0;
        copy_async_8(&shared.stats[buffer][threadIdx.x],
                     reinterpret_cast<const float2*>(p.row_stats) + row, limit >= 0);
        if constexpr (kOutputAware) {
          shared.output_squares[buffer][threadIdx.x] = limit >= 0 ? p.output_squares[row] : 0.0f;
        }
        shared.limits[buffer][threadIdx.x] = limit;
        if (lane % 16 == 0) shared.bounds[buffer][threadIdx.x / 16] = make_int2(least, greatest);
      }
    }
    copy_async_commit();
  };

  float sums[Tile::kBlocks][2] = {};
  const int first_row = static_cast<int>(p.first_row_from(head.b, max(block_key0, head.start)));
  if (first_row < p.window) {
    typename Tile::Rows keys, values;
    const auto keep = [&](auto& rows, T* room, auto&& row_at) {
      load_rows<Tile>(room, Tile::kLeft, head_dim, plan.aligned, p.q,
                      [&](int j) { return row_at(block_key0 + j); });
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      rows.load(room + warp * Tile::kWarpRows * Tile::kStride, lane);
    };
    keep(keys, left, [&](int j) { return head.key(j); });
    float value_squares[Tile::kBlocks][2] = {};
    if constexpr (kOutputAware) {
      if (Tile::kTensorCores) __syncthreads();  // the keys are in registers, their room is free
      T* room = Tile::kTensorCores ? left : left + Tile::kLeft * Tile::kStride;
      keep(values, room, value);
      if (threadIdx.x < Tile::kLeft) {
        shared.value_squares[threadIdx.x] = square_of_row<Tile>(room + threadIdx.x * Tile::kStride);
      }
      static_assert(Tile::kLeft <= Tile::kThreads || !kOutputAware);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
        value_squares[i / 2][i % 2] = shared.value_squares[key0 - block_key0 + 8 * i + lane / 4];
      }
    }
    if (Tile::kTensorCores) __syncthreads();  // the left rows are in registers, their room is free

    const int num_rows = static_cast<int>(p.window);
    load_tile(first_row, 0);
    int buffer = 0;
    for (int tile0 = first_row; tile0 < num_rows; tile0 += Tile::kRight) {
      copy_async_wait<0>();
      __syncthreads();  // this tile has landed, and nobody reads the other any more
      const bool more = tile0 + Tile::kRight < num_rows;
      if (Tile::kBuffers == 2 && more) load_tile(tile0 + Tile::kRight, buffer ^ 1);
      const T* queries = right + buffer * Tile::kProducts * kRowElements;
#pragma unroll 1
      for (int n = 0; n < Tile::kRight / 16; ++n) {
        const int2 bound = shared.bounds[buffer][n];
        if (bound.y < key0) continue;  // no row of these sees a key of the warp
        const bool masked = key0 < head.start || key0 + Tile::kWarpRows - 1 > bound.x;
        float x[Tile::kBlocks][2][4], y[Tile::kBlocks][2][4];
        keys.product(x, queries + 16 * n * Tile::kStride, lane);
        if constexpr (kOutputAware) {
          values.product(y, queries + kRowElements + 16 * n * Tile::kStride, lane);
        }
#pragma unroll
        for (int octet = 0; octet < 2; ++octet) {
          const int at = 16 * n + 8 * octet + 2 * (lane % 4);
          const float4 stats = *reinterpret_cast<const float4*>(&shared.stats[buffer][at]);
          const int2 limit = *reinterpret_cast<const int2*>(&shared.limits[buffer][at]);
          float2 squares = {};
          if constexpr (kOutputAware) {
            squares = *reinterpret_cast<const float2*>(&shared.output_squares[buffer][at]);
          }
          const auto join = [&](auto masked_too) {
#pragma unroll
            for (int i = 0; i < 4 * Tile::kBlocks; ++i) {
              const int block = i / 4, half = i / 2 % 2, j = i % 2;
              const float product = x[block][octet][2 * half + j] * p.scale_log2;
              MapEntry entry;
              entry.p = exp2_approx(product - (j == 0 ? stats.x : stats.z)) *
                        (j == 0 ? stats.y : stats.w);
              if constexpr (kOutputAware) {
                entry.logit = product * kLn2;
                entry.along = y[block][octet][2 * half + j];
                entry.output_square = j == 0 ? squares.x : squares.y;
                entry.value_square = value_squares[block][half];
              }
              float& sum = sums[block][half];
              const float joined = Statistic::join(sum, Statistic::term(entry));
              if constexpr (masked_too) {
                const int key = key0 + 16 * block + 8 * half + lane / 4;
                const bool visible = key >= head.start && key <= (j == 0 ? limit.x : limit.y);
                sum = visible ? joined : sum;
              } else {
                sum = joined;
              }
            }
          };
          if (masked) {
            join(std::true_type{});
          } else {
            join(std::false_type{});
          }
        }
      }
      if (Tile::kBuffers == 1 && more) {
        __syncthreads();  // the one buffer is read
        load_tile(tile0 + Tile::kRight, 0);
      }
      if (Tile::kBuffers == 2) buffer ^= 1;
    }
  }

  float* to = p.sums + static_cast<int64_t>(q_head) * p.seq_len;
#pragma unroll
  for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
    float sum = sums[i / 2][i % 2];
    sum = Statistic::join(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
    sum = Statistic::join(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
    const int key = key0 + 8 * i + lane / 4;
    if (lane % 4 == 0 && key < head.seq_len) to[key] = sum;
  }
}

// A warp a row of the output: its square.
template <typename T>
__global__ void output_squares_kernel(const __grid_constant__ ColumnSumsParams p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (row >= p.num_rows()) return;
  const int64_t i = row % p.window, h = row / p.window % p.num_q_heads;
  const int64_t b = row / (p.window * p.num_q_heads);
  const T* from = static_cast<const T*>(p.output) + b * p.output_batch_stride +
                  h * p.output_head_stride + i * p.output_row_stride;
  float sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < p.head_dim; d += kWarp) {
    const float x = to_float(from[d]);
    sum = fmaf(x, x, sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) p.output_squares[row] = sum;
}

constexpr int kColumns = 256;  // threads, a column each

__global__ void __launch_bounds__(kColumns)
    write_columns_kernel(const __grid_constant__ ColumnSumsParams p, int blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t j = static_cast<int64_t>(blockIdx.x % blocks_per_row) * kColumns + threadIdx.x;
  if (j >= p.seq_len) return;
  const int64_t b = row / p.out_heads(), group = p.num_q_heads / p.out_heads();
  int64_t start = 0;
  if (p.seq_start) start = min(max(static_cast<int64_t>(p.seq_start[b]), int64_t{0}), p.seq_len);
  if (j < start) {
    p.out[row * p.seq_len + j] = -kInf;
    return;
  }
  const float* sums = p.sums + row * group * p.seq_len + j;
  float all = sums[0];
  for (int64_t g = 1; g < group; ++g) {
    const float one = sums[g * p.seq_len];
    all = p.group_reduce == GroupReduce::kMax ? nan_max(all, one) : all + one;
  }
  if (p.group_reduce == GroupReduce::kMean) all /= static_cast<float>(group);
  if (p.statistic == ColumnStatistic::kMean) {
    all /= static_cast<float>(max(p.window - p.first_row_from(b, j), int64_t{1}));
  }
  p.out[row * p.seq_len + j] = all;
}

// --- launch

template <typename T>
bool output_aligned(const ColumnSumsParams& p) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const int64_t all = p.v_batch_stride | p.v_head_stride | p.v_row_stride | p.output_batch_stride |
                      p.output_head_stride | p.output_row_stride;
  return aligned(p.v) && aligned(p.output) && all % Vec<T>::kSize == 0;
}

template <typename T>
void launch(const ColumnSumsParams& p, cudaStream_t stream) {
  row_statistics_cuda(p, stream, kOp);
  RowPlan plan = make_row_plan<T>(p);
  plan.aligned = plan.aligned && output_aligned<T>(p);
  if (p.output) {
    const int64_t blocks = ceil_div(p.num_rows() * kWarp, 256);
    output_squares_kernel<T><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(p);
    launch_check(kOp);
  }
  visit_head_dim<T>(p.head_dim, [&](auto of_dim) {
    visit_statistic(p.statistic, [&](auto statistic) {
      using Statistic = decltype(statistic);
      using OneProduct = decltype(of_dim);
      using Tile = kvc::Tile<T, OneProduct::kDim, Statistic::kOutputAware ? 2 : 1>;
      const int64_t blocks = ceil_div(p.seq_len, Tile::kLeft) * p.batch * p.num_q_heads;
      constexpr int kSharedBytes = Tile::kTileBytes + sizeof(Shared<Tile>);
      launch_tiles(column_sums_kernel<Tile, Statistic>, blocks, Tile::kThreads, kSharedBytes, kOp,
                   stream, p, plan);
    });
  });
  const int64_t blocks_per_row = ceil_div(p.seq_len, kColumns);
  const int64_t rows = p.batch * p.out_heads();
  write_columns_kernel<<<static_cast<unsigned>(blocks_per_row * rows), kColumns, 0, stream>>>(
      p, static_cast<int>(blocks_per_row));
  launch_check(kOp);
}

}  // namespace

void column_sums_cuda(const ColumnSumsParams& params, void* stream) {
  visit_float_cuda(params.dtype, kOp, [&](auto tag) {
    launch<decltype(tag)>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace kvc
