#include <algorithm>
#include <limits>
#include <vector>

#include "attend/output_terms.h"
#include "host/dispatch.h"
#include "host/parallel.h"
#include "host/rows.h"
#include "host/simd.h"

namespace kvc {
namespace {

constexpr int64_t kKeys = 256;  // entries that a thread takes at a time

template <typename T>
void run(const OutputTermsParams& p) {
  const int64_t rows = p.rows(), dim = p.head_dim, chunks = (p.capacity + kKeys - 1) / kKeys;
  const auto dot = [dim](const float* x, const float* y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim; ++d) sum += x[d] * y[d];
    return sum;
  };
  parallel_for(0, p.batch * p.num_kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> out(rows * dim), value(dim), out_square(rows), term(rows);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t store = item / chunks, b = store / p.num_kv_heads, h = store % p.num_kv_heads;
      const int64_t first = item % chunks * kKeys, last = std::min(first + kKeys, p.length(store));
      if (first >= last) continue;
      const T* from = static_cast<const T*>(p.out) + store * rows * dim;
      for (int64_t i = 0; i < rows * dim; ++i) out[i] = to_float(from[i]);
      for (int64_t r = 0; r < rows; ++r) out_square[r] = dot(&out[r * dim], &out[r * dim]);
      const T* values = static_cast<const T*>(p.v) + b * p.v_batch_stride + h * p.v_head_stride;
      float* sums = p.sums + b * p.sums_batch_stride + h * p.sums_head_stride;
      for (int64_t j = first; j < last; ++j) {
        for (int64_t d = 0; d < dim; ++d) value[d] = to_float(values[j * p.v_row_stride + d]);
        const float value_square = dot(value.data(), value.data());
        for (int64_t r = 0; r < rows; ++r) {
          const float x = p.logits[(store * rows + r) * p.capacity + j];
          term[r] =
              x == -std::numeric_limits<float>::infinity()
                  ? 0.0f
                  : output_term(p.terms, std::exp(x - p.lse[store * rows + r]), x, value_square,
                                out_square[r], dot(&out[r * dim], value.data()));
        }
        sums[j] = add_output_terms(
            p, sums[j], [&](int64_t g, int64_t i) { return term[g * p.num_queries + i]; });
      }
    }
  });
}

}  // namespace

void output_terms_cpu(const OutputTermsParams& params) {
  visit_float(params.dtype, "output_terms_", [&](auto tag) { run<decltype(tag)>(params); });
}

}  // namespace kvc
