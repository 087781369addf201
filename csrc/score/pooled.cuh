// One score of window_scores from the votes around it.
#pragma once

#include "device/math.cuh"
#include "score/window_scores.h"

namespace kvc {

// Columns [first, last) of votes, clipped to those that count, in ascending order.
template <typename Index, typename VoteAt>
__device__ __forceinline__ float pooled(Pool pool, int64_t kernel_size, Index first, Index last,
                                        VoteAt&& vote_at) {
  float all = pool == Pool::kMax ? -__builtin_huge_valf() : 0.0f;
  for (Index i = first; i < last; ++i) {
    const float vote = vote_at(i);
    all = pool == Pool::kMax ? nan_max(all, vote) : all + vote;
  }
  return pool == Pool::kAvg ? all / static_cast<float>(kernel_size) : all;
}

}  // namespace kvc
