// history_scores on CUDA.
//
// A cluster of kBlocks blocks a (batch, head), each with its own stretch of slots. Pass 1: a lane
// owns a column of the history, a warp every kWarps-th slot: running maximum and sum, joined over
// warps and then over blocks in their order. Pass 2 reads the stretch again, from L2, and adds up
// each entry's shares over the lanes. Bound: the history once, 4 * capacity * width bytes a head;
// at the widths of a decode step latency is the cost, hence the cluster. Before sm_90 a cluster is
// one block.
#include <algorithm>

#include "device/check.cuh"
#include "device/cluster.cuh"
#include "device/limits.cuh"
#include "device/reduce.cuh"
#include "score/history_scores.h"

namespace kvc {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * kWarp;
constexpr int kUnroll = 4;  // slots a warp has under way
constexpr float kLog2e = 1.44269504088896340736f;

// e^x. The argument is a difference to a maximum: taken before it is scaled, a maximum gives 1.
__device__ __forceinline__ float exponential(float x) {
  return exp2f(x * kLog2e);
}

// Maximum of x and sum of e^(x - maximum); `most` may be -inf, with a sum of 0.
struct Column {
  float most, sum;

  __device__ __forceinline__ void add(float x) {
    if (x == -INFINITY) return;
    const float apart = x - most;
    if (apart <= 0) {
      sum += exponential(apart);
    } else {  // also NaN
      sum = sum * exponential(-apart) + 1.0f;
      most = x;
    }
  }
  __device__ __forceinline__ void add(const Column& other) {
    if (other.most == -INFINITY) return;
    const float high = fmaxf(most, other.most);
    sum = (most == -INFINITY ? 0.0f : sum * exponential(most - high)) +
          other.sum * exponential(other.most - high);
    most = high;
  }
};

template <int kBlocks>
__global__ void __launch_bounds__(kThreads)
    history_scores_kernel(const __grid_constant__ HistoryScoresParams p) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  __shared__ Column of_warp[kWarps][kWarp];
  __shared__ uint2 of_block[kHistoryMaxWidth];  // Column: what this block found
  __shared__ float2 of_all[kHistoryMaxWidth];   // maximum, 1 / sum
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rank = blockIdx.x % kBlocks;
  const int64_t bh = blockIdx.x / kBlocks, b = bh / p.heads, h = bh % p.heads;
  const int64_t u = h / (p.heads / p.units);
  const int width = static_cast<int>(p.width);
  const float* history = p.history + b * p.batch_stride + h * p.head_stride;
  const int32_t* positions =
      p.positions + b * p.positions_batch_stride + u * p.positions_unit_stride;
  const int64_t held = *p.lengths.at(b, u);
  const int64_t length = max(int64_t{0}, min(held, p.capacity));
  const int64_t position_end = *p.seen.at(b, u) - p.window;
  const int64_t stretch = (p.capacity + kBlocks - 1) / kBlocks;
  const int64_t begin = rank * stretch, end = min(begin + stretch, p.capacity);

  for (int first = 0; first < width; first += kWarp) {
    Column column{-INFINITY, 0.0f};
    const int w = first + lane;
    for (int64_t at = begin + warp; at < end; at += kUnroll * kWarps) {
      float x[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t slot = at + i * kWarps;
        const bool is_in = slot < end && slot < length && w < width;
        const float value = is_in ? history[slot * p.row_stride + w] : -INFINITY;
        x[i] = is_in && positions[slot] < position_end ? value : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) column.add(x[i]);
    }
    of_warp[warp][lane] = column;
    __syncthreads();
    if (warp == 0 && w < width) {
      for (int other = 1; other < kWarps; ++other) column.add(of_warp[other][lane]);
      of_block[w] = {__float_as_uint(column.most), __float_as_uint(column.sum)};
    }
    __syncthreads();
  }
  cluster_sync<kBlocks>();
  for (int w = threadIdx.x; w < width; w += kThreads) {
    Column column{-INFINITY, 0.0f};
    for (int block = 0; block < kBlocks; ++block) {
      const uint2 other =
          cluster_load2<kBlocks>(reinterpret_cast<const uint32_t*>(&of_block[w]), block);
      column.add({__uint_as_float(other.x), __uint_as_float(other.y)});
    }
    const bool is_there = column.sum != 0;
    of_all[w] = {is_there ? column.most : 0.0f, is_there ? 1.0f / column.sum : 0.0f};
  }
  cluster_sync<kBlocks>();  // no block leaves while another reads of it

  const bool is_sum = p.fuse == HistoryFuse::kSum;
  for (int64_t slot = begin + warp; slot < end; slot += kWarps) {
    float score = 0;
    if (slot < length && positions[slot] < position_end) {
      for (int w = lane; w < width; w += kWarp) {
        const float share =
            exponential(history[slot * p.row_stride + w] - of_all[w].x) * of_all[w].y;
        score = is_sum ? score + share : share <= score || score != score ? score : share;
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, score, offset);
        score = is_sum ? score + other : other <= score || score != score ? score : other;
      }
    }
    if (lane == 0) p.scores[bh * p.capacity + slot] = score;
  }
}

template <int kBlocks>
void launch(const HistoryScoresParams& p, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.batch * p.heads * kBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = kBlocks > 1 ? 2 : 0;
  cuda_check(cudaLaunchKernelEx(&config, history_scores_kernel<kBlocks>, p), "history_scores");
}

}  // namespace

void history_scores_cuda(const HistoryScoresParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  // eight blocks while the heads leave multiprocessors idle
  const DeviceLimits& limits = device_limits();
  if (limits.major >= 9 && params.batch * params.heads <= 2 * limits.multiprocessors) {
    return launch<8>(params, on);
  }
  launch<1>(params, on);
}

}  // namespace kvc
