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

struct HistoryScoresParams {
  const float* history;  // [batch, heads, capacity, width], last dimension contiguous
  int64_t batch_stride, head_stride, row_stride;
  const int32_t* positions;  // [batch, units, capacity], last dimension contiguous
  int64_t positions_batch_stride, positions_unit_stride;
  UnitCounts<const int32_t> lengths, seen;
  float* scores;  // [batch, heads, capacity] contiguous
  int64_t batch, heads, units, capacity, width, window;
  HistoryFuse fuse;
};

void history_scores_cpu(const HistoryScoresParams& params);
void history_scores_cuda(const HistoryScoresParams& params, void* stream);

}  // namespace kvc
