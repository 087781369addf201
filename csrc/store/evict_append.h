// evict_append_: new entries of K, V and whatever lies beside them into a store of fixed room.
// While there is room they are appended; then each overwrites one entry. Nothing shifts: slots are
// in no order, and `positions` says which token a slot holds.
//
// A unit is what shares one victim: a kv head, or all heads of a layer (units = 1). For the t-th
// new entry of a unit, seen = tokens it has seen before the call:
//
//   lengths < limit:  slot = lengths++
//   else:             slot = the entry that comes first by (is protected, score, -position), where
//                     protected: position < sink or position >= seen + t - window
//   buffers[slot] = rows[t], positions[slot] = seen + t, scores[slot] = fresh, history[slot] = -inf
//
// Scores are summed over the heads of a unit in their order; without scores the smallest position
// comes first. NaN is below every number. Of equal scores the smaller position stays, as in topk.
// Entries written by the same call never leave; where victims run out the slot is -1 and the token
// is not stored. At the end seen += n.
//
// With `by_history` the scores are those that history_scores makes of the history, with the same
// window, before anything is written: ranking, victim and append in one launch.
//
// With `sinks`, keys of the first tokens as they were rotated first, at last
//
//   buffers[0][i] = R(seen - lengths) sinks[i]
//
// where R(s) turns the pair (j, j + half) by s * inv_freq[j]: angles in double, products in float,
// rounded once. So the sinks stand before a window that rolls (StreamingLLM).
//
// Ragged stores: rows of all units lie packed, those of unit (b, u) from row_start[b * units + u]
// on. Batch and head strides of whatever lies in the store are 0 then.
#pragma once

#include <cstdint>

#include "host/dtype.h"
#include "host/rows.h"
#include "host/unit_counts.h"
#include "score/history_scores.h"
#include "select/topk.h"

namespace kvc {

constexpr int64_t kEvictMaxNew = 8;

// [batch, heads, capacity] or, with history, [batch, heads, capacity, width]; float32.
struct EntryFloats {
  float* data;                                    // null: there are none
  int64_t batch_stride, head_stride, row_stride;  // in elements
  int64_t heads, width;
  int32_t heads_a_unit;

  constexpr float* at(int64_t b, int64_t h, int64_t slot) const {
    return data + b * batch_stride + h * head_stride + slot * row_stride;
  }
};

struct EvictAppendParams {
  Rows buffers[kMaxTensors];  // [batch, heads, capacity] rows
  Rows rows[kMaxTensors];     // [batch, heads, n] rows of the same bytes
  int32_t* positions;         // [batch, units, capacity], last dimension contiguous
  int64_t positions_batch_stride, positions_unit_stride;
  UnitCounts<int32_t> lengths, seen;
  UnitCounts<const int32_t> limits;  // data null: the capacity
  EntryFloats scores, history;
  const int64_t* row_start;  // [batch * units], null: a dense store, where every unit begins at 0
  float* ranks;              // [batch, units, capacity] scratch, null: not by history
  Rows sinks;                // [batch, heads, num_sinks] rows of `sink_dtype`, data null: none
  const float* inv_freq;     // [half]
  int32_t* slots;            // [batch, units, n] contiguous
  int64_t batch, units, capacity, n, sink, window, num_sinks, half;
  float fresh;
  int32_t num_tensors;
  int32_t word_bytes[kMaxTensors];    // widest access that buffers[i] and rows[i] allow
  int32_t heads_a_unit[kMaxTensors];  // of buffers[i]
  int32_t sinks_a_unit;               // heads of them
  HistoryFuse fuse;
  DType sink_dtype;

  // What is added to a slot of unit (b, u) of everything that lies in the store.
  constexpr int64_t base(int64_t b, int64_t u) const {
    return row_start == nullptr ? 0 : row_start[b * units + u];
  }
  constexpr float* ranks_of(int64_t b, int64_t u) const {
    return ranks + (b * units + u) * capacity;
  }
  // The history of one head of a unit, whose candidates are told by the same window.
  constexpr HistoryHead history_of(int64_t b, int64_t u, int64_t h, int64_t seen) const {
    const int64_t first = base(b, u);
    return {.history = history.at(b, h, first),
            .row_stride = history.row_stride,
            .positions = positions + b * positions_batch_stride + u * positions_unit_stride + first,
            .position_end = seen - window,
            .width = static_cast<int32_t>(history.width),
            .fuse = fuse};
  }
};

// Entries that leave earlier are smaller.
struct EvictKey {
  uint64_t first, second;

  constexpr bool operator<(const EvictKey& other) const {
    return first != other.first ? first < other.first : second < other.second;
  }
};

constexpr EvictKey evict_none() {  // behind every entry
  return {~0ull, ~0ull};
}

constexpr uint32_t evict_ordered(int32_t position) {
  return static_cast<uint32_t>(position) ^ 0x80000000u;
}

// `score_key` is topk_key of the score, or evict_ordered(position) where there are no scores.
constexpr EvictKey evict_key(bool is_protected, uint32_t score_key, int32_t position,
                             uint32_t slot) {
  return {static_cast<uint64_t>(is_protected) << 32 | score_key,
          static_cast<uint64_t>(~evict_ordered(position)) << 32 | slot};
}

constexpr bool evict_protected(const EvictAppendParams& p, int32_t position, int64_t seen) {
  return position < p.sink || position >= seen - p.window;
}

void evict_append_cpu(const EvictAppendParams& params);
void evict_append_cuda(const EvictAppendParams& params, void* stream);
void evict_by_history_cuda(const EvictAppendParams& params, void* stream);  // params.ranks is there

}  // namespace kvc
