// window_scores, with and without the log-sum-exp, and the exponentials that it is made of.
#include <algorithm>

#include "check.h"
#include "host/exp2.h"
#include "score/window_scores.h"

namespace kvc::test {
namespace {

struct Shape {
  int64_t batch, q_heads, kv_heads, window, length, dim;
};

template <typename T>
void window_scores_like_loops(const Shape& s, bool with_lse, Pool pool) {
  Random random(s.length + s.dim);
  const int64_t rows = s.batch * s.q_heads * s.window, kernel = 5, scored = s.length - s.window;
  const double scale = 1.0 / std::sqrt(static_cast<double>(s.dim));
  const auto q = numbers<T>(rows * s.dim, random, 4.0f);
  const auto k = numbers<T>(s.batch * s.kv_heads * s.length * s.dim, random, 4.0f);
  const int64_t group = s.q_heads / s.kv_heads;

  std::vector<float> lse(rows);
  std::vector<double> want;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      std::vector<double> votes(scored, 0.0);
      for (int64_t r = 0; r < group * s.window; ++r) {
        const int64_t row = (b * s.q_heads + h * group) * s.window + r;
        const int64_t last = s.length - s.window + r % s.window;
        std::vector<double> x(last + 1);
        double most = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j <= last; ++j) {
          double product = 0.0;
          for (int64_t d = 0; d < s.dim; ++d) {
            product += static_cast<double>(to_float(q[row * s.dim + d])) *
                       to_float(k[((b * s.kv_heads + h) * s.length + j) * s.dim + d]);
          }
          x[j] = product * scale;
          most = std::max(most, x[j]);
        }
        for (const double one : x) sum += std::exp(one - most);
        lse[row] = static_cast<float>(most + std::log(sum));
        for (int64_t j = 0; j < scored; ++j) votes[j] += std::exp(x[j] - most) / sum / group;
      }
      for (int64_t j = 0; j < s.length; ++j) {
        double pooled = pool == Pool::kMax ? -INFINITY : 0.0;
        for (int64_t i = std::max<int64_t>(j - kernel / 2, 0); i <= j + kernel / 2 && i < scored;
             ++i) {
          pooled = pool == Pool::kMax ? std::max(pooled, votes[i]) : pooled + votes[i] / kernel;
        }
        want.push_back(j < scored ? pooled : INFINITY);
      }
    }
  }

  WindowScoresParams p{AttentionRows{
      .q = q.data(),
      .k = k.data(),
      .lse = with_lse ? lse.data() : nullptr,
      .batch = s.batch,
      .num_q_heads = s.q_heads,
      .num_kv_heads = s.kv_heads,
      .window = s.window,
      .seq_len = s.length,
      .head_dim = s.dim,
      .first_query = scored,
      .q_batch_stride = s.q_heads * s.window * s.dim,
      .q_head_stride = s.window * s.dim,
      .q_row_stride = s.dim,
      .k_batch_stride = s.kv_heads * s.length * s.dim,
      .k_head_stride = s.length * s.dim,
      .k_row_stride = s.dim,
      .lse_batch_stride = s.q_heads * s.window,
      .lse_head_stride = s.window,
      .scale_log2 = static_cast<float>(kLog2e * scale),
      .dtype = dtype_of<T>(),
  }};
  p.num_scored = scored;
  p.kernel_size = kernel;
  p.window_reduce = WindowReduce::kSum;
  p.group_reduce = GroupReduce::kMean;
  p.pool = pool;
  p.max_chunks = p.chunks_wanted();
  std::vector<float> row_stats(p.max_chunks * rows * 2), out(want.size(), NAN);
  std::vector<float> votes(s.batch * std::max(p.vote_heads(), s.kv_heads * p.row_groups()) *
                           s.length);
  p.row_stats = row_stats.data();
  p.votes = votes.data();
  p.out = out.data();
  window_scores_cpu(p);
  const std::string what = "window_scores " + name_of<T>() + " S " + std::to_string(s.length) +
                           " D " + std::to_string(s.dim) + (with_lse ? " lse" : "");
  // a logit is a float32 sum of up to 128 products of up to 16: off by 1e-5 at most, its power by
  // as much of itself, and a vote adds up `window` of them
  expect_near(what, out, want, 1e-5 * static_cast<double>(s.window));
}

const Checks checks([] {
  std::vector<float> x(96);
  alignas(64) float powers[96];
  for (int i = 0; i < 96; ++i) powers[i] = x[i] = static_cast<float>(i) * -1.7f + 20.0f;
  x[5] = powers[5] = -INFINITY;
  const float sum = exp2_of_scaled(powers, 0.5f, 3.0f, 96);
  std::vector<double> want;
  double total = 0.0;
  for (const float one : x) {
    want.push_back(std::exp2(0.5 * one - 3.0));
    total += want.back();
  }
  expect_near("exp2_of_scaled", {powers, powers + 96}, want, 2e-5);  // the largest is 2^7
  expect_near("its sum", {sum}, {total}, 1e-4);

  for_every_dtype([](auto tag) {
    using T = decltype(tag);
    for (const Shape& s :
         {Shape{2, 4, 2, 7, 61, 64}, Shape{1, 6, 2, 16, 517, 80}, Shape{1, 3, 3, 1, 300, 128}}) {
      window_scores_like_loops<T>(s, false, Pool::kAvg);
      window_scores_like_loops<T>(s, true, Pool::kMax);
    }
  });
});

}  // namespace
}  // namespace kvc::test
