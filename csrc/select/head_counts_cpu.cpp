// head_counts on the CPU: a row after the other, a thread a head. Three passes of 11, 11 and 10
// bits over the keys of all heads, each followed by a walk down the clamped histograms; a fourth
// counts what lies above the threshold and what equals it.
#include <algorithm>
#include <cstring>
#include <vector>

#include "host/parallel.h"
#include "host/simd.h"
#include "select/head_counts.h"

namespace kvc {
namespace {

constexpr int kBins = 1 << 11;

uint32_t key_at(const float* scores, int64_t i) {
  uint32_t bits;
  std::memcpy(&bits, scores + i, sizeof(bits));
  return topk_key(bits);
}

// Keys of one head that begin with `prefix`, by their next digit; and how many lie above all of
// those.
KVC_CLONES uint32_t count_digits(const float* scores, int64_t n, uint32_t prefix, int prefix_shift,
                                 int shift, uint32_t mask, uint32_t* bins) {
  uint32_t above = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_at(scores, i);
    const uint32_t leading = prefix_shift == 32 ? 0 : key >> prefix_shift;
    if (leading == prefix) ++bins[key >> shift & mask];
    above += leading > prefix;
  }
  return above;
}

struct Row {
  const float* scores;  // of head 0, at the first real entry
  int64_t length;
  int64_t head_stride;
  std::vector<HeadLimits> limits;
};

// Finds the threshold key; `wanted`, the entries to take beyond the floors, becomes how many of
// those equal to it are taken.
uint32_t find_threshold(const Row& row, int64_t& wanted) {
  const auto heads = static_cast<int64_t>(row.limits.size());
  std::vector<uint32_t> bins(heads * kBins);
  std::vector<uint32_t> reached(heads);
  uint32_t prefix = 0;
  for (int prefix_shift = 32; prefix_shift > 0;) {
    const int digits = prefix_shift > 10 ? 11 : 10, shift = prefix_shift - digits;
    std::fill(bins.begin(), bins.end(), 0);
    parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        reached[h] = count_digits(row.scores + h * row.head_stride, row.length, prefix,
                                  prefix_shift, shift, (1u << digits) - 1, bins.data() + h * kBins);
      }
    });
    int bin = (1 << digits) - 1;
    for (;; --bin) {
      int64_t taken = 0;
      for (int64_t h = 0; h < heads; ++h) {
        const HeadLimits& limit = row.limits[h];
        taken += limit.clamp(reached[h] + bins[h * kBins + bin]) - limit.clamp(reached[h]);
      }
      if (taken >= wanted) break;
      wanted -= taken;
      for (int64_t h = 0; h < heads; ++h) reached[h] += bins[h * kBins + bin];
    }
    prefix = prefix << digits | static_cast<uint32_t>(bin);
    prefix_shift = shift;
  }
  return prefix;
}

void count_row(const HeadCountsParams& p, int64_t b) {
  Row row{.head_stride = p.head_stride};
  int64_t floors = 0, caps = 0;
  for (int64_t h = 0; h < p.heads; ++h) {
    row.limits.push_back(head_limits(p, b, h));
    floors += row.limits[h].floor;
    caps += row.limits[h].cap;
  }
  row.scores = p.scores + b * p.batch_stride + row.limits[0].begin;
  row.length = row.limits[0].end - row.limits[0].begin;
  int32_t* counts = p.counts + b * p.heads;
  const int64_t total = p.totals[b];
  if (total <= floors || total >= caps) {
    for (int64_t h = 0; h < p.heads; ++h) {
      counts[h] = static_cast<int32_t>(total <= floors ? row.limits[h].floor : row.limits[h].cap);
    }
    return;
  }
  int64_t ties = total - floors;
  const uint32_t threshold = find_threshold(row, ties);
  for (int64_t h = 0; h < p.heads; ++h) {
    const float* scores = row.scores + h * row.head_stride;
    uint32_t above = 0, equal = 0;
    for (int64_t i = 0; i < row.length; ++i) {
      const uint32_t key = key_at(scores, i);
      above += key > threshold;
      equal += key == threshold;
    }
    const HeadLimits& limit = row.limits[h];
    const int64_t base = limit.clamp(above);
    const int64_t take = std::min<int64_t>(ties, limit.clamp(above + equal) - base);
    counts[h] = static_cast<int32_t>(base + take);
    ties -= take;
  }
}

}  // namespace

void head_counts_cpu(const HeadCountsParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) count_row(params, b);
}

}  // namespace kvc
