// A sample of a row: entries at pseudo-random places, one in each of as many equal stretches of the
// row. Every block of a row takes the same ones, so what it tells is known to all of them unheard.
#pragma once

#include "select/score_slice.cuh"

namespace kvc {

struct SampleRange {
  uint32_t least, most;              // keys of the sample; the least less 1
  uint32_t upper_least, lower_most;  // next to zero: of the positive scores, of the others
  uint32_t uppers;                   // positive scores
};

__device__ __forceinline__ void reset(SampleRange& shared) {
  shared.least = shared.upper_least = 0xffffffffu;
  shared.most = shared.lower_most = shared.uppers = 0;
}

template <typename T>
struct Sample {
  static constexpr uint32_t kAll = T::kSamples;
  static constexpr int kOwn = kAll / T::kThreads;  // of a thread
  float scores[kOwn];
  uint32_t count;  // of all threads

  // Of the `size` entries at `row`.
  __device__ __forceinline__ Sample(const float* row, uint32_t size) : count(min(kAll, size)) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const uint32_t i = j * T::kThreads + threadIdx.x;
      uint32_t at = i;
      if (size > kAll) {
        // the i-th stretch, and within it by the golden ratio: spread evenly, no period
        constexpr uint32_t kStretch = 0xffffffffu / kAll + 1;
        at = __umulhi(i * kStretch + i * 0x9e3779b9u % kStretch, size);
      }
      scores[j] = at < size ? __ldg(row + at) : 0;
    }
  }
};

// The keys of a thread, and the range of all, behind the next barrier.
template <typename T>
__device__ __forceinline__ void find_range(SampleRange& shared, const Sample<T>& sample,
                                           uint32_t (&keys)[Sample<T>::kOwn]) {
  constexpr int kOwn = Sample<T>::kOwn;
  constexpr uint32_t kZero = 0x80000000u;  // the key of 0
  uint32_t least = 0xffffffffu, most = 0, upper_least = 0xffffffffu, lower_most = 0, uppers = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const bool is_real = j * T::kThreads + threadIdx.x < sample.count;
    const uint32_t key = is_real ? key_of(sample.scores[j]) : kTopkPadding;
    keys[j] = key;
    least = min(least, key - 1);  // padding wraps
    most = max(most, key);
    upper_least = min(upper_least, key > kZero ? key : 0xffffffffu);
    lower_most = max(lower_most, key > kZero ? 0 : key);
    uppers += key > kZero;
  }
  least = __reduce_min_sync(0xffffffffu, least);
  most = __reduce_max_sync(0xffffffffu, most);
  upper_least = __reduce_min_sync(0xffffffffu, upper_least);
  lower_most = __reduce_max_sync(0xffffffffu, lower_most);
  uppers = __reduce_add_sync(0xffffffffu, uppers);
  if (threadIdx.x % kWarp == 0) {
    atomicMin(&shared.least, least);
    atomicMax(&shared.most, most);
    atomicMin(&shared.upper_least, upper_least);
    atomicMax(&shared.lower_most, lower_most);
    atomicAdd(&shared.uppers, uppers);
  }
}

// The keys over which the bins of a whole row are best spread, and the wanted one. The same in all
// threads, and in all blocks of a row.
template <typename T>
__device__ __forceinline__ Open find_open(SampleRange& shared, const Sample<T>& sample,
                                          uint32_t wanted, uint32_t size) {
  uint32_t keys[Sample<T>::kOwn];
  find_range(shared, sample, keys);
  __syncthreads();
  // on the positive side if the wanted one is surely there
  const uint32_t rank = static_cast<uint32_t>(uint64_t{wanted} * sample.count / size) + 1;
  const uint32_t low = 2 * rank <= shared.uppers ? shared.upper_least : shared.least + 1;
  return {.low = low, .width = shared.most - low, .rank = wanted};
}

}  // namespace kvc
