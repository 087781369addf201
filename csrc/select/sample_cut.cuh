// Where the threshold of a row probably lies, told by a sample of the row: of n entries the
// n * p-th largest is the wanted quantile give or take sqrt(n p (1 - p)); four times that and two
// more on either side miss it in less than one row of ten thousand. The sample also says over which
// keys to spread the bins, so scores that lie close together are told apart as well as any others.
#pragma once

#include <algorithm>
#include <cmath>

#include "select/row_sample.cuh"
#include "select/score_groups.cuh"

namespace kvc {

struct SampleShared {
  SampleRange range;
  Found found[2];  // bins of the cut's two ends
};

// Entries that a cut from `samples` of them has between its ends in a row of `size`, hardly ever
// more.
inline double most_candidates(double size, double wanted, double samples) {
  const double n = std::min(samples, size), share = wanted / size, rank = share * n;
  const double slack = 4 * std::sqrt(rank * (1 - share)) + 2;
  const double ranks = std::min(rank + slack, n) - std::max(rank - slack, 0.0);
  return (ranks + 4 * std::sqrt(ranks)) * size / n;
}

// Room for as many, and for more than hardly any where that costs nothing.
inline uint32_t candidate_room(double most) {
  return static_cast<uint32_t>(std::max(std::ceil(most), 6144.0));
}

// The threshold probably lies in [low, high]; values that many entries of the sample share do not
// lie between the two. The same in all threads, and in all blocks of a row. Takes clear bins and
// leaves used ones; all threads have read them.
template <typename T>
__device__ __forceinline__ Cut guess_cut(RadixBins<T>& radix, SampleShared& shared,
                                         const Sample<T>& sample, uint32_t wanted, uint32_t size) {
  constexpr int kOwn = Sample<T>::kOwn;
  const uint32_t warp = threadIdx.x / kWarp;
  uint32_t keys[kOwn];  // 0 where there is none
  find_range(shared.range, sample, keys);

  // ranks in the sample between which the wanted one lies
  const float share = static_cast<float>(wanted) / static_cast<float>(size);
  const float rank = share * static_cast<float>(sample.count);
  const float slack = sample.count == size ? 0 : 4 * sqrtf(rank * (1 - share)) + 2;
  const auto low_rank = static_cast<uint32_t>(ceilf(rank + slack));
  const auto high_rank = static_cast<uint32_t>(floorf(fmaxf(rank - slack, 0)));
  const uint32_t ranks[2] = {min(low_rank, sample.count), max(high_rank, 1u)};
  __syncthreads();

  // spread the bins over the side of zero on which both lie, if there is one
  uint32_t first = shared.range.least + 1, last = shared.range.most, skipped = 0;
  if (ranks[0] <= shared.range.uppers) {
    first = shared.range.upper_least;
  } else if (ranks[1] > shared.range.uppers) {
    last = shared.range.lower_most;
    skipped = shared.range.uppers;
  }
  Open open{.low = first, .width = last - first, .rank = 0};
  Counter counter(open);
#pragma unroll
  for (int j = 0; j < kOwn; ++j) counter.count(radix.bins, keys[j]);
  if (threadIdx.x == 0) radix.range = {0, open.width};
  share_bins<1>(radix, 0);
  if (warp < 2) {
    open.rank = (warp == 0 ? ranks[0] : ranks[1]) - skipped;
    pick_bin<1, false>(radix, open, 0, shared.found[warp]);
  }
  __syncthreads();
  Cut cut{};
  const uint32_t few = max(sample.count / 64, 8u);
#pragma unroll 1
  for (int end = 0; end < 2; ++end) {
    Found found = shared.found[end];
    while (found.open.width > 0 && found.count > few) {  // values that many share, or far apart
      __syncthreads();                                   // all have read the bins
      clear_bins(radix);
      __syncthreads();
      Counter again(found.open);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) again.count(radix.bins, keys[j]);
      again.finish(radix.range);
      narrow_alone(radix, found.open);
      found = radix.found;
    }
    (end == 0 ? cut.low : cut.high) = found.open.low + (end == 0 ? 0 : found.open.width);
  }
  if (low_rank > sample.count) cut.low = kTopkPadding;
  if (high_rank < 1) cut.high = kTopkForced;
  return comparable(cut);
}

}  // namespace kvc
