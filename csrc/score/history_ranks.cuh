// history_scores of one head on the threads of a block, or of a cluster of kBlocks blocks that
// share its slots.
//
// Pass 1: a lane owns a column of the history, a warp every kWarps-th slot of the block's stretch:
// maximum and sum, joined over warps and then over blocks, each time by a butterfly. Pass 2 adds up
// each entry's shares over the lanes. What a warp's first kHeld slots say of its first columns
// stays in registers between the two; the rest is read again, from L1. At the widths of a decode
// step latency is the cost: hence the cluster, the butterflies, and loads without branches.
#pragma once

#include "device/cluster.cuh"
#include "device/math.cuh"
#include "device/reduce.cuh"
#include "score/history_scores.h"

namespace kvc::history {

constexpr int kWarps = 16, kThreads = kWarps * kWarp;
constexpr int kHeld = 9;  // slots of a warp at a time: 1152 of a cluster of eight blocks
constexpr float kLog2e = 1.44269504088896340736f;

// e^x. The argument is a difference to a maximum: taken before it is scaled, a maximum gives 1.
__device__ __forceinline__ float exponential(float x) {
  return exp2_approx(x * kLog2e);
}

// Maximum of x and sum of e^(x - maximum); `most` may be -inf, with a sum of 0. NaN stays.
struct Column {
  float most, sum;

  __device__ __forceinline__ void add(const float (&x)[kHeld]) {
    float now = most;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) now = nan_max(now, x[i]);
    const float from = now == -INFINITY ? 0.0f : now;
    sum *= exponential(most - from);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) sum += exponential(x[i] - from);
    most = now;
  }
  // Joins the columns of kLanes neighbouring lanes; all of them get the same bits.
  template <int kLanes>
  __device__ __forceinline__ void join() {
    float high = most;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      high = nan_max(high, __shfl_xor_sync(0xffffffffu, high, offset));
    }
    sum *= exponential(most - (high == -INFINITY ? 0.0f : high));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    most = high;
  }
};

// What column w says of the slots at, at + kWarps, ... below `last`, -inf where they are no
// candidates. There is a slot below `last`, and a column.
__device__ __forceinline__ void load(const HistoryHead& head, int at, int last, int w,
                                     float (&x)[kHeld]) {
  const int column = min(w, head.width - 1);
  int position[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int slot = min(at + i * kWarps, last - 1);
    position[i] = head.positions[slot];
    x[i] = head.history[slot * head.row_stride + column];
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const bool is_in = at + i * kWarps < last && w < head.width && position[i] < head.position_end;
    x[i] = is_in ? x[i] : -INFINITY;
  }
}

// put(slot, score) for every slot of [begin, end), by one thread each; slots from `length` on are
// no candidates, and their positions are not looked at. All threads of all blocks call it with the
// same head and length; they have met at a cluster barrier when it returns.
template <int kBlocks, typename Put>
__device__ __forceinline__ void ranks(const HistoryHead& head, int length, int begin, int end,
                                      Put&& put) {
  __shared__ Column of_warp[kWarps][kWarp + 1];  // + 1: a column of it spreads over the banks
  __shared__ uint2 of_block[kHistoryMaxWidth];   // Column: what this block found
  __shared__ float2 of_all[kHistoryMaxWidth];    // maximum, 1 / sum
  constexpr int kRound = kHeld * kWarps;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int width = head.width, last = min(end, length);
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = -INFINITY;

  for (int first = 0; first < width; first += kWarp) {
    Column column{-INFINITY, 0.0f};
    if (begin < last) {
      for (int at = begin + warp; at < last; at += kRound) {
        float x[kHeld];
        load(head, at, last, first + lane, x);
        column.add(x);
        if (first == 0 && at == begin + warp) {
#pragma unroll
          for (int i = 0; i < kHeld; ++i) held[i] = x[i];
        }
      }
    }
    of_warp[warp][lane] = column;
    __syncthreads();
    const int joined = threadIdx.x / kWarps;  // kWarps lanes a column
    column = of_warp[threadIdx.x % kWarps][joined];
    column.join<kWarps>();
    if (threadIdx.x % kWarps == 0 && first + joined < width) {
      of_block[first + joined] = {__float_as_uint(column.most), __float_as_uint(column.sum)};
    }
    if (first + kWarp < width) __syncthreads();
  }
  cluster_sync<kBlocks>();
  for (int first = 0; first < width; first += kThreads / kBlocks) {
    const int w = first + static_cast<int>(threadIdx.x) / kBlocks;
    const uint2 other = cluster_load2<kBlocks>(
        reinterpret_cast<const uint32_t*>(&of_block[min(w, width - 1)]), threadIdx.x % kBlocks);
    Column column{__uint_as_float(other.x), __uint_as_float(other.y)};
    column.join<kBlocks>();
    const bool is_there = column.sum != 0;
    if (threadIdx.x % kBlocks == 0 && w < width) {
      of_all[w] = {is_there ? column.most : 0.0f, is_there ? 1.0f / column.sum : 0.0f};
    }
  }
  // all have read of each other: the barrier's other half stands at the end
  cluster_arrive_relaxed<kBlocks>();
  __syncthreads();

  const bool is_sum = head.fuse == HistoryFuse::kSum;
  const auto join = [&](float score, float other) {
    return is_sum ? score + other : other <= score || score != score ? score : other;
  };
  for (int at = begin + warp; at < end; at += kRound) {
    float score[kHeld] = {};
    for (int w = lane; w - lane < width && at < last; w += kWarp) {
      float x[kHeld];
      if (w == lane && at == begin + warp) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) x[i] = held[i];
      } else {
        load(head, at, last, w, x);
      }
      const float2 all = of_all[min(w, width - 1)];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        score[i] = join(score[i], exponential(x[i] - all.x) * all.y);
      }
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        score[i] = join(score[i], __shfl_xor_sync(0xffffffffu, score[i], offset));
      }
    }
    float own = score[0];
#pragma unroll
    for (int i = 1; i < kHeld; ++i) own = lane == i ? score[i] : own;
    const int slot = at + lane * kWarps;
    if (lane < kHeld && slot < end) {
      const bool is_candidate = slot < last && head.positions[slot] < head.position_end;
      put(slot, is_candidate ? own : 0.0f);
    }
  }
  cluster_wait<kBlocks>();
}

}  // namespace kvc::history
