// head_counts: how many entries each head of a row keeps, when all of them compete in one list.
//
//   counts[b, h] = entries of head h among the totals[b] best of row b, where each head first gets
//   its own
//                  best floors[b, h] and none gets more than caps[b, h]
//
// With C_h(t) = entries of head h that rank at least t, this is the threshold t at which the sum
// over the heads of clamp(C_h(t), floor_h, cap_h) reaches the total; entries equal to it go to the
// smaller head, then to the smaller position. Order of scores as in topk. Found by radix selection
// on histograms in which each head's counts are clamped before they are added up.
#pragma once

#include <cstdint>

#include "select/topk.h"

namespace kvc {

struct HeadCountsParams {
  const float* scores;       // [batch, heads, seq_len], last dimension contiguous
  const int32_t* totals;     // [batch]
  const int32_t* floors;     // [batch, heads] contiguous, or null: 0
  const int32_t* caps;       // [batch, heads] contiguous, or null: no cap
  const int32_t* seq_start;  // [batch], or null
  const int32_t* seq_end;    // [batch], or null
  int32_t* counts;           // [batch, heads] contiguous
  int64_t batch, heads, seq_len;
  int64_t batch_stride, head_stride;  // of scores, in elements
};

// The real entries of row b, and what head h may keep of them.
struct HeadLimits {
  int64_t begin, end;
  uint32_t floor, cap;

  constexpr uint32_t clamp(uint32_t count) const {
    return count < floor ? floor : (count > cap ? cap : count);
  }
};

constexpr HeadLimits head_limits(const HeadCountsParams& p, int64_t b, int64_t h) {
  const int64_t begin = p.seq_start ? topk_clamp(p.seq_start[b], 0, p.seq_len) : 0;
  const int64_t end = p.seq_end ? topk_clamp(p.seq_end[b], begin, p.seq_len) : p.seq_len;
  const int64_t cap = p.caps ? topk_clamp(p.caps[b * p.heads + h], 0, end - begin) : end - begin;
  const int64_t floor = p.floors ? topk_clamp(p.floors[b * p.heads + h], 0, cap) : 0;
  return {begin, end, static_cast<uint32_t>(floor), static_cast<uint32_t>(cap)};
}

void head_counts_cpu(const HeadCountsParams& params);
void head_counts_cuda(const HeadCountsParams& params, void* stream);

}  // namespace kvc
