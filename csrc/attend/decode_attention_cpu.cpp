// The CPU twin: a worker widens a tile of keys, then of values, to float32 in L1; register tiles of
// four query rows by a few keys (logits) or a few vectors of head_dim (output) run over it. The
// bound is reading K and V once; while one half of a tile is worked on the next is prefetched.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attend/decode_attention.h"
#include "attend/decode_observe.h"
#include "host/dispatch.h"
#include "host/exp2.h"
#include "host/outer.h"
#include "host/parallel.h"
#include "host/simd.h"

namespace kvc {
namespace {

constexpr int64_t kWorkers = 128;  // parts of the line: enough for any machine, partials stay small
constexpr int64_t kRows = 4;       // query rows of a register tile
constexpr int64_t kTile = 64;      // room for the keys of a tile of any shape
constexpr int64_t kObserveKeys = 1024;  // entries that a thread observes at a time
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693147180559945309f;

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

template <int kLanes>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
};

// Folds vectors x and x + kCount / 2 on and on: afterwards lane i of x[0] is the sum of vector i.
template <int kLanes, int kWidth>
__attribute__((always_inline)) inline void fold(typename Lanes<kLanes>::Floats* x) {
  using Ints = typename Lanes<kLanes>::Ints;
  Ints low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const int block = i / (2 * kWidth) * (2 * kWidth), at = i % (2 * kWidth);
    low[i] = at < kWidth ? block + at : kLanes + block + at - kWidth;
    high[i] = at < kWidth ? block + at + kWidth : kLanes + block + at;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    x[i] =
        __builtin_shuffle(x[i], x[i + kWidth], low) + __builtin_shuffle(x[i], x[i + kWidth], high);
  }
  if constexpr (kWidth > 1) fold<kLanes, kWidth / 2>(x);
}

// out[r * kTile + j] = <q[r], k[j]> for kRows rows and `keys` keys, all `depth` apart. kLanes sums
// at a time: kRows rows by kLanes / kRows keys. Keys up to the next multiple of that are computed
// too.
template <int kLanes>
__attribute__((always_inline)) inline void dots(const float* q, const float* k, int64_t keys,
                                                int64_t depth, float* out) {
  using Floats = typename Lanes<kLanes>::Floats;
  constexpr int kKeys = kLanes / kRows;
  for (int64_t j = 0; j < keys; j += kKeys) {
    Floats sums[kLanes] = {};
    for (int64_t d = 0; d < depth; d += kLanes) {
      Floats key[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) {
        key[i] = *reinterpret_cast<const Floats*>(k + (j + i) * depth + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Floats query = *reinterpret_cast<const Floats*>(q + r * depth + d);
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; ++i) sums[r * kKeys + i] += query * key[i];
      }
    }
    fold<kLanes, kLanes / 2>(sums);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) out[r * kTile + j + i] = sums[0][r * kKeys + i];
    }
  }
}

// out[r] += sum over keys of p[r * kTile + j] v[j], for kRows rows, in ascending j; kVectors
// vectors of head_dim at a time, and what is left of it one by one.
template <int kLanes, int kVectors>
__attribute__((always_inline)) inline void add_values(const float* p, const float* v, int64_t keys,
                                                      int64_t depth, float* out, int64_t d = 0) {
  using Floats = typename Lanes<kLanes>::Floats;
  for (; d + kLanes * kVectors <= depth; d += kLanes * kVectors) {
    Floats sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        sums[r][i] = *reinterpret_cast<const Floats*>(out + r * depth + d + i * kLanes);
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      Floats value[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        value[i] = *reinterpret_cast<const Floats*>(v + j * depth + d + i * kLanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sums[r][i] += p[r * kTile + j] * value[i];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        *reinterpret_cast<Floats*>(out + r * depth + d + i * kLanes) = sums[r][i];
      }
    }
  }
  if constexpr (kVectors > 1) add_values<kLanes, 1>(p, v, keys, depth, out, d);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("arch=x86-64-v4"))) void tile_dots(const float* q, const float* k,
                                                         int64_t keys, int64_t depth, float* out) {
  dots<16>(q, k, keys, depth, out);
}
__attribute__((target("arch=x86-64-v3"))) void tile_dots(const float* q, const float* k,
                                                         int64_t keys, int64_t depth, float* out) {
  dots<8>(q, k, keys, depth, out);
}
__attribute__((target("arch=x86-64-v4"))) void tile_values(const float* p, const float* v,
                                                           int64_t keys, int64_t depth,
                                                           float* out) {
  add_values<16, 4>(p, v, keys, depth, out);
}
__attribute__((target("arch=x86-64-v3"))) void tile_values(const float* p, const float* v,
                                                           int64_t keys, int64_t depth,
                                                           float* out) {
  add_values<8, 2>(p, v, keys, depth, out);
}
__attribute__((target("default")))
#endif
void tile_dots(const float* q, const float* k, int64_t keys, int64_t depth, float* out) {
  dots<4>(q, k, keys, depth, out);
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("default")))
#endif
void tile_values(const float* p, const float* v, int64_t keys, int64_t depth, float* out) {
  add_values<4, 2>(p, v, keys, depth, out);
}

KVC_CLONES void scale_row(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
KVC_CLONES void add_scaled(const float* x, float factor, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i] * factor;
}

// 2^(old - now), where both may be -inf.
float decay(float old, float now) {
  return old == now ? 1.0f : std::exp2(old - now);
}

// One worker's buffers, and the running softmax of the rows of one slice.
template <typename T>
class Worker {
 public:
  explicit Worker(const DecodeAttentionParams& p)
      : p_(p),
        depth_(round_up(p.head_dim, 16)),  // whole vectors
        rows_(round_up(p.slice(), kRows)),
        buffer_((2 * rows_ + kTile) * depth_ + rows_ * kTile + 2 * rows_ + 16) {
    const auto address = reinterpret_cast<uintptr_t>(buffer_.data());
    queries_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
    out_ = queries_ + rows_ * depth_;
    tile_ = out_ + rows_ * depth_;
    logits_ = tile_ + kTile * depth_;
    most_ = logits_ + rows_ * kTile;
    sum_ = most_ + rows_;
  }

  // The tiles [first, last) of a store for one slice of rows, into its slot.
  void attend(int64_t store, int64_t slice, int64_t first, int64_t last, int64_t slot) {
    const int64_t row0 = slice * p_.slice();
    const int64_t rows = std::min(p_.slice(), p_.packed_rows() - row0);
    start(store, row0, rows);
    const int64_t tile = p_.shape().tile, length = p_.length(store);
    for (int64_t t = first; t < last; ++t) {
      step(store, row0, rows, t * tile, std::min(tile, length - t * tile), length);
    }
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(out_ + r * depth_, p_.head_dim,
                  p_.partial_out + (slot * p_.slice() + r) * p_.head_dim);
      float* stats = p_.partial_stats + (slot * p_.slice() + r) * 2;
      stats[0] = most_[r];
      stats[1] = sum_[r];
    }
  }

 private:
  void start(int64_t store, int64_t row0, int64_t rows) {
    const T* q = static_cast<const T*>(p_.q);
    for (int64_t r = 0; r < rows; ++r) {
      widen(q + p_.q_offset(store, row0 + r), queries_ + r * depth_, p_.head_dim);
    }
    std::fill_n(out_, rows_ * depth_, 0.0f);
    std::fill_n(most_, rows_, -kInf);
    std::fill_n(sum_, rows_, 0.0f);
  }

  // Rows of a store as float32, while the rows that come next are fetched into L2: L1 is full of
  // this tile.
  void load(const T* from, int64_t stride, const T* next, int64_t next_stride, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const char* ahead = reinterpret_cast<const char*>(next + j * next_stride);
      const int64_t bytes = p_.head_dim * static_cast<int64_t>(sizeof(T));
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      widen(from + j * stride, tile_ + j * depth_, p_.head_dim);
    }
  }

  void step(int64_t store, int64_t row0, int64_t rows, int64_t first, int64_t n, int64_t length) {
    const T* k = static_cast<const T*>(p_.k) + p_.k_offset(store) + first * p_.k_row_stride;
    const T* v = static_cast<const T*>(p_.v) + p_.v_offset(store) + first * p_.v_row_stride;
    load(k, p_.k_row_stride, v, p_.v_row_stride, n);
    for (int64_t r = 0; r < rows; r += kRows) {
      tile_dots(queries_ + r * depth_, tile_, n, depth_, logits_ + r * kTile);
    }
    for (int64_t r = 0; r < rows; ++r) {
      softmax(r, p_.visible(length, (row0 + r) % p_.num_queries) - first, n,
              p_.logits ? p_.logits + p_.out_row(store, row0 + r) * p_.width + first : nullptr);
    }
    load(v, p_.v_row_stride, k + n * p_.k_row_stride, p_.k_row_stride, n);
    for (int64_t r = 0; r < rows; r += kRows) {
      tile_values(logits_ + r * kTile, tile_, n, depth_, out_ + r * depth_);
    }
  }

  // <q, k> of one row and the n keys of a tile, of which it sees `seen`, become exp2(x - max).
  void softmax(int64_t r, int64_t seen, int64_t n, float* scaled) {
    float* x = logits_ + r * kTile;
    seen = std::clamp<int64_t>(seen, 0, n);
    std::fill(x + seen, x + kTile, -kInf);
    if (scaled) {
      for (int64_t j = 0; j < n; ++j) scaled[j] = x[j] * p_.softmax_scale;
    }
    scale_row(x, p_.scale_log2, kTile);  // rounded before the difference: the maximum becomes 1
    const float most = std::max(most_[r], max_of(x, kTile));
    if (most > most_[r]) {
      const float factor = decay(most_[r], most);
      scale_row(out_ + r * depth_, factor, depth_);
      sum_[r] *= factor;
      most_[r] = most;
    }
    sum_[r] += exp2_of_scaled(x, 1.0f, most == -kInf ? 0.0f : most, kTile);
  }

  const DecodeAttentionParams& p_;
  int64_t depth_, rows_;
  std::vector<float> buffer_;
  float *queries_, *out_, *tile_, *logits_, *most_, *sum_;
};

// Adds up the partials of one row of a store, in the order of their workers.
template <typename T>
void merge(const DecodeAttentionParams& p, const AttendParts& parts,
           const std::vector<int64_t>& tile_start, int64_t store, int64_t r, float* sums) {
  const int64_t tiles = tile_start[store + 1] - tile_start[store];
  const int64_t slice = r / p.slice(), row = store * p.slices() + slice;
  const int64_t first = tile_start[store] * p.slices() + slice * tiles;
  const int64_t begin = tiles > 0 ? parts.owner(first) : 0;
  const int64_t end = tiles > 0 ? parts.owner(first + tiles - 1) + 1 : 0;
  const auto at = [&](int64_t w) { return attend_slot(w, row) * p.slice() + r % p.slice(); };
  float most = -kInf, sum = 0;
  for (int64_t w = begin; w < end; ++w) most = std::max(most, p.partial_stats[at(w) * 2]);
  std::fill_n(sums, p.head_dim, 0.0f);
  for (int64_t w = begin; w < end; ++w) {
    const float factor = decay(p.partial_stats[at(w) * 2], most);
    sum += p.partial_stats[at(w) * 2 + 1] * factor;
    add_scaled(p.partial_out + at(w) * p.head_dim, factor, sums, p.head_dim);
  }
  const int64_t out_row = p.out_row(store, r);
  T* out = static_cast<T*>(p.out) + out_row * p.head_dim;
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
  for (int64_t d = 0; d < p.head_dim; ++d) out[d] = from_float<T>(sums[d] * inverse);
  p.lse[out_row] = (most + std::log2(sum)) * kLn2;
  if (p.fill_logits) {
    const int64_t length = p.length(store);
    std::fill(p.logits + out_row * p.width + length, p.logits + (out_row + 1) * p.width, -kInf);
  }
}

// What is observed of the entries of a store, from its logits and lse.
void observe(const DecodeAttentionParams& p, int64_t store, int64_t begin, int64_t end) {
  const int64_t length = p.length(store), rows = p.packed_rows();
  const float* logits = p.logits + store * rows * p.width;
  for (int64_t j = begin; j < std::min(end, length); ++j) {
    const auto logit = [&](int g, int i) { return logits[(g * p.num_queries + i) * p.width + j]; };
    observe_entry(p, store, length, j, logit, [&](int g, int i) {
      return std::exp(logit(g, i) - p.lse[store * rows + g * p.num_queries + i]);
    });
  }
}

template <typename T>
void run(const DecodeAttentionParams& p) {
  const int64_t tile = p.shape().tile, slices = p.slices(), rows = p.packed_rows();
  std::vector<int64_t> tile_start(p.num_stores() + 1);  // tiles of the stores before
  for (int64_t store = 0; store < p.num_stores(); ++store) {
    tile_start[store + 1] = tile_start[store] + (p.length(store) + tile - 1) / tile;
  }
  const AttendParts parts(tile_start.back() * slices, std::min(kWorkers, p.max_workers));
  parallel_for(0, parts.workers, 1, [&](int64_t begin_worker, int64_t end_worker) {
    Worker<T> worker(p);
    int64_t store = 0;
    for (int64_t w = begin_worker; w < end_worker; ++w) {
      for (int64_t at = parts.begin(w), end = parts.begin(w + 1); at < end;) {
        while (tile_start[store + 1] * slices <= at) ++store;
        const int64_t tiles = tile_start[store + 1] - tile_start[store];
        const int64_t into = at - tile_start[store] * slices, slice = into / tiles;
        const int64_t first = into % tiles, last = std::min(tiles, first + end - at);
        worker.attend(store, slice, first, last, attend_slot(w, store * slices + slice));
        at += last - first;
      }
    }
  });
  parallel_for(0, p.num_stores() * rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      merge<T>(p, parts, tile_start, i / rows, i % rows, sums.data());
    }
  });
  if (!p.observed.any()) return;
  const int64_t chunks = (p.width + kObserveKeys - 1) / kObserveKeys;
  parallel_for(0, p.num_stores() * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kObserveKeys;
      observe(p, i / chunks, first, first + kObserveKeys);
    }
  });
}

}  // namespace

void decode_attention_cpu(const DecodeAttentionParams& params) {
  DecodeAttentionParams p = params;
  if (p.observed.any()) p.logits = p.observed_scratch;
  visit_float(p.dtype, "decode_attention", [&](auto tag) { run<decltype(tag)>(p); });
}

}  // namespace kvc
