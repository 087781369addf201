// The CPU twin: candidates of a head are gathered column by column, so that each softmax runs over
// neighbours in memory.
#include <algorithm>
#include <limits>
#include <vector>

#include "host/exp2.h"
#include "host/parallel.h"
#include "host/simd.h"
#include "score/history_scores.h"

namespace kvc {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int64_t kGroup = 32;  // columns added up before they join the total: fewer roundings
constexpr float kInf = std::numeric_limits<float>::infinity();

KVC_CLONES void add_share(const float* x, float share, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i] * share;
}
// NaN wins.
KVC_CLONES void max_share(const float* x, float share, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = x[i] * share;
    to[i] = value <= to[i] || to[i] != to[i] ? to[i] : value;
  }
}

void run_head(const HistoryScoresParams& p, int64_t b, int64_t h) {
  const int64_t u = h / (p.heads / p.units);
  const int32_t* positions =
      p.positions + b * p.positions_batch_stride + u * p.positions_unit_stride;
  const int64_t length = std::clamp<int64_t>(*p.lengths.at(b, u), 0, p.capacity);
  const int64_t end = *p.seen.at(b, u) - p.window;  // of the candidates' positions
  std::vector<int64_t> candidates;
  for (int64_t slot = 0; slot < length; ++slot) {
    if (positions[slot] < end) candidates.push_back(slot);
  }
  const int64_t count = static_cast<int64_t>(candidates.size()), padded = (count + 15) / 16 * 16;
  std::vector<float> buffer(3 * padded + 16);
  float* column =
      reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
  float *total = column + padded, *group = total + padded;
  std::fill_n(total, 2 * padded, 0.0f);
  const auto fuse = p.fuse == HistoryFuse::kSum ? add_share : max_share;
  const float* history = p.history + b * p.batch_stride + h * p.head_stride;
  for (int64_t w = 0; w < p.width && count > 0; ++w) {
    for (int64_t i = 0; i < count; ++i) column[i] = history[candidates[i] * p.row_stride + w];
    std::fill(column + count, column + padded, -kInf);
    const float most = max_of(column, padded);
    const float sum = exp2_of_scaled(column, kLog2e, most == -kInf ? 0.0f : most * kLog2e, padded);
    if (sum != 0) fuse(column, 1.0f / sum, group, count);  // 0: a query that is not there
    if (w % kGroup == kGroup - 1 || w == p.width - 1) {
      fuse(group, 1.0f, total, count);
      std::fill_n(group, padded, 0.0f);
    }
  }
  float* scores = p.scores + (b * p.heads + h) * p.capacity;
  std::fill_n(scores, p.capacity, 0.0f);
  for (int64_t i = 0; i < count; ++i) scores[candidates[i]] = total[i];
}

}  // namespace

void history_scores_cpu(const HistoryScoresParams& p) {
  parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_head(p, i / p.heads, i % p.heads);
  });
}

}  // namespace kvc
