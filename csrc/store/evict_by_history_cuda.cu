// evict_append_ with victims by history, on CUDA: history_scores, the victims and the rows in one
// launch, a cluster of kBlocks blocks a unit.
//
// The blocks rank a stretch of the slots each (score/history_ranks.cuh) and find the smallest key
// of all in shared memory of the cluster; the first block writes. Ranks go through scratch only
// where several heads add up to one, or several tokens ask for victims. Bound: the history once, 4
// * capacity * width bytes a head; at the sizes of a decode step it is latency, so the history is
// fetched ahead while the counters are under way.
#include "device/limits.cuh"
#include "score/history_ranks.cuh"
#include "store/evict_append.cuh"

namespace kvc {
namespace {

using evict::Unit;

constexpr int kThreads = history::kThreads;

// The keys of the blocks of a cluster, and the smallest in all of their threads. Their next cluster
// barrier is under way when it returns: cluster_wait before anything else that is shared, or the
// end.
template <int kBlocks>
__device__ __forceinline__ EvictKey cluster_min(EvictKey key) {
  __shared__ EvictKey of_block;
  key = evict::block_min<kThreads>(key);
  if constexpr (kBlocks > 1) {
    if (threadIdx.x == 0) of_block = key;
    cluster_sync<kBlocks>();
    const auto* words = reinterpret_cast<const uint32_t*>(&of_block);
    const int block = threadIdx.x % kBlocks;
    const uint2 first = cluster_load2<kBlocks>(words, block);
    const uint2 second = cluster_load2<kBlocks>(words + 2, block);
    const EvictKey other{static_cast<uint64_t>(first.y) << 32 | first.x,
                         static_cast<uint64_t>(second.y) << 32 | second.x};
    key = evict::warp_min<kBlocks>(other);
    cluster_arrive_relaxed<kBlocks>();
  }
  return key;
}

// The stretch of slots that a block ranks.
struct Stretch {
  int begin, end;
};

__device__ __forceinline__ EvictKey key_of(const EvictAppendParams& p, const Unit& unit, int seen,
                                           int slot, float rank) {
  const int position = unit.positions[slot];
  return evict_key(evict_protected(p, position, seen), topk_key(__float_as_uint(rank)), position,
                   static_cast<uint32_t>(slot));
}

// The thread's smallest key, by the ranks that lie in scratch.
__device__ __forceinline__ EvictKey smallest(const EvictAppendParams& p, const Unit& unit,
                                             const Stretch& own, int seen, const int32_t* taken,
                                             int num_taken) {
  const float* ranks = p.ranks_of(unit.b, unit.u);
  EvictKey best = evict_none();
  for (int slot = own.begin + threadIdx.x; slot < min(own.end, unit.held); slot += kThreads) {
    bool is_taken = false;
    for (int t = 0; t < num_taken; ++t) is_taken |= taken[t] == slot;
    const EvictKey key = key_of(p, unit, seen, slot, ranks[slot]);
    if (!is_taken && key < best) best = key;
  }
  return best;
}

// Ranks the block's stretch. One new token and one head: the thread's smallest key, at once; else
// the ranks go to scratch.
template <int kBlocks>
__device__ __forceinline__ EvictKey rank(const EvictAppendParams& p, const Unit& unit,
                                         const Stretch& own) {
  const int heads = p.history.heads_a_unit;
  EvictKey best = evict_none();
  float* ranks = p.ranks_of(unit.b, unit.u);
  for (int h = 0; h < heads; ++h) {
    const HistoryHead head = p.history_of(unit.b, unit.u, unit.u * heads + h, unit.seen);
    history::ranks<kBlocks>(head, unit.held, own.begin, own.end, [&](int slot, float of_head) {
      if (heads > 1 || p.n > 1) {
        ranks[slot] = h == 0 ? of_head : ranks[slot] + of_head;
      } else if (slot < unit.held) {
        const EvictKey key = key_of(p, unit, unit.seen, slot, of_head);
        if (key < best) best = key;
      }
    });
    __syncthreads();  // the next head, or the search, reads what other threads of the block wrote
  }
  return best;
}

template <typename Rotated, int kBlocks>
__global__ void __launch_bounds__(kThreads)
    evict_by_history_kernel(const __grid_constant__ EvictAppendParams p) {
  launch_wait();
  launch_dependents();
  __shared__ int32_t slots[kEvictMaxNew];
  const int64_t b = blockIdx.x / kBlocks, u = blockIdx.y;
  const int block = blockIdx.x % kBlocks, n = static_cast<int>(p.n);
  const auto capacity = static_cast<int>(p.capacity);
  const auto stretch_of = [&](int slots) {
    const int each = (slots + kBlocks - 1) / kBlocks;
    return Stretch{block * each, min((block + 1) * each, slots)};
  };
  Stretch own = stretch_of(capacity);
  if (p.row_start == nullptr && p.history.row_stride == p.history.width && own.begin < own.end) {
    const int bytes = (own.end - own.begin) * static_cast<int>(p.history.width * sizeof(float));
    const int64_t h = u * p.history.heads_a_unit;
    evict::fetch_ahead<kThreads>(p.history.at(b, h, own.begin), bytes);
  }
  const Unit unit(p, b, u);
  if (p.row_start != nullptr) own = stretch_of(unit.held);  // the capacity is that of all heads
  int length = unit.held;
  EvictKey best = evict_none();
  if (length + n > unit.limit) {
    best = rank<kBlocks>(p, unit, own);
  } else {
    cluster_sync<kBlocks>();  // all have read the counters before the first block writes them
  }
  bool is_met = true;
  for (int t = 0; t < n; ++t) {
    int slot = length;
    if (length < unit.limit) {
      ++length;
    } else {
      if (n > 1 || p.history.heads_a_unit > 1) {
        best = smallest(p, unit, own, unit.seen + t, slots, t);
      }
      if (!is_met) cluster_wait<kBlocks>();
      slot = evict::slot_of(cluster_min<kBlocks>(best));
      is_met = false;
    }
    if (threadIdx.x == 0) slots[t] = slot;
    __syncthreads();
  }
  if (block == 0) evict::write_entries<Rotated, kThreads>(p, unit, slots, length);
  if (!is_met) cluster_wait<kBlocks>();  // no block leaves while another reads of it
}

template <typename Rotated, int kBlocks>
void launch(const EvictAppendParams& p, bool early, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(p.batch * kBlocks), static_cast<unsigned>(p.units));
  Launch(blocks, kThreads, 0, stream)
      .cluster(kBlocks)
      .early(early)("evict_append_", evict_by_history_kernel<Rotated, kBlocks>, p);
}

}  // namespace

void evict_by_history_cuda(const EvictAppendParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const DeviceLimits& limits = device_limits();
  const bool early = limits.major >= 9;
  // eight blocks while the units leave multiprocessors idle
  const bool spreads = early && params.batch * params.units <= 2 * limits.multiprocessors;
  evict::visit_sinks(params, [&](auto rotated) {
    using Rotated = typename decltype(rotated)::type;
    if (spreads) return launch<Rotated, 8>(params, early, on);
    launch<Rotated, 1>(params, early, on);
  });
}

}  // namespace kvc
