// window_scores: how much attention the observing queries pay to each key.
//
//   P[b, h, i, j] = softmax over visible j of softmax_scale * <q[b, h, i], k[b, h / q_per_kv, j]>
//   (float32) vote[b, h, j] = reduce over real rows i of P[b, h, i, j], times weights[b, h /
//   q_per_kv, j] out[b, h', j] = vote reduced over the query heads of a kv head, and pooled along
//   j, in the order asked for
//
// Row i sits at position first_query + i and sees the keys [seq_start[b], min(first_query + i,
// seq_len - 1)]; a row before seq_start[b] is padding and does not count. Columns before
// seq_start[b] are -inf, columns from num_scored on are +inf. P is never written: pass 1 leaves
// (max, 1 / sum) of each row, pass 2 computes the logits again and adds up columns, pass 3 reduces
// the group, pools and fills (on Hopper pass 2 does, where nothing is left to reduce). With the
// log-sum-exp given pass 1 falls away.
//
// Inside, logits live in base 2: x = <q, k> * softmax_scale * log2(e), P = exp2(x - max) / sum.
// Every sum runs in an order that sizes alone decide, so every run gives the same bits. NaN goes
// through every reduction.
#pragma once

#include <cstdint>

#include "score/attention_rows.h"

namespace kvc {

enum class WindowReduce : int32_t { kSum, kMean, kMax };
enum class Pool : int32_t { kNone, kAvg, kMax };

// The Hopper form takes whole query heads of a kv head, together at most so many rows: what shared
// memory holds beside four stages of keys.
constexpr int64_t most_rows_of_group(int64_t head_dim) {
  return head_dim <= 128 ? 256 : 128;
}

struct WindowScoresParams : AttentionRows {
  const float* weights;  // [batch, num_kv_heads, seq_len], last dimension contiguous, or null
  float* votes;          // scratch [batch, num_kv_heads * row_groups, seq_len]; without wgmma
                         // [batch, vote_heads, seq_len] of it
  float* out;            // [batch, out_heads, seq_len]
  int64_t num_scored, kernel_size;
  int64_t weights_batch_stride, weights_head_stride;
  WindowReduce window_reduce;
  GroupReduce group_reduce;
  Pool pool;
  bool pool_first;

  // Pass 2 may reduce the group at once, unless the pool comes in between.
  constexpr bool votes_per_q_head() const {
    return pool_first || group_reduce == GroupReduce::kNone;
  }
  constexpr int64_t vote_heads() const { return votes_per_q_head() ? num_q_heads : num_kv_heads; }
  constexpr int64_t padded_window() const { return (window + 7) / 8 * 8; }
  // Parts of a kv head's query heads whose votes are reduced by pass 3: one head each where that is
  // no sum.
  constexpr int64_t row_groups() const {
    const int64_t most = most_rows_of_group(head_dim);
    if (window > most) return 1;
    if (votes_per_q_head() || group_reduce == GroupReduce::kMax) return q_per_kv();
    const int64_t heads = most / padded_window();
    return (q_per_kv() + heads - 1) / heads;
  }
  constexpr int64_t out_heads() const {
    return group_reduce == GroupReduce::kNone ? num_q_heads : num_kv_heads;
  }
};

void window_scores_cpu(const WindowScoresParams& params);
void window_scores_cuda(const WindowScoresParams& params, void* stream);

}  // namespace kvc
