// What is asked of each row of a topk, and where it goes.
#pragma once

#include "device/reduce.cuh"
#include "select/topk.h"

namespace kvc {

// The block's part of the positions first, first + 1, ...
template <typename T>
__device__ __forceinline__ void write_range(int32_t* out, int64_t first, uint32_t count,
                                            uint32_t block, uint32_t blocks) {
#pragma unroll 1
  for (uint32_t i = block * T::kThreads + threadIdx.x; i < count; i += blocks * T::kThreads) {
    out[i] = static_cast<int32_t>(first + i);
  }
}

// Ragged: kept entries of the rows before this one. The same number in all threads; `sums` are
// kWarps words of shared memory.
template <typename T>
__device__ __noinline__ int64_t slots_before(uint32_t* sums, const TopkParams& p, uint32_t row_id) {
  const auto heads = static_cast<uint32_t>(p.heads);
  uint32_t sum = 0;  // the total is an int32
  for (uint32_t row = threadIdx.x; row < row_id; row += T::kThreads) {
    sum += static_cast<uint32_t>(topk_row(p, row / heads, row % heads).count);
  }
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < T::kWarps; ++warp) sum += sums[warp];
  return sum;
}

// What is asked of a row, and where it goes.
struct Task {
  TopkRow row;
  const float* scores;  // of the row
  int32_t* out;
  int64_t slots;
  uint32_t begin, free, wanted;  // entries that compete; how many of them are kept
  uint32_t sink, window;         // forced ones

  __device__ __forceinline__ bool has_choice() const { return wanted > 0 && wanted < free; }

  // All but what competes, and where there is no choice that too: the block's part.
  template <typename T>
  __device__ __forceinline__ void write_forced(uint32_t block, uint32_t blocks) const {
    write_range<T>(out, row.begin, sink, block, blocks);
    write_range<T>(out + sink + wanted, row.window_begin, window, block, blocks);
#pragma unroll 1
    for (int64_t i = row.count + block * T::kThreads + threadIdx.x; i < slots;
         i += blocks * T::kThreads) {
      out[i] = -1;
    }
    if (!has_choice()) write_range<T>(out + sink, row.sink_end, wanted, block, blocks);
  }
};

// The task of a row; ragged rows cut short to what fits. One block of the row writes indptr.
template <typename T>
__device__ __forceinline__ Task find_task(uint32_t* sums, const TopkParams& p, uint32_t row_id,
                                          bool is_writer) {
  const auto heads = static_cast<uint32_t>(p.heads);
  const uint32_t b = row_id / heads, h = row_id % heads;
  Task task{.row = topk_row(p, b, h),
            .scores = p.scores + b * p.batch_stride + h * p.head_stride,
            .slots = p.k};
  int64_t first_slot = row_id * p.k;
  if (p.indptr != nullptr) {
    first_slot = min(slots_before<T>(sums, p, row_id), p.total);
    task.row.count = task.slots = min(task.row.count, p.total - first_slot);
    const bool is_last = row_id + 1 == p.batch * heads;
    if (is_writer && threadIdx.x == 0) {
      p.indptr[row_id] = static_cast<int32_t>(first_slot);
      if (is_last) p.indptr[row_id + 1] = static_cast<int32_t>(first_slot + task.slots);
    }
    if (is_last) task.slots = p.total - first_slot;
  }
  const TopkRow& row = task.row;
  task.out = p.index + first_slot;
  task.begin = static_cast<uint32_t>(row.sink_end);
  task.free = static_cast<uint32_t>(row.window_begin - row.sink_end);
  task.sink = static_cast<uint32_t>(min(row.sink_end - row.begin, row.count));
  task.window = static_cast<uint32_t>(min(row.end - row.window_begin, row.count - task.sink));
  task.wanted = static_cast<uint32_t>(row.count - task.sink - task.window);
  return task;
}

}  // namespace kvc
