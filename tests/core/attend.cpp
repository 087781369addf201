// decode_attention of a dense store.
#include "attend/decode_attention.h"

#include "check.h"

namespace kvc::test {
namespace {

template <typename T>
void decode_like_loops(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t queries,
                       int64_t length, int64_t dim) {
  Random random(length + dim);
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  const auto q = numbers<T>(batch * q_heads * queries * dim, random, 3.0f);
  const auto k = numbers<T>(batch * kv_heads * length * dim, random, 3.0f);
  const auto v = numbers<T>(batch * kv_heads * length * dim, random);
  std::vector<double> want, want_lse;
  for (int64_t row = 0; row < batch * q_heads * queries; ++row) {
    const int64_t head = row / queries / (q_heads / kv_heads),
                  seen = length - (queries - 1 - row % queries);
    std::vector<double> x(seen), out(dim, 0.0);
    double sum = 0.0;
    for (int64_t j = 0; j < seen; ++j) {
      double product = 0.0;
      for (int64_t d = 0; d < dim; ++d) {
        product += static_cast<double>(to_float(q[row * dim + d])) *
                   to_float(k[(head * length + j) * dim + d]);
      }
      sum += x[j] = std::exp(product * scale);
    }
    for (int64_t j = 0; j < seen; ++j) {
      for (int64_t d = 0; d < dim; ++d)
        out[d] += x[j] / sum * to_float(v[(head * length + j) * dim + d]);
    }
    want.insert(want.end(), out.begin(), out.end());
    want_lse.push_back(std::log(sum));
  }
  DecodeAttentionParams p{};
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.batch = batch;
  p.num_q_heads = q_heads;
  p.num_kv_heads = kv_heads;
  p.num_queries = queries;
  p.head_dim = dim;
  p.width = length;
  p.max_workers = 7;
  p.q_batch_stride = q_heads * queries * dim;
  p.q_head_stride = queries * dim;
  p.k_batch_stride = p.v_batch_stride = kv_heads * length * dim;
  p.k_head_stride = p.v_head_stride = length * dim;
  p.q_row_stride = p.k_row_stride = p.v_row_stride = dim;
  p.softmax_scale = static_cast<float>(scale);
  p.scale_log2 = static_cast<float>(scale * 1.44269504088896340736);
  p.dtype = dtype_of<T>();
  p.plan();
  const int64_t partials = (p.max_workers + p.num_rows()) * p.slice();
  std::vector<float> partial_out(partials * dim), partial_stats(partials * 2),
      lse(want_lse.size(), NAN);
  std::vector<T> out(want.size());
  p.out = out.data();
  p.lse = lse.data();
  p.partial_out = partial_out.data();
  p.partial_stats = partial_stats.data();
  decode_attention_cpu(p);
  std::vector<float> got;
  for (const T one : out) got.push_back(to_float(one));
  const std::string what = "decode_attention " + name_of<T>() + " S " + std::to_string(length);
  // out lies within [-1, 1] and is rounded to the dtype: 2^-9 of bfloat16, 2^-12 of float16
  const double rounding = std::is_same_v<T, float> ? 0.0
                          : std::is_same_v<T, f16> ? 0x1p-12
                                                   : 0x1p-9;
  expect_near(what, got, want, rounding + 2e-6);
  expect_near(what + ", lse", lse, want_lse, 5e-6);
}

const Checks checks([] {
  for_every_dtype([](auto tag) {
    using T = decltype(tag);
    decode_like_loops<T>(2, 4, 2, 1, 100, 64);
    decode_like_loops<T>(1, 8, 1, 3, 333, 80);
    decode_like_loops<T>(1, 3, 3, 1, 1000, 128);
  });
});

}  // namespace
}  // namespace kvc::test
