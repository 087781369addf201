// The parts of a selection in one row, for a block that owns a slice of it: gather, add up what all
// blocks of the row found, pick the threshold, write positions. How the blocks hear of each other
// is a `Peers` type: through a cluster's shared memory, or through memory.
#pragma once

#include "select/sample_cut.cuh"

namespace kvc {

template <int kBlocks_, int kThreads_, bool kHasWords_, int kSamples_ = 1024>
struct TopkTraits {
  static constexpr int kBlocks = kBlocks_;  // of a cluster
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr bool kHasWords =
      kHasWords_;                             // fit shared memory; else scores are read once more
  static constexpr int kSamples = kSamples_;  // of a row
};

// What a slice holds, seen from the cut.
struct Counts {
  uint32_t reached, at_high;  // keys of at least cut.high; those that equal it
  uint32_t inside, at_low;    // strictly between the two, "candidates"; equal to cut.low
  uint32_t least, most;       // candidates
};

// Counts of the row.
struct Totals {
  Counts all, before;      // of all blocks, of earlier ones
  uint32_t starts[kWarp];  // candidates of the blocks before each
};

template <typename T>
struct TopkShared {
  static constexpr int kWarps = T::kWarps;
  RadixBins<T> radix;
  SampleShared sample;
  alignas(8) Counts counts;  // of this block
  Totals totals;
  uint32_t few[kWarp];  // open candidates, when they are few
  uint32_t fews;
  uint32_t above_before, tied_before;  // candidates of earlier blocks, against the threshold
  uint32_t warp_above[kWarps], warp_tied[kWarps];
};

// Shared memory of a size that is known at launch.
struct Lists {
  uint32_t capacity;
  uint32_t* own;      // candidates of this block: keys
  uint32_t* codes;    // and where they are: Groups::score
  uint32_t* all;      // candidates of all blocks of the row, block after block: keys
  uint16_t* staged;   // kGroupSize a warp: positions on their way out; shares memory with what is
                      // not needed then
  uint32_t* words;    // of a group and lane: LaneBits::reached << 16 | LaneBits::marked, later with
                      // the candidates that are kept; unless they do not fit
  uint32_t* insides;  // LaneBits::inside of two lanes each
};

// Shared memory behind TopkShared: the words, then the lists.
template <typename T>
struct TopkLayout {
  static constexpr uint32_t kStaged = T::kWarps * kGroupSize * sizeof(uint16_t);
  static constexpr bool kHasOwnList = T::kBlocks > 1;  // apart from the candidates of all

  __host__ __device__ static constexpr size_t bytes(uint32_t words, uint32_t capacity) {
    const size_t list = capacity * sizeof(uint32_t), two = 2 * list;
    return sizeof(TopkShared<T>) + (T::kHasWords ? size_t{words} / 2 * 3 * sizeof(uint32_t) : 0) +
           (kHasOwnList ? list : 0) + (two > kStaged ? two : kStaged);
  }
  __device__ __forceinline__ static Lists lists(TopkShared<T>& shared, uint32_t words,
                                                uint32_t capacity) {
    auto* at = reinterpret_cast<uint32_t*>(&shared + 1);
    Lists lists{.capacity = capacity, .words = at, .insides = at + words};
    if (T::kHasWords) at += words / 2 * 3;
    lists.own = at;
    if (kHasOwnList) at += capacity;  // read by others until the end: nothing else lies there
    lists.staged = reinterpret_cast<uint16_t*>(at);
    lists.all = at;
    lists.codes = at + capacity;
    return lists;
  }
};

__device__ __forceinline__ void reset(Counts& counts) {
  counts = {.least = 0xffffffffu};
}

template <typename T>
__device__ __forceinline__ void start(TopkShared<T>& shared) {
  clear_bins(shared.radix);
  if (threadIdx.x == 0) {
    reset(shared.sample.range);
    reset(shared.counts);
    shared.fews = shared.above_before = shared.tied_before = 0;
  }
}

// The candidates of a warp: the lane's are the set bits of `inside`, codes counted from `first`.
__device__ __forceinline__ void list_candidates(Counts& counts, const Lists& lists,
                                                const Groups& groups, uint32_t inside,
                                                uint32_t first, uint32_t& least, uint32_t& most) {
  const uint32_t lane = threadIdx.x % kWarp;
  if (!__any_sync(0xffffffffu, inside != 0)) return;
  const uint32_t own = __popc(inside), through = warp_inclusive_sum(own);
  uint32_t start = 0;
  if (lane == kWarp - 1) start = atomicAdd(&counts.inside, through);
  start = __shfl_sync(0xffffffffu, start, kWarp - 1);
  const uint32_t end = min(start + __shfl_sync(0xffffffffu, through, kWarp - 1), lists.capacity);
  uint32_t slot = start + through - own;
#pragma unroll 1
  for (; inside != 0; inside &= inside - 1, ++slot) {
    if (slot < end) lists.codes[slot] = first + __ffs(inside) - 1;
  }
  __syncwarp();
#pragma unroll 1
  for (slot = start + lane; slot < end; slot += kWarp) {
    const uint32_t key = key_of(groups.score(lists.codes[slot]));
    lists.own[slot] = key;
    least = min(least, key);
    most = max(most, key);
  }
}

// Words of what reaches or equals the ends of the cut; what lies between becomes a candidate.
template <typename T>
__device__ __forceinline__ void gather(Counts& counts, const Lists& lists, const Groups& groups,
                                       const Cut& cut) {
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Compare compare(cut);
  uint32_t reached = 0, at_high = 0, at_low = 0, least = 0xffffffffu, most = 0;
#pragma unroll 1
  for (uint32_t group = warp; group < groups.count; group += T::kWarps) {
    const LaneBits bits = compare(groups.load(group).x);
    const uint32_t word = group * kWarp + lane;
    reached += __popc(bits.reached);
    if (bits.marked != 0) {
      at_high += __popc(bits.marked & bits.reached);
      at_low += __popc(bits.marked & ~bits.reached);
    }
    if constexpr (T::kHasWords) {  // candidates later: nothing here waits for anything but scores
      lists.words[word] = bits.reached << 16 | bits.marked;
      reinterpret_cast<uint16_t*>(lists.insides)[word] = static_cast<uint16_t>(bits.inside);
    } else {
      list_candidates(counts, lists, groups, bits.inside, word * kLaneBits, least, most);
    }
  }
  if constexpr (T::kHasWords) {
    __syncthreads();
    const uint32_t pairs = groups.count * (kWarp / 2);
#pragma unroll 1
    for (uint32_t pair = threadIdx.x; pair - lane < pairs; pair += T::kThreads) {
      const uint32_t inside = pair < pairs ? lists.insides[pair] : 0;
      list_candidates(counts, lists, groups, inside, pair * 2 * kLaneBits, least, most);
    }
  }
  reached = __reduce_add_sync(0xffffffffu, reached);
  at_high = __reduce_add_sync(0xffffffffu, at_high);
  at_low = __reduce_add_sync(0xffffffffu, at_low);
  least = __reduce_min_sync(0xffffffffu, least);
  most = __reduce_max_sync(0xffffffffu, most);
  if (lane == 0) {
    atomicAdd(&counts.reached, reached);
    atomicAdd(&counts.at_high, at_high);
    atomicAdd(&counts.at_low, at_low);
    atomicMin(&counts.least, least);
    atomicMax(&counts.most, most);
  }
}

template <typename T, typename Peers>
__device__ __forceinline__ const Totals& add_up(TopkShared<T>& shared, const Peers& peers,
                                                uint32_t block) {
  constexpr uint32_t kAll = 0xffffffffu;
  Totals& totals = shared.totals;
  if (threadIdx.x < kWarp) {
    const uint32_t lane = threadIdx.x;
    Counts own{.least = 0xffffffffu};
    if (lane < peers.blocks()) own = peers.counts(lane);
    const bool is_before = lane < block;
    const uint32_t through = warp_inclusive_sum(own.inside);
    totals.starts[lane] = through - own.inside;
    const Counts all{.reached = __reduce_add_sync(kAll, own.reached),
                     .at_high = __reduce_add_sync(kAll, own.at_high),
                     .inside = __shfl_sync(kAll, through, kWarp - 1),
                     .at_low = __reduce_add_sync(kAll, own.at_low),
                     .least = __reduce_min_sync(kAll, own.least),
                     .most = __reduce_max_sync(kAll, own.most)};
    const Counts before{.reached = __reduce_add_sync(kAll, is_before ? own.reached : 0),
                        .at_high = __reduce_add_sync(kAll, is_before ? own.at_high : 0),
                        .inside = __shfl_sync(kAll, through - own.inside, block),
                        .at_low = __reduce_add_sync(kAll, is_before ? own.at_low : 0)};
    if (lane == 0) {
      totals.all = all;
      totals.before = before;
    }
  }
  __syncthreads();
  return totals;
}

// The threshold: an end of the cut, between the ends, NaN below all numbers, or the cut missed it.
enum class Where { kHigh, kInside, kLow, kNan, kMissed };

// The wanted-th largest key of the row.
__device__ __forceinline__ Where locate(const Counts& all, const Cut& cut, uint32_t wanted,
                                        uint32_t capacity) {
  if (wanted <= all.reached - all.at_high) return Where::kMissed;
  if (wanted <= all.reached) return Where::kHigh;
  const uint32_t through = all.reached + all.inside + all.at_low;
  if (wanted > through) return cut.low == kKeyMinusInf ? Where::kNan : Where::kMissed;
  if (all.inside > capacity) return Where::kMissed;
  return wanted > all.reached + all.inside ? Where::kLow : Where::kInside;
}

// Where it must lie if the cut missed it.
__device__ __forceinline__ Open still_open(const Counts& all, const Cut& cut, uint32_t wanted) {
  uint32_t first = kTopkNan, last = cut.low;
  if (wanted <= all.reached) {
    first = cut.high + 1;
    last = kKeyInf;
  } else if (wanted <= all.reached + all.inside) {
    first = cut.low + 1;
    last = min(cut.high - 1, kKeyInf);
  }
  return {.low = first, .width = last - first, .rank = wanted};
}

// A cut with few candidates, or with none and both ends the threshold: by histograms of the row, as
// many as it takes, the slice read again for each. For the blocks of a cluster, with clear bins.
template <typename T>
__device__ __forceinline__ Cut narrow_cut(TopkShared<T>& shared, const Slice& slice, Open open,
                                          uint32_t capacity, uint32_t block) {
  for (;;) {
    count_slice(shared.radix, slice, RangeCounter(open));
    const Found found = narrow<T::kBlocks, true>(shared.radix, open, block);
    open.low = found.open.low;
    open.width = found.open.width;
    if (open.width == 0) return comparable({open.low, open.low});
    if (found.count <= capacity) return comparable({open.low - 1, open.low + open.width + 1});
    cluster_sync<T::kBlocks>();  // all blocks have read the bins
    clear_bins(shared.radix);
    __syncthreads();
  }
}

// The threshold among the candidates of all blocks, found by each block alone.
template <typename T, typename Peers>
__device__ __forceinline__ Open pick_candidate(TopkShared<T>& shared, const Lists& lists,
                                               const Peers& peers, const Totals& totals,
                                               uint32_t wanted) {
  const uint32_t inside = totals.all.inside;
  Open open{.low = totals.all.least,
            .width = totals.all.most - totals.all.least,
            .rank = wanted - totals.all.reached};
  {
    constexpr int kInFlight = 4;
    const int shift = open.shift();
    const uint32_t start = totals.starts[threadIdx.x % kWarp];
#pragma unroll 1
    for (uint32_t base = 0; base < inside; base += kInFlight * T::kThreads) {
      uint32_t keys[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const uint32_t j = base + u * T::kThreads + threadIdx.x;
        keys[u] = peers.candidate(j, inside, start);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const uint32_t j = base + u * T::kThreads + threadIdx.x;
        if (j < inside) {
          if constexpr (Peers::kMustCopy) lists.all[j] = keys[u];
          atomicAdd(shared.radix.bins + ((keys[u] - open.low) >> shift), 1u);
        }
      }
    }
    if (threadIdx.x == 0) shared.radix.range = {0, open.width};
  }
  peers.leave();
  narrow_alone(shared.radix, open);
  Found next = shared.radix.found;
  while (next.open.width > 0) {
    open = next.open;
    if (next.count <= kWarp) {
#pragma unroll 1
      for (uint32_t j = threadIdx.x; j < inside; j += T::kThreads) {
        const uint32_t key = lists.all[j];
        if (open.holds(key)) shared.few[atomicAdd(&shared.fews, 1u)] = key;
      }
      __syncthreads();
      return pick_of_few(shared.few, next.count, open.rank);
    }
    clear_bins(shared.radix);
    __syncthreads();
    Counter counter(open);
#pragma unroll 1
    for (uint32_t j = threadIdx.x; j < inside; j += T::kThreads) {
      counter.count(shared.radix.bins, lists.all[j]);
    }
    counter.finish(shared.radix.range);
    narrow_alone(shared.radix, open);
    next = shared.radix.found;
  }
  return next.open;
}

// The threshold, how many equal to it are kept, and what lies above it and equals it in earlier
// blocks.
struct Settled {
  uint32_t threshold, ties;
  bool is_high;  // it is cut.high: what equals it has reached it
  uint2 before;
};

// Sets bits of this block's candidates; returns how many of earlier blocks lie above the threshold
// and how many equal it.
template <typename T>
__device__ __forceinline__ uint2 settle_candidates(TopkShared<T>& shared, const Lists& lists,
                                                   uint32_t before, uint32_t own,
                                                   uint32_t threshold) {
  uint32_t above = 0, tied = 0;
#pragma unroll 1
  for (uint32_t j = threadIdx.x; j < before; j += T::kThreads) {
    const uint32_t key = lists.all[j];
    above += key > threshold;
    tied += key == threshold;
  }
  above = __reduce_add_sync(0xffffffffu, above);
  tied = __reduce_add_sync(0xffffffffu, tied);
  if (threadIdx.x % kWarp == 0 && above + tied > 0) {
    atomicAdd(&shared.above_before, above);
    atomicAdd(&shared.tied_before, tied);
  }
  if constexpr (T::kHasWords) {
#pragma unroll 1
    for (uint32_t j = threadIdx.x; j < own; j += T::kThreads) {
      const uint32_t key = lists.all[before + j], code = lists.codes[j];
      if (key >= threshold) {
        const uint32_t bit = code % kLaneBits + (key > threshold ? 16 : 0);
        atomicOr(lists.words + code / kLaneBits, 1u << bit);
      }
    }
  }
  __syncthreads();
  return make_uint2(shared.above_before, shared.tied_before);
}

// Words of the slice -> final ones, for a threshold that was located in the cut.
template <typename T, typename Peers>
__device__ __forceinline__ Settled settle(TopkShared<T>& shared, const Lists& lists,
                                          const Peers& peers, const Groups& groups, const Cut& cut,
                                          const Totals& totals, Where where, uint32_t wanted,
                                          uint32_t own) {
  const Counts &all = totals.all, &before = totals.before;
  if (where == Where::kInside) {
    if constexpr (T::kHasWords) {  // neither end is the threshold: no marks
#pragma unroll 1
      for (uint32_t word = threadIdx.x; word < groups.count * kWarp; word += T::kThreads) {
        lists.words[word] &= 0xffff0000u;
      }
    }
    const Open found = pick_candidate(shared, lists, peers, totals, wanted);
    uint2 earlier = settle_candidates(shared, lists, before.inside, own, found.low);
    earlier.x += before.reached;
    return {.threshold = found.low, .ties = found.rank, .is_high = false, .before = earlier};
  }
  peers.leave();
  if (where == Where::kHigh) {
    return {.threshold = cut.high,
            .ties = wanted - (all.reached - all.at_high),
            .is_high = true,
            .before = make_uint2(before.reached - before.at_high, before.at_high)};
  }
  const uint32_t above = before.reached + before.inside;
  if (where == Where::kNan) {
    const uint32_t numbers = above + before.at_low;
    return {.threshold = kTopkNan,
            .ties = wanted - all.reached - all.inside - all.at_low,
            .is_high = false,
            .before = make_uint2(numbers, groups.entries_before() - numbers)};
  }
  if constexpr (T::kHasWords) {  // all candidates are kept
#pragma unroll 1
    for (uint32_t j = threadIdx.x; j < own; j += T::kThreads) {
      const uint32_t code = lists.codes[j];
      atomicOr(lists.words + code / kLaneBits, 1u << (code % kLaneBits + 16));
    }
    __syncthreads();
  }
  return {.threshold = cut.low,
          .ties = wanted - all.reached - all.inside,
          .is_high = false,
          .before = make_uint2(above, before.at_low)};
}

// What this lane has in a group above the threshold and equal to it: from the words, or where there
// are none from the scores.
template <bool kHasWords>
__device__ __forceinline__ uint2 final_bits(const Lists& lists, const Groups& groups,
                                            const Settled& settled, uint32_t group) {
  const uint32_t lane = threadIdx.x % kWarp;
  if (settled.threshold == kTopkNan) {
    uint2 bits{};
#pragma unroll 1
    for (uint32_t i = 0; i < kLaneBits; ++i) {
      const uint32_t at = groups.position(group) + i / 4 * kChunk + i % 4;
      if (at < groups.begin || at >= groups.end) continue;
      const float score = __ldg(groups.scores + at);
      (score == score ? bits.x : bits.y) |= 1u << i;
    }
    return bits;
  }
  uint32_t reached, marked;
  bool is_high = settled.is_high;
  if constexpr (kHasWords) {
    const uint32_t word = lists.words[group * kWarp + lane];
    reached = word >> 16;
    marked = word & 0xffff;
  } else {
    const LaneBits bits = Compare({settled.threshold, settled.threshold})(groups.load(group).x);
    reached = bits.reached;
    marked = bits.marked;
    is_high = true;
  }
  return is_high ? make_uint2(reached & ~marked, reached & marked)
                 : make_uint2(reached, marked & ~reached);
}

// Each warp counts its stretch of groups, then writes its positions.
template <bool kHasWords, typename T>
__device__ __forceinline__ void write_positions(TopkShared<T>& shared, const Lists& lists,
                                                const Groups& groups, const Settled& settled,
                                                int32_t offset, int32_t* out) {
  constexpr uint32_t kAll = 0xffffffffu;
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, ties = settled.ties;
  const uint32_t stretch = (groups.count + T::kWarps - 1) / T::kWarps;
  const uint32_t first = min(warp * stretch, groups.count);
  const uint32_t last = min(first + stretch, groups.count);
  uint32_t above = 0, tied = 0;
#pragma unroll 1
  for (uint32_t group = first; group < last; ++group) {
    const uint2 mine = final_bits<kHasWords>(lists, groups, settled, group);
    above += __popc(mine.x);
    tied += __popc(mine.y);
  }
  above = __reduce_add_sync(kAll, above);
  tied = __reduce_add_sync(kAll, tied);
  if (lane == 0) {
    shared.warp_above[warp] = above;
    shared.warp_tied[warp] = tied;
  }
  __syncthreads();
  uint2 before = settled.before;
  before.x += __reduce_add_sync(kAll, lane < warp ? shared.warp_above[lane] : 0);
  before.y += __reduce_add_sync(kAll, lane < warp ? shared.warp_tied[lane] : 0);
  out += before.x + min(before.y, ties);
  uint16_t* staged = lists.staged + warp * kGroupSize;
#pragma unroll 1
  for (uint32_t group = first; group < last; ++group) {
    const uint2 mine = final_bits<kHasWords>(lists, groups, settled, group);
    uint32_t kept = mine.x;
    if (__any_sync(kAll, mine.y != 0)) {
      const GroupRank rank(mine.y);
#pragma unroll
      for (int c = 0; c < kGroupChunks; ++c) {
        const uint32_t through = before.y + rank(c);  // ties before this lane's four
        const uint32_t four = mine.y >> 4 * c & 15;
        kept |=
            lowest_bits(four, min(static_cast<uint32_t>(__popc(four)), ties - min(ties, through)))
            << 4 * c;
      }
      before.y += rank.chunks(kGroupChunks);
    }
    if (!__any_sync(kAll, kept != 0)) continue;
    const GroupRank rank(kept);
    uint32_t slots = 0;  // a byte a chunk would not do: up to 512
#pragma unroll
    for (int c = 0; c < kGroupChunks; ++c) {
      slots = rank(c);
#pragma unroll 1
      for (uint32_t four = kept >> 4 * c & 15; four != 0; four &= four - 1) {
        staged[slots++] = static_cast<uint16_t>(c * kChunk + lane * 4 + __ffs(four) - 1);
      }
    }
    __syncwarp();
    const uint32_t count = rank.chunks(kGroupChunks);
    const uint32_t base = (groups.first + group) * kGroupSize - offset;
#pragma unroll 1
    for (uint32_t j = lane; j < count; j += kWarp) out[j] = static_cast<int32_t>(base + staged[j]);
    __syncwarp();
    out += count;
  }
}

// The other blocks of the cluster, from the barrier on until all have left.
template <typename T>
struct ClusterPeers {
  static constexpr int kBlocks = T::kBlocks;
  static constexpr bool kMustCopy = kBlocks > 1;
  const Counts* own_counts;
  const uint32_t* own_list;

  __device__ __forceinline__ uint32_t blocks() const { return kBlocks; }
  __device__ __forceinline__ Counts counts(uint32_t block) const {
    const auto* words = reinterpret_cast<const uint32_t*>(own_counts);
    const uint2 high = cluster_load2<kBlocks>(words, block);
    const uint2 low = cluster_load2<kBlocks>(words + 2, block);
    const uint2 range = cluster_load2<kBlocks>(words + 4, block);
    return {high.x, high.y, low.x, low.y, range.x, range.y};
  }
  // The i-th candidate of the row, if there is one; for whole warps.
  __device__ __forceinline__ uint32_t candidate(uint32_t i, uint32_t count, uint32_t start) const {
    uint32_t block = 0;
#pragma unroll
    for (int step = kBlocks / 2; step > 0; step /= 2) {
      if (__shfl_sync(0xffffffffu, start, block + step) <= i) block += step;
    }
    const uint32_t first = __shfl_sync(0xffffffffu, start, block);
    return i < count ? cluster_load<kBlocks>(own_list + i - first, block) : 0;
  }
  __device__ __forceinline__ void leave() const { cluster_arrive<kBlocks>(); }
};

// For the blocks of a cluster, or one alone: gather with the cut that is there, or else with one
// from histograms of the keys that are open, until it is good, and settle.
template <typename T>
__device__ __forceinline__ Settled select(TopkShared<T>& shared, const Lists& lists,
                                          const Groups& groups, bool has_cut, Cut cut, Open open,
                                          uint32_t wanted, uint32_t block) {
  const ClusterPeers<T> peers{&shared.counts, lists.own};
  for (;;) {
    if (!has_cut) {
      cut = narrow_cut(shared, groups.slice(block, T::kBlocks), open, lists.capacity, block);
    }
    gather<T>(shared.counts, lists, groups, cut);
    cluster_sync<T::kBlocks>();
    clear_bins(shared.radix);
    const Totals& totals = add_up(shared, peers, block);
    const Where where = locate(totals.all, cut, wanted, lists.capacity);
    if (where != Where::kMissed) {
      return settle(shared, lists, peers, groups, cut, totals, where, wanted, shared.counts.inside);
    }
    open = still_open(totals.all, cut, wanted);
    has_cut = false;
    cluster_sync<T::kBlocks>();  // all blocks have read the counts
    if (threadIdx.x == 0) reset(shared.counts);
    __syncthreads();
  }
}

}  // namespace kvc
