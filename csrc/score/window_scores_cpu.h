// What the two ways of the CPU twin share (window_scores_cpu.cpp, window_scores_kept_cpu.cpp): keys
// enter in blocks of kBlock, turned once a block, so that a register tile of kRows query rows x
// keys runs over L2-resident panels; logits are in L1 while exp2 and the reduction work on them.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "host/buffer.h"
#include "host/dispatch.h"
#include "host/outer.h"
#include "score/window_scores.h"

namespace kvc::scores_cpu {

constexpr int64_t kBlock = 256;  // keys: 128 KB of panels at head_dim 128, half of a small L2
// Query rows of a register tile, and of one call for products of E.
constexpr int64_t kRows = kOuterRows;
template <typename E>
constexpr int64_t kCallRows = std::is_same_v<E, float> ? kOuterRows : kPairRows;
constexpr float kInf = std::numeric_limits<float>::infinity();
static_assert(kBlock % kOuterPanel == 0 && kRowTile % kRows == 0);

inline float nan_max(float a, float b) {
  return a > b || a != a ? a : b;
}

// --- what the window does to one column: p is P[row, j .. j + n), acc the votes so far

void add_scaled(const float* p, float scale, float* acc, int64_t n);
void max_scaled(const float* p, float scale, float* acc, int64_t n);

// A statistic of the column: how a row joins it, and what becomes of it when all rows have.
struct Votes {
  WindowReduce reduce;
  void join(const float* p, float scale, float* acc, int64_t n) const {
    reduce == WindowReduce::kMax ? max_scaled(p, scale, acc, n) : add_scaled(p, scale, acc, n);
  }
  float factor(int64_t real_rows) const {
    return reduce == WindowReduce::kMean
               ? 1.0f / static_cast<float>(std::max<int64_t>(real_rows, 1))
               : 1.0f;
  }
};

// One batch row and kv head: what all three passes ask about it. Rows are packed, r = head in group
// * window + i.
struct Head {
  const WindowScoresParams& p;
  int64_t b, h;
  int64_t start() const {
    return p.seq_start ? std::clamp<int64_t>(p.seq_start[b], 0, p.seq_len) : 0;
  }
  int64_t num_rows() const { return p.q_per_kv() * p.window; }
  bool is_real(int64_t r) const { return p.first_query + r % p.window >= start(); }
  int64_t real_rows() const {
    return std::clamp<int64_t>(p.first_query + p.window - start(), 0, p.window);
  }
  // Row r sees keys [start(), end(r)).
  int64_t end(int64_t r) const {
    return is_real(r) ? std::min(p.first_query + r % p.window + 1, p.seq_len) : 0;
  }
  int64_t end_of_rows(int64_t first, int64_t last) const {
    int64_t most = 0;
    for (int64_t r = first; r < last; ++r) most = std::max(most, end(r));
    return most;
  }
  float* stats(int64_t chunk, int64_t r) const {
    const int64_t row = (b * p.num_kv_heads + h) * num_rows() + r;
    return p.row_stats + 2 * (chunk * p.num_rows() + row);
  }
};

// T: the cache's dtype. E: what products are made of, float, or bf16 pairs (see host/outer.h).
template <typename T, typename E>
struct Workspace {
  Buffer<E> queries, panels;
  Buffer<float> logits;
  const Head& head;
  int64_t head_dim;

  Workspace(const Head& head, int64_t rows)
      : queries(padded_rows(rows) * head.p.head_dim),
        panels(kBlock * head.p.head_dim),
        logits(kCallRows<E> * kBlock),
        head(head),
        head_dim(head.p.head_dim) {}

  static int64_t padded_rows(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

  // Rows [first, first + n) of the group; the rows up to the next multiple of kRows are zero.
  void load_queries(int64_t first, int64_t n) {
    const WindowScoresParams& p = head.p;
    E* to = queries.data();
    for (int64_t r = first; r < first + n; ++r, to += head_dim) {
      const int64_t q_head = head.h * p.q_per_kv() + r / p.window;
      const T* from = static_cast<const T*>(p.q) + head.b * p.q_batch_stride +
                      q_head * p.q_head_stride + (r % p.window) * p.q_row_stride;
      if constexpr (std::is_same_v<E, float>) {
        widen(from, to, head_dim);
      } else {
        std::copy_n(from, head_dim, to);
      }
    }
    std::fill(to, to + (padded_rows(n) - n) * head_dim, E{});
  }

  void load_keys(int64_t first, int64_t n) {
    const WindowScoresParams& p = head.p;
    const T* from = static_cast<const T*>(p.k) + head.b * p.k_batch_stride +
                    head.h * p.k_head_stride + first * p.k_row_stride;
    pack_panels(from, p.k_row_stride, n, head_dim, panels.data());
  }

  // <q, k> of `rows` rows from `row` of the loaded ones on, at most kCallRows, with the first n
  // keys of the block, into rows of kBlock. Rows up to the next multiple of kRows are written, too.
  void products(int64_t row, int64_t rows, int64_t n, float* to) {
    const E* left = queries.data() + row * head_dim;
    if constexpr (std::is_same_v<E, float>) {
      outer_products(left, head_dim, panels.data(), padded_panels(n), to, kBlock);
    } else {
      outer_products(left, padded_rows(rows), head_dim, panels.data(), padded_panels(n), to,
                     kBlock);
    }
  }
  float* products(int64_t row, int64_t rows, int64_t n) {
    products(row, rows, n, logits.data());
    return logits.data();
  }
  static int64_t padded_panels(int64_t n) { return (n + kOuterPanel - 1) / kOuterPanel; }
};

// [begin, end) of the keys of a block that a row sees, counted from the block.
struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
inline Span visible(const Head& head, int64_t r, int64_t block, int64_t n) {
  return {std::clamp<int64_t>(head.start() - block, 0, n),
          std::clamp<int64_t>(head.end(r) - block, 0, n)};
}

// Logits that a row does not see, up to the end of the last panel of n keys.
inline void mask(float* x, const Span& span, int64_t n) {
  std::fill(x, x + span.begin, -kInf);
  std::fill(x + span.end, x + (n + kOuterPanel - 1) / kOuterPanel * kOuterPanel, -kInf);
}

// What becomes of the votes of the query heads [first, first + heads) of a group for the keys
// [block, block + n), acc [heads, kBlock]: weighted, and reduced over these heads unless each
// stands for itself. A part of a group goes to `part` [seq_len], whole ones to p.votes.
void write_votes(const Head& head, int64_t first, int64_t heads, int64_t block, int64_t n,
                 float* acc, float* part);

// Both passes from one of products, for tiles of `heads` query heads (window_scores_kept_cpu.cpp).
// kept_heads: how many; 0 where not even one head's exponentials can be kept.
int64_t kept_heads(const WindowScoresParams& params);
void kept_passes(const WindowScoresParams& params, int64_t heads);

// Calls f(T{}, E{}) with the cache's dtype and what its products are made of.
template <typename F>
void visit_products(const WindowScoresParams& params, F&& f) {
  visit_float(params.dtype, "window_scores", [&](auto tag) {
    if constexpr (std::is_same_v<decltype(tag), bf16>) {
      if (has_pair_products(params.q_per_kv() * params.window, params.head_dim)) return f(tag, tag);
    }
    f(tag, float{});
  });
}

}  // namespace kvc::scores_cpu
