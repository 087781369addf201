// evict_append_ on CUDA: one launch, a block a unit.
//
// The block reads its counters, finds the victim with one pass over positions and scores (8 bytes
// an entry and head of the unit), and writes two rows a head: latency, not bytes, is the cost, so
// both are fetched ahead while the counters are under way. Only the block of a unit reads or writes
// what belongs to it, so no block waits for another. From sm_90 on the launch overlaps the end of
// the kernel before it, and lets the one behind it start early (programmatic dependent launch).
// Victims by history: evict_by_history_cuda.cu.
#include "device/limits.cuh"
#include "store/evict_append.cuh"

namespace kvc {
namespace {

using evict::Unit;

constexpr int kUnroll = 4;         // entries a thread has under way
constexpr int kFewEntries = 2048;  // up to here a small block
constexpr int kSmallBlock = 256, kLargeBlock = 1024;

template <int kThreads>
__device__ __forceinline__ int32_t pick_victim(const EvictAppendParams& p, const Unit& unit,
                                               int seen, const int32_t* taken, int num_taken) {
  const int heads = p.scores.heads_a_unit;
  const float* scores = p.scores.data ? p.scores.at(unit.b, unit.u * heads, unit.base) : nullptr;
  EvictKey best = evict_none();
  for (int first = threadIdx.x; first < unit.held; first += kUnroll * kThreads) {
    int position[kUnroll];
    float score[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int slot = min(first + i * kThreads, unit.held - 1);
      position[i] = unit.positions[slot];
      score[i] = scores != nullptr ? scores[slot] : 0.0f;
    }
#pragma unroll 4  // so many heads' loads are under way
    for (int h = 1; h < heads; ++h) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        score[i] += scores[h * p.scores.head_stride + min(first + i * kThreads, unit.held - 1)];
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int slot = first + i * kThreads;
      bool is_out = slot >= unit.held;
      for (int t = 0; t < num_taken; ++t) is_out |= taken[t] == slot;
      const uint32_t order =
          scores != nullptr ? topk_key(__float_as_uint(score[i])) : evict_ordered(position[i]);
      const EvictKey key = evict_key(evict_protected(p, position[i], seen), order, position[i],
                                     static_cast<uint32_t>(slot));
      if (!is_out && key < best) best = key;
    }
  }
  return evict::slot_of(evict::block_min<kThreads>(best));
}

// Positions and scores, which the search reads once the counters are there. Ragged stores keep less
// than the capacity of all: there the counters come first.
template <int kThreads>
__device__ __forceinline__ void fetch_ahead(const EvictAppendParams& p, int64_t b, int64_t u) {
  if (p.row_start != nullptr) return;
  const auto bytes = static_cast<int>(p.capacity) * static_cast<int>(sizeof(float));
  const int32_t* positions =
      p.positions + b * p.positions_batch_stride + u * p.positions_unit_stride;
  evict::fetch_ahead<kThreads>(positions, bytes);
  for (int h = 0; h < p.scores.heads_a_unit; ++h) {
    evict::fetch_ahead<kThreads>(p.scores.at(b, u * p.scores.heads_a_unit + h, 0), bytes);
  }
}

template <typename Rotated, int kThreads>
__global__ void __launch_bounds__(kThreads)
    evict_append_kernel(const __grid_constant__ EvictAppendParams p) {
  launch_wait();
  launch_dependents();
  __shared__ int32_t slots[kEvictMaxNew];
  fetch_ahead<kThreads>(p, blockIdx.x, blockIdx.y);
  const Unit unit(p, blockIdx.x, blockIdx.y);
  int length = unit.held;
  for (int t = 0; t < p.n; ++t) {
    const int slot =
        length < unit.limit ? length++ : pick_victim<kThreads>(p, unit, unit.seen + t, slots, t);
    if (threadIdx.x == 0) slots[t] = slot;
    __syncthreads();
  }
  evict::write_entries<Rotated, kThreads>(p, unit, slots, length);
}

template <typename Rotated, int kThreads>
void launch(const EvictAppendParams& p, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(p.batch), static_cast<unsigned>(p.units));
  Launch(blocks, kThreads, 0, stream)
      .early(device_limits().major >= 9)("evict_append_", evict_append_kernel<Rotated, kThreads>,
                                         p);
}

}  // namespace

void evict_append_cuda(const EvictAppendParams& params, void* stream) {
  if (params.ranks != nullptr) return evict_by_history_cuda(params, stream);
  const auto on = static_cast<cudaStream_t>(stream);
  evict::visit_sinks(params, [&](auto rotated) {
    using Rotated = typename decltype(rotated)::type;
    if (params.capacity <= kFewEntries) return launch<Rotated, kSmallBlock>(params, on);
    launch<Rotated, kLargeBlock>(params, on);
  });
}

}  // namespace kvc
