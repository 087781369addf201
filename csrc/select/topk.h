// topk: which entries of each head are kept.
//
//   index[b, h] = the positions of the n_b kept entries, ascending, then -1 up to k
//   n_b         = min(counts[b] or k, k, real entries of row b); real = [seq_start[b], seq_end[b])
//   within [0, seq_len)
//
// The first `sink` and the last `window` real entries are kept before any other, then the largest
// scores. Equal scores, and forced entries that do not all fit, go to the smaller position. Order
// of scores: +inf > numbers > -inf > NaN of either sign; -0 equals +0. Exact: the n_b-th largest
// key is found by radix selection on uint32 keys that order as the scores do, then one ordered pass
// writes the positions.
//
// topk_ragged is the same selection with a count a head, its rows packed one behind the other:
//   index[indptr[r] : indptr[r + 1]] = the kept positions of row r = b * heads + h
#pragma once

#include <cstdint>

namespace kvc {

struct TopkParams {
  const float* scores;       // [batch, heads, seq_len], last dimension contiguous
  const int32_t* counts;     // [batch] or [batch, heads], or null
  const int32_t* seq_start;  // [batch], or null
  const int32_t* seq_end;    // [batch], or null
  int32_t* index;            // [batch, heads, k] contiguous; ragged: [total]
  int32_t* indptr;           // [batch * heads + 1]: ragged; null: uniform
  void* scratch;             // CUDA: topk_cuda_scratch() bytes, aligned to 16, or null
  int64_t batch, heads, seq_len;
  int64_t k;      // slots of a row; ragged: most of them
  int64_t total;  // ragged: slots in all
  int64_t sink, window;
  int64_t batch_stride, head_stride;                // of scores, in elements
  int64_t counts_batch_stride, counts_head_stride;  // of counts

  constexpr bool reads_vectors() const { return counts || seq_start || seq_end; }
};

constexpr uint32_t kTopkPadding = 0;           // below every real entry
constexpr uint32_t kTopkNan = 1;               // below every number
constexpr uint32_t kTopkForced = 0xffffffffu;  // above every score

// The key of a score, given as its bits: keys order as scores do, and equal scores have equal keys.
constexpr uint32_t topk_key(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const bool is_negative = bits > 0x80000000u;  // -0 is not
  const uint32_t key = is_negative ? ~bits : bits | 0x80000000u;
  return magnitude > 0x7f800000u ? kTopkNan : key;
}

// What head h of row b asks for, all clamped into range.
struct TopkRow {
  int64_t begin, end;              // real entries
  int64_t count;                   // how many to keep
  int64_t sink_end, window_begin;  // forced: [begin, sink_end) and [window_begin, end)
};

constexpr int64_t topk_clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

constexpr TopkRow topk_row(const TopkParams& p, int64_t b, int64_t h) {
  const int64_t begin = p.seq_start ? topk_clamp(p.seq_start[b], 0, p.seq_len) : 0;
  const int64_t end = p.seq_end ? topk_clamp(p.seq_end[b], begin, p.seq_len) : p.seq_len;
  const int64_t real = end - begin;
  const int64_t most = p.k < real ? p.k : real;
  const int64_t count =
      p.counts ? topk_clamp(p.counts[b * p.counts_batch_stride + h * p.counts_head_stride], 0, most)
               : most;
  const int64_t sink_end = begin + (p.sink < real ? p.sink : real);
  const int64_t window = p.window < end - sink_end ? p.window : end - sink_end;
  return {begin, end, count, sink_end, end - window};
}

void topk_cpu(const TopkParams& params);
void topk_cuda(const TopkParams& params, void* stream);
// Bytes of scratch with which more blocks than a cluster has share a row, by sizes only; 0 where
// that is no gain.
int64_t topk_cuda_scratch(const TopkParams& params);

}  // namespace kvc
