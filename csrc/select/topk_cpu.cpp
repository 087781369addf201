// topk on the CPU: a thread a row. Forced entries are taken first; among the rest, the leading 11
// bits of all keys are counted, the keys in the threshold's bin, a few percent, are copied out, and
// two more passes of 11 and 10 bits over these find the threshold; one ordered pass writes the
// positions. Keys are made anew from the scores, 64 at a time and vectorised.
#include <algorithm>
#include <cstring>
#include <vector>

#include "host/parallel.h"
#include "host/simd.h"
#include "select/topk.h"

namespace kvc {
namespace {

constexpr int64_t kBlock = 64;
constexpr int kBins = 1 << 11;
constexpr int kLeadingShift = 21;  // of the first 11 bits of a key

__attribute__((always_inline)) inline void keys_of(const float* scores, int64_t n, uint32_t* keys) {
  uint32_t bits[kBlock];
  std::memcpy(bits, scores, n * sizeof(float));
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) keys[j] = topk_key(bits[j]);
}

// How many scores have each of the 2048 leading key digits. Two tables, so that runs of one digit
// do not wait for their own stores.
KVC_CLONES void count_leading(const float* scores, int64_t n, uint32_t* bins) {
  uint32_t odd[kBins] = {};
  uint32_t keys[kBlock];
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    keys_of(scores + i, kBlock, keys);
    for (int64_t j = 0; j < kBlock; j += 2) {
      ++bins[keys[j] >> kLeadingShift];
      ++odd[keys[j + 1] >> kLeadingShift];
    }
  }
  keys_of(scores + i, n - i, keys);
  for (int64_t j = 0; j < n - i; ++j) ++bins[keys[j] >> kLeadingShift];
  for (int bin = 0; bin < kBins; ++bin) bins[bin] += odd[bin];
}

// Appends those of up to 64 keys that begin with `prefix`.
__attribute__((always_inline)) inline uint32_t* pick_block(const uint32_t* keys, int64_t n,
                                                           uint32_t prefix, uint32_t* out) {
  uint32_t matches = 0;
#pragma omp simd reduction(+ : matches)
  for (int64_t j = 0; j < n; ++j) matches += keys[j] >> kLeadingShift == prefix;
  if (matches == 0) return out;
  for (int64_t j = 0; j < n; ++j) {
    *out = keys[j];
    out += keys[j] >> kLeadingShift == prefix;
  }
  return out;
}

// The keys that begin with `prefix`, in order; one slot more than they are must be there.
KVC_CLONES void pick_within(const float* scores, int64_t n, uint32_t prefix, uint32_t* out) {
  uint32_t keys[kBlock];
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    keys_of(scores + i, kBlock, keys);
    out = pick_block(keys, kBlock, prefix, out);
  }
  keys_of(scores + i, n - i, keys);
  pick_block(keys, n - i, prefix, out);
}

// The bin that holds the `wanted`-th largest key; `wanted` becomes its rank within the bin.
uint32_t pick_bin(const uint32_t* bins, int64_t& wanted) {
  int bin = kBins - 1;
  for (; bin > 0 && bins[bin] < wanted; --bin) wanted -= bins[bin];
  return static_cast<uint32_t>(bin);
}

// Writes the positions, counted from `first`, of the keys above `threshold` and of the first `ties`
// equal to it.
KVC_CLONES void write_kept(const float* scores, int64_t n, int64_t first, uint32_t threshold,
                           int64_t ties, int64_t wanted, int32_t* out) {
  uint32_t keys[kBlock];
  int64_t written = 0;
  for (int64_t i = 0; i < n && written < wanted; i += kBlock) {
    const int64_t size = std::min(kBlock, n - i);
    if (size == kBlock) {
      keys_of(scores + i, kBlock, keys);
    } else {
      keys_of(scores + i, size, keys);
    }
    uint32_t above = 0, equal = 0;
#pragma omp simd reduction(+ : above, equal)
    for (int64_t j = 0; j < size; ++j) {
      above += keys[j] > threshold;
      equal += keys[j] == threshold;
    }
    if (above + equal == 0) continue;
    int32_t kept[kBlock];
    int64_t m = 0;
    const int32_t base = static_cast<int32_t>(first + i);
    if (equal == 0 || ties == 0 || equal <= ties) {
      // all ties of the block or none: one comparison an entry
      const uint32_t least = equal == 0 || ties == 0 ? threshold + (ties == 0) : threshold;
      for (int64_t j = 0; j < size; ++j) {
        kept[m] = base + static_cast<int32_t>(j);
        m += keys[j] >= least;
      }
      ties -= ties == 0 ? 0 : equal;
    } else {
      for (int64_t j = 0; j < size; ++j) {
        const bool tie = keys[j] == threshold && ties > 0;
        kept[m] = base + static_cast<int32_t>(j);
        m += keys[j] > threshold || tie;
        ties -= tie;
      }
    }
    std::memcpy(out + written, kept, m * sizeof(int32_t));
    written += m;
  }
}

// The `wanted` largest of n scores, ascending by position.
void select(const float* scores, int64_t n, int64_t first, int64_t wanted, int32_t* out) {
  if (wanted == n) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(first + i);
    return;
  }
  if (wanted == 0) return;
  uint32_t bins[kBins] = {};
  int64_t rank = wanted;
  count_leading(scores, n, bins);
  uint32_t prefix = pick_bin(bins, rank);
  std::vector<uint32_t> open(bins[prefix] + 1);
  pick_within(scores, n, prefix, open.data());
  open.pop_back();
  std::fill_n(bins, kBins, 0);
  for (const uint32_t key : open) ++bins[key >> 10 & 0x7ffu];
  prefix = prefix << 11 | pick_bin(bins, rank);
  std::fill_n(bins, kBins, 0);
  for (const uint32_t key : open) {
    if (key >> 10 == prefix) ++bins[key & 0x3ffu];
  }
  prefix = prefix << 10 | pick_bin(bins, rank);
  write_kept(scores, n, first, prefix, rank, wanted, out);
}

int32_t* write_range(int64_t begin, int64_t end, int32_t* out) {
  for (int64_t i = begin; i < end; ++i) *out++ = static_cast<int32_t>(i);
  return out;
}

// Fills [out, end), as far as it goes: the kept positions, then -1.
void select_row(const TopkParams& p, int64_t b, int64_t h, int32_t* out, int32_t* end) {
  TopkRow row = topk_row(p, b, h);
  row.count = std::min<int64_t>(row.count, end - out);
  const int64_t sink = std::min(row.sink_end - row.begin, row.count);
  const int64_t window = std::min(row.end - row.window_begin, row.count - sink);
  const int64_t rest = row.count - sink - window;
  out = write_range(row.begin, row.begin + sink, out);
  const float* scores = p.scores + b * p.batch_stride + h * p.head_stride;
  select(scores + row.sink_end, row.window_begin - row.sink_end, row.sink_end, rest, out);
  out = write_range(row.window_begin, row.window_begin + window, out + rest);
  std::fill(out, end, -1);
}

}  // namespace

void topk_cpu(const TopkParams& params) {
  const int64_t rows = params.batch * params.heads;
  if (params.indptr != nullptr) {
    int64_t slots = 0;
    for (int64_t row = 0; row < rows; ++row) {
      params.indptr[row] = static_cast<int32_t>(slots);
      slots += topk_row(params, row / params.heads, row % params.heads).count;
      slots = std::min(slots, params.total);
    }
    params.indptr[rows] = static_cast<int32_t>(slots);
    std::fill(params.index + slots, params.index + params.total, -1);
  }
  const int64_t grain = 1 + 4096 / std::max<int64_t>(params.seq_len, 1);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = params.indptr ? params.indptr[row] : row * params.k;
      const int64_t last = params.indptr ? params.indptr[row + 1] : first + params.k;
      select_row(params, row / params.heads, row % params.heads, params.index + first,
                 params.index + last);
    }
  });
}

}  // namespace kvc
