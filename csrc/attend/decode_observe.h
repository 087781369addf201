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

// Entry j of a store. logit(g, i) is the scaled logit of query i of head g, share(g, i) its
// probability; neither is asked for where the query does not see j.
template <typename Logit, typename Share>
constexpr void observe_entry(const DecodeAttentionParams& p, int64_t store, int64_t length,
                             int64_t j, Logit&& logit, Share&& share) {
  const ObservedParams& o = p.observed;
  const int n = static_cast<int>(p.num_queries), group = p.q_per_kv;
  if (o.sums != nullptr) {
    const int heads = o.sums_by_head ? group : 1;
    for (int kept = 0; kept < heads; ++kept) {
      const int first = o.sums_by_head ? kept : 0, last = o.sums_by_head ? kept + 1 : group;
      float sum = 0, factor = 1;
      for (int i = 0; i < n; ++i) {
        float term = 0;
        if (j < p.visible(length, i)) {
          term = observed_reduce(o.reduce, first, last, [&](int g) {
            const float x = share(g, i);
            return o.power == 2 ? x * x : x;
          });
        }
        sum = o.decay == 0 ? term : sum * o.decay + term;
        factor *= o.decay;
      }
      if (o.weights != nullptr) sum *= observed_weights(p, store)[j];
      float* to = observed_sums(p, store, kept) + j;
      *to = o.decay == 0 ? sum : *to * factor + sum;
    }
  }
  if (o.history != nullptr) {
    const int32_t seen = *o.seen.at(p.row_of_batch(store), p.kv_head(store));
    const int heads = o.history_by_head ? group : 1;
    for (int kept = 0; kept < heads; ++kept) {
      const int first = o.history_by_head ? kept : 0, last = o.history_by_head ? kept + 1 : group;
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
    }
  }
}

}  // namespace kvc
