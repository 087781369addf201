// The CPU twin: kKeys entries of a kv head at a time. Their values as float32, the products with
// the outputs, the exponentials of a query row, its terms, and last the sums over rows entry by
// entry. Bound: rows * head_dim products an entry, and one exponential a row.
#include <algorithm>
#include <limits>

#include "attend/output_terms.h"
#include "host/buffer.h"
#include "host/dispatch.h"
#include "host/exp2.h"
#include "host/parallel.h"
#include "host/simd.h"

namespace kvc {
namespace {

constexpr int64_t kKeys = 256;  // entries that a thread takes at a time
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kInf = std::numeric_limits<float>::infinity();

KVC_CLONES float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// to[j] = <values[j], out>
KVC_CLONES void products(const float* values, const float* out, int64_t count, int64_t dim,
                         float* to) {
  for (int64_t j = 0; j < count; ++j) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim; ++d) sum += values[j * dim + d] * out[d];
    to[j] = sum;
  }
}

KVC_CLONES void squares(const float* values, int64_t count, int64_t dim, float* to) {
  for (int64_t j = 0; j < count; ++j) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim; ++d) sum += values[j * dim + d] * values[j * dim + d];
    to[j] = sum;
  }
}

// share[j] becomes the term of a query row and entry j; where the row does not see j the logit is
// -inf and the share 0.
KVC_CLONES void terms_of_row(int32_t terms, const float* logits, const float* value_square,
                             float out_square, const float* product, int64_t count, float* share) {
  for (int64_t j = 0; j < count; ++j) {
    const float x = logits[j] == -kInf ? 0.0f : logits[j];
    share[j] = output_term(terms, share[j], x, value_square[j], out_square, product[j]);
  }
}

template <typename T>
void run(const OutputTermsParams& p) {
  const int64_t rows = p.rows(), dim = p.head_dim, chunks = (p.capacity + kKeys - 1) / kKeys;
  parallel_for(0, p.batch * p.num_kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> out(rows * dim), values(kKeys * dim), value_square(kKeys), product(kKeys),
        term(rows * kKeys);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t store = item / chunks, b = store / p.num_kv_heads, h = store % p.num_kv_heads;
      const int64_t first = item % chunks * kKeys;
      const int64_t count = std::min(kKeys, p.length(store) - first);
      if (count <= 0) continue;
      const T* from = static_cast<const T*>(p.out) + store * rows * dim;
      for (int64_t i = 0; i < rows * dim; ++i) out.data()[i] = to_float(from[i]);
      const T* rows_of_v = static_cast<const T*>(p.v) + b * p.v_batch_stride + h * p.v_head_stride;
      for (int64_t j = 0; j < count; ++j) {
        const T* value = rows_of_v + (first + j) * p.v_row_stride;
        for (int64_t d = 0; d < dim; ++d) values.data()[j * dim + d] = to_float(value[d]);
      }
      squares(values.data(), count, dim, value_square.data());
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = out.data() + r * dim;
        const float* logits = p.logits + (store * rows + r) * p.capacity + first;
        float* share = term.data() + r * kKeys;
        const float lse = p.lse[store * rows + r];
        for (int64_t j = 0; j < count; ++j) {
          share[j] = logits[j] == -kInf ? -kInf : logits[j] - lse;  // lse is -inf where all are
        }
        std::fill(share + count, share + kKeys, -kInf);
        exp2_of_scaled(share, kLog2e, 0.0f, kKeys);
        products(values.data(), row, count, dim, product.data());
        terms_of_row(p.terms, logits, value_square.data(), dot(row, row, dim), product.data(),
                     count, share);
      }
      float* sums = p.sums + b * p.sums_batch_stride + h * p.sums_head_stride + first;
      for (int64_t j = 0; j < count; ++j) {
        sums[j] = add_output_terms(p, sums[j], [&](int64_t g, int64_t i) {
          return term.data()[(g * p.num_queries + i) * kKeys + j];
        });
      }
    }
  });
}

}  // namespace

void output_terms_cpu(const OutputTermsParams& params) {
  visit_float(params.dtype, "output_terms_", [&](auto tag) { run<decltype(tag)>(params); });
}

}  // namespace kvc
