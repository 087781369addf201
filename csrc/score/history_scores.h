// history_scores: what earlier queries, each of which left a column of logits, think of the entries
// of a store.
//
//   candidates:  slots below the length whose position is below seen - window
//   scores[j] = sum or max over w of softmax over candidates i of history[i, w], at j
//
// A column of only -inf (a query that is not there) counts 0, and so does every slot that is no
// candidate.
#pragma once

#include <cstdint>

#include "host/unit_counts.h"

namespace kvc {

enum class HistoryFuse : int32_t { kSum = 0, kMax = 1 };

constexpr int64_t kHistoryMaxWidth = 1024;

// One head's columns, and which of its slots are candidates.
struct HistoryHead {
  const float* history;  // a row of `width` a slot
  int64_t row_stride;
  const int32_t* positions;
  int64_t position_end;  // candidates lie before it
  int32_t width;
  HistoryFuse fuse;
};

struct HistoryScoresParams {
  const float* history;  // [batch, heads, capacity, width], last dimension contiguous
  int64_t batch_stride, head_stride, row_stride;
  const int32_t* positions;  // [batch, units, capacity], last dimension contiguous
  int64_t positions_batch_stride, positions_unit_stride;
  UnitCounts<const int32_t> lengths, seen;
  float* scores;  // [batch, heads, capacity] contiguous
  int64_t batch, heads, units, capacity, width, window;
  int32_t heads_a_unit;
  HistoryFuse fuse;

  constexpr int64_t unit(int64_t h) const {
    return static_cast<uint32_t>(h) / static_cast<uint32_t>(heads_a_unit);
  }
  constexpr HistoryHead head(int64_t b, int64_t h) const {
    const int64_t u = unit(h);
    return {.history = history + b * batch_stride + h * head_stride,
            .row_stride = row_stride,
            .positions = positions + b * positions_batch_stride + u * positions_unit_stride,
            .position_end = *seen.at(b, u) - window,
            .width = static_cast<int32_t>(width),
            .fuse = fuse};
  }
};

// scores[slot] (+)= those of the slots below `length`, on one thread.
void history_ranks_cpu(const HistoryHead& head, int64_t length, float* scores, bool adds);
void history_scores_cpu(const HistoryScoresParams& params);
void history_scores_cuda(const HistoryScoresParams& params, void* stream);

}  // namespace kvc
