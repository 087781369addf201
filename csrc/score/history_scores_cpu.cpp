// The CPU twin: kColumns columns of a head at a time, entry by entry, as they lie in memory. Their
// maxima, then all exponentials into a buffer of 4 * kColumns bytes an entry, the sums of that, and
// what each entry gets of them. Bound: one exponential a number of the history.
#include <algorithm>
#include <limits>
#include <vector>

#include "host/buffer.h"
#include "host/exp2.h"
#include "host/parallel.h"
#include "host/simd.h"
#include "score/history_scores.h"

namespace kvc {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int64_t kColumns = 32, kGroup = 128;
constexpr float kInf = std::numeric_limits<float>::infinity();

// Entries of a head that take part: where their first column lies.
struct Candidates {
  const float* history;
  int64_t row_stride;
  const int64_t* slots;
  int64_t count;
};

// NaN is passed over.
KVC_CLONES void max_of_columns(const Candidates& c, int64_t columns, float* most) {
  for (int64_t i = 0; i < c.count; ++i) {
    const float* x = c.history + c.slots[i] * c.row_stride;
    for (int64_t w = 0; w < columns; ++w) most[w] = x[w] > most[w] ? x[w] : most[w];
  }
}

KVC_CLONES void take_away(const Candidates& c, int64_t columns, const float* most, float* to) {
  for (int64_t i = 0; i < c.count; ++i) {
    const float* x = c.history + c.slots[i] * c.row_stride;
    for (int64_t w = 0; w < columns; ++w) to[i * kColumns + w] = x[w] - most[w];
    for (int64_t w = columns; w < kColumns; ++w) to[i * kColumns + w] = -kInf;
  }
}

// kGroup entries are added up before they join the total: fewer roundings.
KVC_CLONES void sum_of_columns(const float* x, int64_t count, float* sum) {
  for (int64_t first = 0; first < count; first += kGroup) {
    float group[kColumns] = {};
    for (int64_t i = first; i < std::min(first + kGroup, count); ++i) {
      for (int64_t w = 0; w < kColumns; ++w) group[w] += x[i * kColumns + w];
    }
    for (int64_t w = 0; w < kColumns; ++w) sum[w] += group[w];
  }
}

KVC_CLONES void add_shares(const float* x, const float* factor, int64_t count, float* total) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t w = 0; w < kColumns; ++w) sum += x[i * kColumns + w] * factor[w];
    total[i] += sum;
  }
}

// There is no NaN.
KVC_CLONES void max_shares(const float* x, const float* factor, int64_t count, float* total) {
  for (int64_t i = 0; i < count; ++i) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t w = 0; w < kColumns; ++w) {
      const float share = x[i * kColumns + w] * factor[w];
      most = share > most ? share : most;
    }
    total[i] = std::max(total[i], most);
  }
}

}  // namespace

void history_ranks_cpu(const HistoryHead& head, int64_t length, float* scores, bool adds) {
  if (!adds) std::fill_n(scores, length, 0.0f);
  std::vector<int64_t> slots;
  for (int64_t slot = 0; slot < length; ++slot) {
    if (head.positions[slot] < head.position_end) slots.push_back(slot);
  }
  const int64_t count = static_cast<int64_t>(slots.size());
  if (count == 0) return;
  const Buffer<float> shares(count * kColumns);
  std::vector<float> total(count);
  bool is_nan = false;
  for (int64_t first = 0; first < head.width; first += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, head.width - first);
    const Candidates own{head.history + first, head.row_stride, slots.data(), count};
    float most[kColumns], sum[kColumns] = {};
    std::fill_n(most, kColumns, -kInf);
    max_of_columns(own, columns, most);
    for (float& x : most) x = x == -kInf ? 0.0f : x;
    take_away(own, columns, most, shares.data());
    exp2_of_scaled(shares.data(), kLog2e, 0.0f, count * kColumns);
    sum_of_columns(shares.data(), count, sum);
    for (float& x : sum) {
      is_nan |= x != x;
      x = x == 0 ? 0.0f : 1.0f / x;  // 0: a query that is not there
    }
    const auto fuse = head.fuse == HistoryFuse::kSum ? add_shares : max_shares;
    fuse(shares.data(), sum, count, total.data());
  }
  // a column with a NaN says NaN of every candidate
  if (is_nan) std::fill(total.begin(), total.end(), std::numeric_limits<float>::quiet_NaN());
  for (int64_t i = 0; i < count; ++i) scores[slots[i]] += total[i];
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
