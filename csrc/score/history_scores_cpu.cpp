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

}  // namespace

void history_ranks_cpu(const HistoryHead& head, int64_t length, float* scores, bool adds) {
  std::vector<int64_t> candidates;
  for (int64_t slot = 0; slot < length; ++slot) {
    if (head.positions[slot] < head.position_end) candidates.push_back(slot);
  }
  const int64_t count = static_cast<int64_t>(candidates.size()), padded = (count + 15) / 16 * 16;
  std::vector<float> buffer(3 * padded + 16);
  float* column =
      reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
  float *total = column + padded, *group = total + padded;
  std::fill_n(total, 2 * padded, 0.0f);
  const auto fuse = head.fuse == HistoryFuse::kSum ? add_share : max_share;
  for (int64_t w = 0; w < head.width && count > 0; ++w) {
    for (int64_t i = 0; i < count; ++i) {
      column[i] = head.history[candidates[i] * head.row_stride + w];
    }
    std::fill(column + count, column + padded, -kInf);
    const float most = max_of(column, padded);
    const float sum = exp2_of_scaled(column, kLog2e, most == -kInf ? 0.0f : most * kLog2e, padded);
    if (sum != 0) fuse(column, 1.0f / sum, group, count);  // 0: a query that is not there
    if (w % kGroup == kGroup - 1 || w == head.width - 1) {
      fuse(group, 1.0f, total, count);
      std::fill_n(group, padded, 0.0f);
    }
  }
  if (!adds) std::fill_n(scores, length, 0.0f);
  for (int64_t i = 0; i < count; ++i) scores[candidates[i]] += total[i];
}

void history_scores_cpu(const HistoryScoresParams& p) {
  parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.heads, h = i % p.heads;
      const int64_t held = *p.lengths.at(b, p.unit(h));
      const int64_t length = std::clamp<int64_t>(held, 0, p.capacity);
      float* scores = p.scores + i * p.capacity;
      history_ranks_cpu(p.head(b, h), length, scores, /*adds=*/false);
      std::fill(scores + length, scores + p.capacity, 0.0f);
    }
  });
}

}  // namespace kvc
