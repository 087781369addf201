// topk on the CPU: a thread a row. Forced entries are taken first. Among the rest a few hundred
// sampled keys bracket the threshold, from three standard deviations of its rank below it to three
// above; one pass counts the keys above the bracket and lists those inside, a few percent, among
// which radix passes of 8 bits find the threshold (where the bracket missed it: among all keys); a
// second pass writes the positions in order. Both passes make 64 keys at a time anew from the
// scores, all vectorised, and pack the positions of the chosen ones eight at a time by a table.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>

#include "host/buffer.h"
#include "host/parallel.h"
#include "host/simd.h"
#include "select/topk.h"

namespace kvc {
namespace {

constexpr int64_t kBlock = 64;
constexpr int kGroup = 8;  // positions packed at once, and so written beyond the last chosen one
constexpr int64_t kSample = 1024;

// kPlaces[m] holds the places of the ones in m, in order.
constexpr auto kPlaces = [] {
  std::array<std::array<uint8_t, kGroup>, 256> places{};
  for (int mask = 0; mask < 256; ++mask) {
    int n = 0;
    for (int bit = 0; bit < kGroup; ++bit) {
      if (mask >> bit & 1) places[mask][n++] = static_cast<uint8_t>(bit);
    }
  }
  return places;
}();

KVC_INLINE void keys_of(const float* scores, int64_t n, uint32_t* keys) {
  uint32_t bits[kBlock];
  std::memcpy(bits, scores, n * sizeof(float));
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) keys[j] = topk_key(bits[j]);
}

// Appends base + j for each of the 64 flags that is 1; up to kGroup slots more are written.
KVC_INLINE int32_t* pack(const uint8_t* flags, int32_t base, int32_t* out) {
  for (int64_t j = 0; j < kBlock; j += kGroup) {
    uint64_t bytes;
    std::memcpy(&bytes, flags + j, sizeof bytes);
    const uint64_t mask = bytes * 0x0102040810204080u >> 56;  // byte i's lowest bit to bit i
    for (int i = 0; i < kGroup; ++i) out[i] = base + static_cast<int32_t>(j) + kPlaces[mask][i];
    out += std::popcount(mask);
  }
  return out;
}

// Calls fn(keys, i) for every 64 keys from the i-th; those behind the last one are 0, which is no
// key.
template <typename Fn>
KVC_INLINE void for_blocks(const float* scores, int64_t n, const Fn& fn) {
  uint32_t keys[kBlock];
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    keys_of(scores + i, kBlock, keys);
    fn(keys, i);
  }
  if (i == n) return;
  std::fill_n(keys, kBlock, 0);
  keys_of(scores + i, n - i, keys);
  fn(keys, i);
}

// A part of the keys, both ends included.
struct Bracket {
  uint32_t low, high;
};
constexpr Bracket kAll{kTopkNan, ~0u};

// How many keys lie above the bracket; `out` gets the positions of those inside, `inside` of them.
KVC_CLONES int64_t list_inside(const float* scores, int64_t n, Bracket bracket, int32_t* out,
                               int64_t& inside) {
  int32_t* end = out;
  uint32_t above = 0;
  for_blocks(scores, n, [&](const uint32_t* keys, int64_t i) KVC_LAMBDA_INLINE {
    alignas(8) uint8_t flags[kBlock];
#pragma omp simd reduction(+ : above)
    for (int64_t j = 0; j < kBlock; ++j) above += keys[j] > bracket.high;
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) {
      flags[j] = keys[j] >= bracket.low && keys[j] <= bracket.high;
    }
    end = pack(flags, static_cast<int32_t>(i), end);
  });
  inside = end - out;
  return above;
}

// Where the `wanted`-th largest of n keys probably is, by a sample of them.
Bracket guess(const float* scores, int64_t n, int64_t wanted) {
  const int64_t size = std::min(kSample, n / 32);
  if (size < 32) return kAll;
  uint32_t sample[kSample];
  for (int64_t i = 0; i < size; ++i) {
    sample[i] = topk_key(std::bit_cast<uint32_t>(scores[(2 * i + 1) * n / (2 * size)]));
  }
  const double share = static_cast<double>(wanted) / static_cast<double>(n);
  const double rank = share * static_cast<double>(size);
  const double spread = 3 * std::sqrt(rank * (1 - share)) + 1;
  const auto first = static_cast<int64_t>(std::floor(rank - spread));  // from the largest
  const auto last = static_cast<int64_t>(std::ceil(rank + spread));
  Bracket bracket = kAll;
  uint32_t* begin = sample;
  if (first >= 0) {
    std::nth_element(sample, sample + first, sample + size, std::greater<>());
    bracket.high = sample[first];
    begin += first;
  }
  if (last < size) {
    std::nth_element(begin, sample + last, sample + size, std::greater<>());
    bracket.low = sample[last];
  }
  return bracket;
}

// The `rank`-th largest of n keys, all in the bracket; `rank` becomes its place among its equals.
// Two tables, so that runs of one digit do not wait for their own stores. The keys are moved about.
KVC_CLONES uint32_t find(uint32_t* keys, int64_t n, Bracket bracket, int64_t& rank) {
  constexpr int kBins = 256;
  auto [low, high] = bracket;
  while (low < high) {
    const int shift = std::max<int>(std::bit_width(high - low) - 8, 0);
    uint32_t bins[2][kBins] = {};
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      ++bins[0][(keys[i] - low) >> shift];
      ++bins[1][(keys[i + 1] - low) >> shift];
    }
    if (i < n) ++bins[0][(keys[i] - low) >> shift];
    uint32_t bin = (high - low) >> shift;
    for (; bin > 0 && bins[0][bin] + bins[1][bin] < rank; --bin)
      rank -= bins[0][bin] + bins[1][bin];
    low += bin << shift;
    high = std::min(high - low, (1u << shift) - 1) + low;
    int64_t kept = 0;
    for (i = 0; i < n; ++i) {
      const uint32_t key = keys[i];
      keys[kept] = key;
      kept += key - low <= high - low;
    }
    n = kept;
  }
  return low;
}

// Appends the positions, counted from `first`, of the keys above `threshold` and of the first
// `ties` equal to it; up to kGroup slots more are written.
KVC_CLONES void list_kept(const float* scores, int64_t n, int64_t first, uint32_t threshold,
                          int64_t ties, int32_t* out) {
  for_blocks(scores, n, [&](const uint32_t* keys, int64_t i) KVC_LAMBDA_INLINE {
    alignas(8) uint8_t flags[kBlock];
    uint32_t equal = 0;
#pragma omp simd reduction(+ : equal)
    for (int64_t j = 0; j < kBlock; ++j) equal += keys[j] == threshold;
    if (equal <= ties) {  // all ties of the block, or none are there
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) flags[j] = keys[j] >= threshold;
      ties -= equal;
    } else {
      for (int64_t j = 0; j < kBlock; ++j) {
        const bool tie = keys[j] == threshold && ties > 0;
        flags[j] = keys[j] > threshold || tie;
        ties -= tie;
      }
    }
    out = pack(flags, static_cast<int32_t>(first + i), out);
  });
}

// What a worker needs for a row.
struct Scratch {
  explicit Scratch(int64_t n) : places(n + kGroup), keys(n) {}
  Buffer<int32_t> places;
  Buffer<uint32_t> keys;
};

// The `wanted` largest of n scores, ascending by position.
void select(const float* scores, int64_t n, int64_t first, int64_t wanted, const Scratch& scratch,
            int32_t* out) {
  if (wanted == n) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(first + i);
    return;
  }
  if (wanted == 0) return;
  int32_t* places = scratch.places.data();
  uint32_t* keys = scratch.keys.data();
  Bracket bracket = guess(scores, n, wanted);
  int64_t inside = 0;
  int64_t above = list_inside(scores, n, bracket, places, inside);
  if (above >= wanted || above + inside < wanted) {
    bracket = kAll;
    above = list_inside(scores, n, bracket, places, inside);
  }
  for (int64_t i = 0; i < inside; ++i) {
    keys[i] = topk_key(std::bit_cast<uint32_t>(scores[places[i]]));
  }
  int64_t ties = wanted - above;
  const uint32_t threshold = find(keys, inside, bracket, ties);
  list_kept(scores, n, first, threshold, ties, places);
  std::copy_n(places, wanted, out);
}

int32_t* write_range(int64_t begin, int64_t end, int32_t* out) {
  for (int64_t i = begin; i < end; ++i) *out++ = static_cast<int32_t>(i);
  return out;
}

// Fills [out, end), as far as it goes: the kept positions, then -1.
void select_row(const TopkParams& p, int64_t b, int64_t h, const Scratch& scratch, int32_t* out,
                int32_t* end) {
  TopkRow row = topk_row(p, b, h);
  row.count = std::min<int64_t>(row.count, end - out);
  const int64_t sink = std::min(row.sink_end - row.begin, row.count);
  const int64_t window = std::min(row.end - row.window_begin, row.count - sink);
  const int64_t rest = row.count - sink - window;
  out = write_range(row.begin, row.begin + sink, out);
  const float* scores = p.scores + b * p.batch_stride + h * p.head_stride;
  select(scores + row.sink_end, row.window_begin - row.sink_end, row.sink_end, rest, scratch, out);
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
    const Scratch scratch(params.seq_len);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = params.indptr ? params.indptr[row] : row * params.k;
      const int64_t last = params.indptr ? params.indptr[row + 1] : first + params.k;
      select_row(params, row / params.heads, row % params.heads, scratch, params.index + first,
                 params.index + last);
    }
  });
}

}  // namespace kvc
