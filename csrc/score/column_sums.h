// column_sums: a statistic of every column of a causal attention map, over any set of query rows.
//
//   A[b, h, i, j] = query_weights[b, h, i] * P[b, h, i, j]              (attention_rows.h; 0 where
//                                                                        row i does not see key j)
//   sums[b, h, j] = statistic over rows i of A[b, h, i, j]              (column_statistics.h)
//   out[b, h', j] = sums reduced over the query heads of a kv head
//
// Columns before seq_start[b] are -inf. Nothing of the size of the map is stored: tiles above the
// diagonal are neither loaded nor computed.
#pragma once

#include <algorithm>

#include "score/attention_rows.h"
#include "score/column_statistics.h"

namespace kvc {

struct ColumnSumsParams : AttentionRows {
  const void* v;          // [batch, num_kv_heads, seq_len, head_dim], last dimension contiguous
  const void* output;     // [batch, num_q_heads, window, head_dim], same; both null unless the
                          // statistic is output-aware
  float* output_squares;  // scratch [batch, num_q_heads, window], with output
  float* sums;            // scratch [batch, num_q_heads, seq_len], or `out` itself
  float* out;             // [batch, out_heads, seq_len]
  int64_t v_batch_stride, v_head_stride, v_row_stride;  // in elements
  int64_t output_batch_stride, output_head_stride, output_row_stride;
  ColumnStatistic statistic;
  GroupReduce group_reduce;

  constexpr int64_t out_heads() const {
    return group_reduce == GroupReduce::kNone ? num_q_heads : num_kv_heads;
  }
  // The first row of batch row b at `position` or behind it.
  constexpr int64_t first_row_from(int64_t b, int64_t position) const {
    if (!positions) return std::clamp<int64_t>(position - first_query, 0, window);
    const int32_t* row = positions + b * positions_stride;
    int64_t low = 0, high = window;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (row[middle] < position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

void column_sums_cpu(const ColumnSumsParams& params);
void column_sums_cuda(const ColumnSumsParams& params, void* stream);

}  // namespace kvc
