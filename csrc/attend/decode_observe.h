// What is observed of one entry: the arithmetic that the CPU twin and the CUDA kernel share, so
// that their rounding points are the same.
#pragma once

#include "attend/decode_attention.h"

namespace kvc {

// reduce over the query heads [first, last) of a group, in their order.
template <typename F>
constexpr float observed_reduce(GroupReduce reduce, int first, int last, F&& value) {
  float all = value(first);
  for (int g = first + 1; g < last; ++g) {
    const float x = value(g);
    all = reduce == GroupReduce::kMax ? (x <= all || all != all ? all : x) : all + x;
  }
  return reduce == GroupReduce::kMean ? all / static_cast<float>(last - first) : all;
}

// Query i's part of what entry j adds to the sum kept of the query heads [first, last).
template <typename Share>
constexpr float observed_term(const DecodeAttentionParams& p, int64_t length, int64_t j, int i,
                              int first, int last, Share&& share) {
  if (j >= p.visible(length, i)) return 0;
  return observed_reduce(p.observed.reduce, first, last, [&](int g) {
    const float x = share(g, i);
    return p.observed.power == 2 ? x * x : x;
  });
}

// The sum of the terms of queries up to one, from the sum up to the one before.
constexpr float observed_next(const DecodeAttentionParams& p, float sum, float term) {
  return p.observed.decay == 0 ? term : sum * p.observed.decay + term;
}

// What entry j adds, its weight apart; the old sum counts decay^num_queries.
template <int kQueries = 0, typename Share>
constexpr float observed_gain(const DecodeAttentionParams& p, int64_t length, int64_t j, int first,
                              int last, Share&& share) {
  const int n = kQueries > 0 ? kQueries : static_cast<int>(p.num_queries);
  float sum = 0;
  for (int i = 0; i < n; ++i) {
    sum = observed_next(p, sum, observed_term(p, length, j, i, first, last, share));
  }
  return sum;
}

// `old` is read only where it counts.
template <int kQueries = 0>
constexpr float observed_sum(const DecodeAttentionParams& p, float gain, const float& old) {
  const ObservedParams& o = p.observed;
  if (o.decay == 0) return gain;
  float factor = o.decay;
  const int n = kQueries > 0 ? kQueries : static_cast<int>(p.num_queries);
  for (int i = 1; i < n; ++i) factor *= o.decay;
  return old * factor + gain;
}

// Entry j of a store. logit(g, i) is the scaled logit of query i of head g, share(g, i) its
// probability; neither is asked for where the query does not see j. kGroup and kQueries are the
// sizes where they are known to the compiler, else 0.
template <int kGroup = 0, int kQueries = 0, typename Logit, typename Share>
constexpr void observe_entry(const DecodeAttentionParams& p, int64_t store, int64_t length,
                             int64_t j, Logit&& logit, Share&& share) {
  const ObservedParams& o = p.observed;
  const int n = kQueries > 0 ? kQueries : static_cast<int>(p.num_queries);
  const int group = kGroup > 0 ? kGroup : p.q_per_kv;
  // What is kept of the query heads [first, last): `kept` is its number.
  const auto add = [&](int kept, int first, int last) {
    float gain = observed_gain<kQueries>(p, length, j, first, last, share);
    if (o.weights != nullptr) gain *= observed_weights(p, store)[j];
    float& sum = observed_sums(p, store, kept)[j];
    sum = observed_sum<kQueries>(p, gain, sum);
  };
  if (o.sums != nullptr && !o.sums_by_head) add(0, 0, group);
  if (o.sums != nullptr && o.sums_by_head) {
    for (int g = 0; g < group; ++g) add(g, g, g + 1);
  }
  const auto record = [&](int kept, int first, int last) {
    const int32_t seen = *o.seen.at(p.row_of_batch(store), p.kv_head(store));
    float* to = observed_history(p, store, kept) + j * o.history_row_stride;
    for (int i = 0; i < n; ++i) {
      float x = -__builtin_huge_valf();
      if (j < p.visible(length, i)) {
        x = observed_reduce(o.reduce, first, last, [&](int g) { return logit(g, i); });
      }
      const int width = static_cast<int>(o.history_width);
      const int column = static_cast<int>(seen - n + i) % width;
      to[column < 0 ? column + width : column] = x;
    }
  };
  if (o.history != nullptr && !o.history_by_head) record(0, 0, group);
  if (o.history != nullptr && o.history_by_head) {
    for (int g = 0; g < group; ++g) record(g, g, g + 1);
  }
}

}  // namespace kvc
