// The CPU twin: keys enter in blocks of kBlock, turned once per block, so that a register tile of
// kRows query rows x keys runs over L2-resident panels; logits of kRows rows are in L1 while exp2
// and the reduction work on them.
//
// One product pass instead of two where its exponentials can be kept: a tile of query heads keeps
// exp2(x - s), s the largest logit so far rounded up to a whole number, block by block; when all
// keys are through, the columns are added up with the weights 2^(s - last s) / sum. The shifts
// being whole numbers, equal logits keep equal bits whichever block they lie in. Tiles of more than
// kMapBytes (long prompts, wide windows) are computed twice instead: bound by products either way.
#include "score/window_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "host/buffer.h"
#include "host/dispatch.h"
#include "host/exp2.h"
#include "host/outer.h"
#include "host/parallel.h"
#include "host/simd.h"

namespace kvc {
namespace {

constexpr int64_t kBlock = 256;  // keys: 128 KB of panels at head_dim 128, half of a small L2
// Query rows of a register tile, and of one call for products of E.
constexpr int64_t kRows = kOuterRows;
template <typename E>
constexpr int64_t kCallRows = std::is_same_v<E, float> ? kOuterRows : kPairRows;
constexpr int64_t kMapBytes =
    32 << 20;  // of kept exponentials a worker: still faster than twice the products
constexpr int64_t kMapItems =
    16;                           // tiles wanted, while they have kMapRows rows: turning keys costs
constexpr int64_t kMapRows = 64;  // as much as 10 rows of products
constexpr float kInf = std::numeric_limits<float>::infinity();
static_assert(kBlock % kOuterPanel == 0 && kRowTile % kRows == 0);

float nan_max(float a, float b) {
  return a > b || a != a ? a : b;
}

// --- what the window does to one column: p is P[row, j .. j + n), acc the votes so far

KVC_CLONES void add_scaled(const float* p, float scale, float* acc, int64_t n) {
  for (int64_t j = 0; j < n; ++j) acc[j] += p[j] * scale;
}
KVC_CLONES void max_scaled(const float* p, float scale, float* acc, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float x = p[j] * scale;
    acc[j] = x > acc[j] || x != x ? x : acc[j];
  }
}
KVC_CLONES void multiply(const float* factors, float* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] *= factors[j];
}

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
Span visible(const Head& head, int64_t r, int64_t block, int64_t n) {
  return {std::clamp<int64_t>(head.start() - block, 0, n),
          std::clamp<int64_t>(head.end(r) - block, 0, n)};
}

// Logits that a row does not see, up to the end of the last panel of n keys.
void mask(float* x, const Span& span, int64_t n) {
  std::fill(x, x + span.begin, -kInf);
  std::fill(x + span.end, x + (n + kOuterPanel - 1) / kOuterPanel * kOuterPanel, -kInf);
}

// Pass 1: (max, sum of exp2(x - max)) of the rows of a tile over the keys [first, last).
template <typename T, typename E>
void row_statistics(const Head& head, int64_t tile, int64_t chunk, int64_t first, int64_t last) {
  const WindowScoresParams& p = head.p;
  const int64_t row0 = tile * kRowTile;
  const int64_t num_rows = std::min(kRowTile, head.num_rows() - row0);
  for (int64_t r = row0; r < row0 + num_rows; ++r) {
    head.stats(chunk, r)[0] = -kInf;
    head.stats(chunk, r)[1] = 0;
  }
  first = std::max(first, head.start());
  last = std::min(last, head.end_of_rows(row0, row0 + num_rows));
  if (first >= last) return;
  Workspace<T, E> work(head, num_rows);
  work.load_queries(row0, num_rows);
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t n = std::min(kBlock, last - block);
    work.load_keys(block, n);
    for (int64_t row = 0; row < num_rows; row += kCallRows<E>) {
      const int64_t rows = std::min(kCallRows<E>, num_rows - row);
      if (head.end_of_rows(row0 + row, row0 + row + rows) <= block) continue;
      float* x = work.products(row, rows, n);
      for (int64_t i = 0; i < rows; ++i, x += kBlock) {
        const Span span = visible(head, row0 + row + i, block, n);
        if (span.empty()) continue;
        const int64_t padded = (n + kOuterPanel - 1) / kOuterPanel * kOuterPanel;
        mask(x, span, n);
        float* stats = head.stats(chunk, row0 + row + i);
        // rounded as exp2_of_scaled rounds it, but for one bit that fma may keep
        const float most = std::max(stats[0], max_of(x, padded) * p.scale_log2);
        const float shift = most == -kInf ? 0.0f : most;
        const float before = stats[1] == 0 ? 0.0f : stats[1] * std::exp2(stats[0] - shift);
        stats[1] = before + exp2_of_scaled(x, p.scale_log2, shift, padded);
        stats[0] = most;
      }
    }
  }
}

// Merges the chunks of a row in ascending order into (max, 1 / sum), or makes the pair from a given
// log-sum-exp.
void finish_row(const Head& head, int64_t r, int64_t num_chunks) {
  const WindowScoresParams& p = head.p;
  float* to = head.stats(0, r);
  if (p.lse) {
    const int64_t q_head = head.h * p.q_per_kv() + r / p.window;
    to[0] = p.lse[head.b * p.lse_batch_stride + q_head * p.lse_head_stride + r % p.window] *
            static_cast<float>(kLog2e);
    to[1] = 1;
    return;
  }
  float most = -kInf, sum = 0;
  for (int64_t c = 0; c < num_chunks; ++c) most = std::max(most, head.stats(c, r)[0]);
  if (most == -kInf) most = 0;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const float* part = head.stats(c, r);
    if (part[1] != 0) sum += part[1] * (part[0] == -kInf ? 1.0f : std::exp2(part[0] - most));
  }
  to[0] = most;
  to[1] = 1 / sum;
}

// What becomes of the votes of the query heads [first, first + heads) of a group for the keys
// [block, block + n), acc [heads, kBlock]: weighted, and reduced over these heads unless each
// stands for itself. A part of a group goes to `part` [seq_len], whole ones to p.votes.
void write_votes(const Head& head, int64_t first, int64_t heads, int64_t block, int64_t n,
                 float* acc, float* part) {
  const WindowScoresParams& p = head.p;
  const float factor = Votes{p.window_reduce}.factor(head.real_rows());
  const float* weights = p.weights ? p.weights + head.b * p.weights_batch_stride +
                                         head.h * p.weights_head_stride + block
                                   : nullptr;
  for (int64_t g = 0; g < heads; ++g) {
    float* vote = acc + g * kBlock;
    if (factor != 1.0f) {
      for (int64_t j = 0; j < n; ++j) vote[j] *= factor;
    }
    if (weights) multiply(weights, vote, n);
  }
  if (p.votes_per_q_head()) {
    for (int64_t g = 0; g < heads; ++g) {
      const int64_t q_head = head.b * p.num_q_heads + head.h * p.q_per_kv() + first + g;
      std::copy_n(acc + g * kBlock, n, p.votes + q_head * p.seq_len + block);
    }
    return;
  }
  const bool is_max = p.group_reduce == GroupReduce::kMax;
  for (int64_t g = 1; g < heads; ++g) {
    for (int64_t j = 0; j < n; ++j) {
      const float one = acc[g * kBlock + j];
      acc[j] = is_max ? nan_max(one, acc[j]) : acc[j] + one;
    }
  }
  float* to = part ? part : p.votes + (head.b * p.num_kv_heads + head.h) * p.seq_len;
  const bool mean = !part && p.group_reduce == GroupReduce::kMean;
  for (int64_t j = 0; j < n; ++j) {
    to[block + j] = mean ? acc[j] / static_cast<float>(heads) : acc[j];
  }
}

// Pass 2: the votes of the keys [block, block + n), all rows.
template <typename T, typename E>
void column_votes(const Head& head, int64_t block, int64_t n) {
  const WindowScoresParams& p = head.p;
  const Votes votes{p.window_reduce};
  Workspace<T, E> work(head, std::min(kRowTile, head.num_rows()));
  work.load_keys(block, n);
  std::vector<float> acc(p.q_per_kv() * kBlock, 0.0f);
  for (int64_t row0 = 0; row0 < head.num_rows(); row0 += kRowTile) {
    const int64_t num_rows = std::min(kRowTile, head.num_rows() - row0);
    if (head.end_of_rows(row0, row0 + num_rows) <= block) continue;
    work.load_queries(row0, num_rows);
    for (int64_t row = 0; row < num_rows; row += kCallRows<E>) {
      const int64_t rows = std::min(kCallRows<E>, num_rows - row);
      if (head.end_of_rows(row0 + row, row0 + row + rows) <= block) continue;
      float* x = work.products(row, rows, n);
      for (int64_t i = 0; i < rows; ++i, x += kBlock) {
        const int64_t r = row0 + row + i;
        const Span span = visible(head, r, block, n);
        if (span.empty()) continue;
        const float* stats = head.stats(0, r);
        exp2_of_scaled(x, p.scale_log2, stats[0],
                       (n + kOuterPanel - 1) / kOuterPanel * kOuterPanel);
        votes.join(x + span.begin, stats[1], acc.data() + r / p.window * kBlock + span.begin,
                   span.end - span.begin);
      }
    }
  }
  write_votes(head, 0, p.q_per_kv(), block, n, acc.data(), nullptr);
}

// Both passes over the query heads [first_head, first_head + heads) of a group, from one pass of
// products: their exponentials are kept, [block][row][kBlock].
template <typename T, typename E>
void kept_votes(const Head& head, int64_t first_head, int64_t heads, float* part) {
  const WindowScoresParams& p = head.p;
  const int64_t row0 = first_head * p.window, num_rows = heads * p.window;
  const int64_t begin = head.start();
  const int64_t end = std::max(head.end_of_rows(row0, row0 + num_rows), p.num_scored);
  if (begin >= end) return;
  const int64_t blocks = (end - begin + kBlock - 1) / kBlock;
  const int64_t map_rows = Workspace<T, E>::padded_rows(num_rows);
  const Buffer<float> map(blocks * map_rows * kBlock);
  std::vector<float> shifts(blocks * num_rows, -kInf), most(num_rows, -kInf), sum(num_rows, 0.0f);
  Workspace<T, E> work(head, num_rows);
  work.load_queries(row0, num_rows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t block = begin + b * kBlock, n = std::min(kBlock, end - block);
    work.load_keys(block, n);
    for (int64_t row = 0; row < num_rows; row += kCallRows<E>) {
      const int64_t rows = std::min(kCallRows<E>, num_rows - row);
      if (head.end_of_rows(row0 + row, row0 + row + rows) <= block) continue;
      float* x = map.data() + (b * map_rows + row) * kBlock;
      work.products(row, rows, n, x);
      for (int64_t r = row; r < row + rows; ++r, x += kBlock) {
        const Span span = visible(head, row0 + r, block, n);
        if (span.empty()) continue;
        if (span.begin > 0 || span.end < kBlock) mask(x, span, n);
        const int64_t padded = Workspace<T, E>::padded_panels(n) * kOuterPanel;
        const float largest = std::max(most[r], std::ceil(max_of(x, padded) * p.scale_log2));
        const float shift = largest == -kInf ? 0.0f : largest;
        if (sum[r] != 0) sum[r] *= std::exp2(most[r] - shift);
        sum[r] += exp2_below(x, p.scale_log2, shift, padded);
        most[r] = largest;
        shifts[b * num_rows + r] = shift;
      }
    }
  }
  const Votes votes{p.window_reduce};
  std::vector<float> acc(heads * kBlock);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t block = begin + b * kBlock, n = std::min(kBlock, p.num_scored - block);
    if (n <= 0) break;
    std::fill(acc.begin(), acc.end(), 0.0f);
    for (int64_t r = 0; r < num_rows; ++r) {
      const Span span = visible(head, row0 + r, block, n);
      if (span.empty()) continue;
      const float last = most[r] == -kInf ? 0.0f : most[r];
      const float weight = std::exp2(shifts[b * num_rows + r] - last) / sum[r];
      votes.join(map.data() + (b * map_rows + r) * kBlock + span.begin, weight,
                 acc.data() + r / p.window * kBlock + span.begin, span.end - span.begin);
    }
    write_votes(head, first_head, heads, block, n, acc.data(), part);
  }
}

// Query heads of a tile of kept_votes; 0 where not even one fits.
int64_t kept_heads(const WindowScoresParams& p) {
  const int64_t padded = (p.seq_len / kBlock + 2) * kBlock;
  const int64_t fit = kMapBytes / (p.window * padded * static_cast<int64_t>(sizeof(float)));
  int64_t heads = std::min(fit, p.q_per_kv());
  const auto tiles = [&] { return (p.q_per_kv() + heads - 1) / heads; };
  while (heads > 1 && p.batch * p.num_kv_heads * tiles() < kMapItems &&
         (heads + 1) / 2 * p.window >= kMapRows) {
    heads = (heads + 1) / 2;
  }
  return heads;
}

template <typename T, typename E>
void kept_passes(const WindowScoresParams& p, int64_t heads) {
  const int64_t group = p.q_per_kv(), tiles = (group + heads - 1) / heads;
  const int64_t stores = p.batch * p.num_kv_heads;
  const bool in_parts = tiles > 1 && !p.votes_per_q_head();
  const Buffer<float> parts(in_parts ? stores * tiles * p.seq_len : 0);
  parallel_for(0, stores * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t store = item / tiles, first = item % tiles * heads;
      kept_votes<T, E>({p, store / p.num_kv_heads, store % p.num_kv_heads}, first,
                       std::min(heads, group - first),
                       in_parts ? parts.data() + item * p.seq_len : nullptr);
    }
  });
  if (!in_parts) return;
  parallel_for(0, stores, 1, [&](int64_t begin, int64_t end) {
    for (int64_t store = begin; store < end; ++store) {
      const int64_t start = Head{p, store / p.num_kv_heads, 0}.start();
      const float* part = parts.data() + store * tiles * p.seq_len;
      for (int64_t j = start; j < p.num_scored; ++j) {
        float all = part[j];
        for (int64_t tile = 1; tile < tiles; ++tile) {
          const float one = part[tile * p.seq_len + j];
          all = p.group_reduce == GroupReduce::kMax ? nan_max(one, all) : all + one;
        }
        p.votes[store * p.seq_len + j] =
            p.group_reduce == GroupReduce::kMean ? all / static_cast<float>(group) : all;
      }
    }
  });
}

// The pool around column j over the scored real columns [begin, end) of one row of votes.
float pooled(const WindowScoresParams& p, const float* votes, int64_t j, int64_t begin,
             int64_t end) {
  if (p.pool == Pool::kNone) return votes[j];
  const int64_t half = p.kernel_size / 2;
  const int64_t first = std::max(j - half, begin), last = std::min(j + half + 1, end);
  float all = p.pool == Pool::kMax ? -kInf : 0.0f;
  for (int64_t i = first; i < last; ++i) {
    all = p.pool == Pool::kMax ? nan_max(votes[i], all) : all + votes[i];
  }
  return p.pool == Pool::kAvg ? all / static_cast<float>(p.kernel_size) : all;
}

// Pass 3: one row of the output.
void write_scores(const WindowScoresParams& p, int64_t b, int64_t h) {
  const int64_t start = Head{p, b, 0}.start();
  const int64_t scored = std::max(p.num_scored, start);
  const int64_t group = p.vote_heads() / p.out_heads();  // 1 unless the pool came first
  const float* votes = p.votes + (b * p.vote_heads() + h * group) * p.seq_len;
  float* out = p.out + (b * p.out_heads() + h) * p.seq_len;
  std::fill(out, out + start, -kInf);
  for (int64_t j = start; j < scored; ++j) {
    float all = pooled(p, votes, j, start, scored);
    for (int64_t g = 1; g < group; ++g) {
      const float one = pooled(p, votes + g * p.seq_len, j, start, scored);
      all = p.group_reduce == GroupReduce::kMax ? nan_max(one, all) : all + one;
    }
    const bool mean = group > 1 && p.group_reduce == GroupReduce::kMean;
    out[j] = mean ? all / static_cast<float>(group) : all;
  }
  std::fill(out + scored, out + p.seq_len, kInf);
}

template <typename T, typename E>
void two_passes(const WindowScoresParams& p) {
  const int64_t heads = p.batch * p.num_kv_heads;
  const int64_t num_rows = p.q_per_kv() * p.window;
  const int64_t row_tiles = (num_rows + kRowTile - 1) / kRowTile;
  const int64_t blocks = (p.num_scored + kBlock - 1) / kBlock;
  // Chunks are whole blocks, and few enough: 64 items keep any pool busy.
  const int64_t wanted = std::min(p.max_chunks, std::max<int64_t>(64 / (heads * row_tiles), 1));
  const int64_t per_chunk = (p.seq_len + wanted * kBlock - 1) / (wanted * kBlock) * kBlock;
  const int64_t chunks = (p.seq_len + per_chunk - 1) / per_chunk;
  if (!p.lse) {
    parallel_for(0, heads * row_tiles * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item % chunks, tile = item / chunks % row_tiles;
        const int64_t head = item / (chunks * row_tiles);
        row_statistics<T, E>({p, head / p.num_kv_heads, head % p.num_kv_heads}, tile, chunk,
                             chunk * per_chunk, std::min((chunk + 1) * per_chunk, p.seq_len));
      }
    });
  }
  parallel_for(0, heads * num_rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t head = row / num_rows;
      finish_row({p, head / p.num_kv_heads, head % p.num_kv_heads}, row % num_rows, chunks);
    }
  });
  parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, block = item % blocks * kBlock;
      column_votes<T, E>({p, head / p.num_kv_heads, head % p.num_kv_heads}, block,
                         std::min(kBlock, p.num_scored - block));
    }
  });
}

template <typename T, typename E>
void run(const WindowScoresParams& p) {
  if (p.num_scored > 0) {
    const int64_t heads = p.lse ? 0 : kept_heads(p);
    heads > 0 ? kept_passes<T, E>(p, heads) : two_passes<T, E>(p);
  }
  parallel_for(0, p.batch * p.out_heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      write_scores(p, row / p.out_heads(), row % p.out_heads());
    }
  });
}

}  // namespace

void window_scores_cpu(const WindowScoresParams& params) {
  visit_float(params.dtype, "window_scores", [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<T, bf16>) {
      if (has_pair_products(params.q_per_kv() * params.window, params.head_dim))
        return run<T, bf16>(params);
    }
    run<T, float>(params);
  });
}

}  // namespace kvc
