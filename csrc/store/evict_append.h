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
#pragma once

#include <cstdint>

#include "host/rows.h"
#include "host/unit_counts.h"
#include "select/topk.h"

namespace kvc {

constexpr int64_t kEvictMaxNew = 8;

// [batch, heads, capacity] or, with history, [batch, heads, capacity, width]; float32.
struct EntryFloats {
  float* data;                                    // null: there are none
  int64_t batch_stride, head_stride, row_stride;  // in elements
  int64_t heads, width;

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
  int32_t* slots;  // [batch, units, n] contiguous
  int64_t batch, units, capacity, n, sink, window;
  float fresh;
  int32_t num_tensors;
  int32_t word_bytes[kMaxTensors];  // widest access that buffers[i] and rows[i] allow
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

}  // namespace kvc
