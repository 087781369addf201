// Rows of a causal attention map: what the ops that reduce such a map share.
//
//   P[b, h, i, j] = softmax over visible j of softmax_scale * <q[b, h, i], k[b, h / q_per_kv, j]>
//
// Row i sits at position positions[b, i], or first_query + i, and sees the keys [seq_start[b],
// min(position, seq_len - 1)]; a row before seq_start[b] is padding and does not count. P is never
// written: a first pass leaves (max, 1 / sum) of each row, a second computes the logits again and
// reduces columns. With the log-sum-exp given the first pass falls away.
//
// Inside, logits live in base 2: x = <q, k> * softmax_scale * log2(e), P = exp2(x - max) / sum.
// Every sum runs in an order that sizes alone decide, so every run gives the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/dtype.h"

namespace kvc {

enum class GroupReduce : int32_t { kNone, kMean, kMax, kSum };

constexpr int64_t kMaxHeadDim = 256;
constexpr double kLog2e = 1.44269504088896340736;

// Pass 1 cuts the rows of a kv head into tiles and the keys into chunks, each with its own (max,
// sum), merged in order. No more chunks than keep this many work items busy: the scratch stays
// small for any window.
constexpr int64_t kRowTile = 256;
constexpr int64_t kMaxRowItems = 1024;
constexpr int64_t kMinChunk = 256;  // keys

struct AttentionRows {
  const void* q;             // [batch, num_q_heads, window, head_dim], last dimension contiguous
  const void* k;             // [batch, num_kv_heads, seq_len, head_dim], same
  const float* lse;          // [batch, num_q_heads, window], same, or null
  const float* row_weights;  // [batch, num_q_heads, window], same: a factor of each row, or null
  const int32_t* positions;  // [batch, window], same, ascending; null: first_query + i
  const int32_t* seq_start;  // [batch] first real key, or null
  float* row_stats;          // scratch [max_chunks, batch * num_q_heads * window, 2]: (max, sum),
                             // then (max, row weight / sum)
  int64_t batch, num_q_heads, num_kv_heads, window, seq_len, head_dim;
  int64_t first_query, max_chunks;
  int64_t q_batch_stride, q_head_stride, q_row_stride;  // in elements
  int64_t k_batch_stride, k_head_stride, k_row_stride;
  int64_t lse_batch_stride, lse_head_stride;
  int64_t row_weights_batch_stride, row_weights_head_stride;
  int64_t positions_stride;
  float scale_log2;  // softmax_scale * log2(e)
  DType dtype;

  constexpr int64_t q_per_kv() const { return num_q_heads / num_kv_heads; }
  constexpr int64_t num_rows() const { return batch * num_q_heads * window; }
  // For max_chunks.
  constexpr int64_t chunks_wanted() const {
    const int64_t row_tiles = (q_per_kv() * window + kRowTile - 1) / kRowTile;
    const int64_t wanted = lse ? 1 : kMaxRowItems / (row_tiles * batch * num_kv_heads);
    return std::clamp<int64_t>(wanted, 1, (seq_len + kMinChunk - 1) / kMinChunk);
  }
};

// Pass 1 and its merge: fills the first [batch * num_q_heads * window, 2] of row_stats. `op` is
// named in errors.
void row_statistics_cuda(const AttentionRows& params, void* stream, const char* op);

}  // namespace kvc
