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
// the group, pools and fills. With the log-sum-exp given pass 1 falls away.
//
// Inside, logits live in base 2: x = <q, k> * softmax_scale * log2(e), P = exp2(x - max) / sum.
// Every sum runs in an order that sizes alone decide, so every run gives the same bits. NaN goes
// through every reduction.
#pragma once

#include <cstdint>

#include "host/dtype.h"

namespace kvc {

enum class WindowReduce : int32_t { kSum, kMean, kMax };
enum class GroupReduce : int32_t { kNone, kMean, kMax, kSum };
enum class Pool : int32_t { kNone, kAvg, kMax };

constexpr int64_t kMaxHeadDim = 256;
constexpr double kLog2e = 1.44269504088896340736;

// Pass 1 cuts the rows of a kv head into tiles and the keys into chunks, each with its own (max,
// sum), merged in order. No more chunks than keep this many work items busy: the scratch stays
// small for any window.
constexpr int64_t kRowTile = 256;
constexpr int64_t kMaxRowItems = 1024;
constexpr int64_t kMinChunk = 256;  // keys

// The Hopper form of pass 2 takes whole query heads of a kv head, together at most so many rows.
constexpr int64_t kRowGroup = 256;

struct WindowScoresParams {
  const void* q;             // [batch, num_q_heads, window, head_dim], last dimension contiguous
  const void* k;             // [batch, num_kv_heads, seq_len, head_dim], same
  const float* lse;          // [batch, num_q_heads, window], same, or null
  const float* weights;      // [batch, num_kv_heads, seq_len], same, or null
  const int32_t* seq_start;  // [batch] first real key, or null
  float* row_stats;  // scratch [max_chunks, batch * num_q_heads * window, 2]: (max, sum), then
                     // (max, 1 / sum)
  float* votes;      // scratch [batch, num_kv_heads * row_groups, seq_len]; without wgmma
                     // [batch, vote_heads, seq_len] of it
  float* out;        // [batch, out_heads, seq_len]
  int64_t batch, num_q_heads, num_kv_heads, window, seq_len, head_dim;
  int64_t first_query, num_scored, kernel_size, max_chunks;
  int64_t q_batch_stride, q_head_stride, q_row_stride;  // in elements
  int64_t k_batch_stride, k_head_stride, k_row_stride;
  int64_t lse_batch_stride, lse_head_stride;
  int64_t weights_batch_stride, weights_head_stride;
  float scale_log2;  // softmax_scale * log2(e)
  WindowReduce window_reduce;
  GroupReduce group_reduce;
  Pool pool;
  bool pool_first;
  DType dtype;

  constexpr int64_t q_per_kv() const { return num_q_heads / num_kv_heads; }
  constexpr int64_t num_rows() const { return batch * num_q_heads * window; }
  // Pass 2 may reduce the group at once, unless the pool comes in between.
  constexpr bool votes_per_q_head() const {
    return pool_first || group_reduce == GroupReduce::kNone;
  }
  constexpr int64_t vote_heads() const { return votes_per_q_head() ? num_q_heads : num_kv_heads; }
  constexpr int64_t padded_window() const { return (window + 7) / 8 * 8; }
  // Parts of a kv head's query heads whose votes are reduced by pass 3: one head each where that is
  // no sum.
  constexpr int64_t row_groups() const {
    if (window > kRowGroup) return 1;
    if (votes_per_q_head() || group_reduce == GroupReduce::kMax) return q_per_kv();
    const int64_t heads = kRowGroup / padded_window();
    return (q_per_kv() + heads - 1) / heads;
  }
  constexpr int64_t out_heads() const {
    return group_reduce == GroupReduce::kNone ? num_q_heads : num_kv_heads;
  }
};

void window_scores_cpu(const WindowScoresParams& params);
void window_scores_cuda(const WindowScoresParams& params, void* stream);

}  // namespace kvc
