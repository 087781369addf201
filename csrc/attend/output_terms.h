// output_terms_: by how much a step's output would have changed without an entry (OBCache), added
// up in place. For query i of head g of a kv head, with A = exp(x - lse) its probability of entry
// j, s = x the scaled logit, O its output and v the entry's value:
//
//   value: A^2 |v|^2        key: (A s)^2 (|v|^2 + |O|^2 - 2 O.v)        cross: 2 A^2 s (|v|^2 -
//   O.v) sums[j] = decay^n sums[j] + sum over i of decay^(n-1-i) sum over g of the terms that are
//   asked for
//
// A query that does not see j has a logit of -inf there and adds nothing; decay 0 leaves the last
// query's terms alone, whatever sums held. All of it float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "host/dtype.h"
#include "host/unit_counts.h"

namespace kvc {

constexpr int64_t kTermsMaxRows = 64;  // num_queries times q_per_kv
enum : int32_t { kTermValue = 1, kTermKey = 2, kTermCross = 4 };

struct OutputTermsParams {
  float* sums;  // [batch, num_kv_heads, capacity], last dimension contiguous
  int64_t sums_batch_stride, sums_head_stride;
  const void* out;  // [batch, num_q_heads, num_queries, head_dim] contiguous
  const void* v;    // BHSD [batch, num_kv_heads, capacity, head_dim], last dimension contiguous
  int64_t v_batch_stride, v_head_stride, v_row_stride;
  const float* logits;                // [batch, num_q_heads, num_queries, capacity] contiguous
  const float* lse;                   // [batch, num_q_heads, num_queries] contiguous
  UnitCounts<const int32_t> lengths;  // of (b, kv head); null: the capacity
  int64_t batch, num_q_heads, num_kv_heads, num_queries, capacity, head_dim;
  float decay;
  int32_t terms;
  DType dtype;

  constexpr int64_t rows() const { return num_q_heads / num_kv_heads * num_queries; }
  constexpr int64_t length(int64_t store) const {
    if (lengths.data == nullptr) return capacity;
    const int64_t n = *lengths.at(store / num_kv_heads, store % num_kv_heads);
    return n < 0 ? 0 : n < capacity ? n : capacity;
  }
};

// The terms of one query and entry; `share` is A.
constexpr float output_term(int32_t terms, float share, float logit, float value_square,
                            float out_square, float product) {
  const float a = share * share;
  float term = 0;
  if (terms & kTermValue) term += a * value_square;
  if (terms & kTermKey) {
    term += a * logit * logit * (value_square + out_square - 2 * product);
  }
  if (terms & kTermCross) term += 2 * a * logit * (value_square - product);
  return term;
}

// What becomes of a sum. term(g, i) is that of query i of head g.
template <typename Term>
constexpr float add_output_terms(const OutputTermsParams& p, float old, Term&& term) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  float sum = 0, factor = 1;
  for (int64_t i = 0; i < p.num_queries; ++i) {
    float all = 0;
    for (int64_t g = 0; g < group; ++g) all += term(g, i);
    sum = p.decay == 0 ? all : sum * p.decay + all;
    factor *= p.decay;
  }
  return p.decay == 0 ? sum : old * factor + sum;
}

void output_terms_cpu(const OutputTermsParams& params);
void output_terms_cuda(const OutputTermsParams& params, void* stream);

}  // namespace kvc
