// The CPU twin: keys enter in blocks of kBlock, converted to float32 and transposed once per block,
// so that a register tile of kRows query rows x keys runs over L2-resident panels; logits of kRows
// rows live in L1 for as long as exp2 and the reduction need them.
#include "score/window_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "host/dispatch.h"
#include "host/exp2.h"
#include "host/outer.h"
#include "host/parallel.h"
#include "host/simd.h"

namespace kvc {
namespace {

constexpr int64_t kBlock = 256;  // keys: 128 KB of panels at head_dim 128, half of a small L2
constexpr int64_t kRows = kOuterRows;
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

template <typename T>
struct Workspace {
  std::vector<float> queries, panels, logits;
  const Head& head;
  int64_t head_dim;

  explicit Workspace(const Head& head)
      : queries(kRowTile * head.p.head_dim + kAlign),
        panels(kBlock * head.p.head_dim + kAlign),
        logits(kRows * kBlock + kAlign),
        head(head),
        head_dim(head.p.head_dim) {}

  static constexpr int64_t kAlign = 16;
  static float* aligned(std::vector<float>& v) {
    const auto address = reinterpret_cast<uintptr_t>(v.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

  // Rows [first, first + n) of the group as float32; the rows up to the next multiple of kRows are
  // zero.
  void load_queries(int64_t first, int64_t n) {
    const WindowScoresParams& p = head.p;
    float* to = aligned(queries);
    for (int64_t r = first; r < first + n; ++r, to += head_dim) {
      const int64_t q_head = head.h * p.q_per_kv() + r / p.window;
      const T* from = static_cast<const T*>(p.q) + head.b * p.q_batch_stride +
                      q_head * p.q_head_stride + (r % p.window) * p.q_row_stride;
      widen(from, to, head_dim);
    }
    const int64_t padded = (n + kRows - 1) / kRows * kRows;
    std::fill(to, to + (padded - n) * head_dim, 0.0f);
  }

  void load_keys(int64_t first, int64_t n) {
    const WindowScoresParams& p = head.p;
    const T* from = static_cast<const T*>(p.k) + head.b * p.k_batch_stride +
                    head.h * p.k_head_stride + first * p.k_row_stride;
    pack_panels(from, p.k_row_stride, n, head_dim, aligned(panels));
  }

  // <q, k> of kRows rows from `row` of the loaded tile on, with the first n keys of the block.
  float* products(int64_t row, int64_t n) {
    float* to = aligned(logits);
    outer_products(aligned(queries) + row * head_dim, head_dim, aligned(panels),
                   (n + kOuterPanel - 1) / kOuterPanel, to, kBlock);
    return to;
  }
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

// Pass 1: (max, sum of exp2(x - max)) of the rows of a tile over the keys [first, last).
template <typename T>
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
  Workspace<T> work(head);
  work.load_queries(row0, num_rows);
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t n = std::min(kBlock, last - block);
    work.load_keys(block, n);
    for (int64_t row = 0; row < num_rows; row += kRows) {
      const int64_t rows = std::min(kRows, num_rows - row);
      if (head.end_of_rows(row0 + row, row0 + row + rows) <= block) continue;
      float* x = work.products(row, n);
      for (int64_t i = 0; i < rows; ++i, x += kBlock) {
        const Span span = visible(head, row0 + row + i, block, n);
        if (span.empty()) continue;
        const int64_t padded = (n + kOuterPanel - 1) / kOuterPanel * kOuterPanel;
        std::fill(x, x + span.begin, -kInf);
        std::fill(x + span.end, x + padded, -kInf);
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

// Pass 2: the votes of the keys [block, block + n), all rows.
template <typename T>
void column_votes(const Head& head, int64_t block, int64_t n) {
  const WindowScoresParams& p = head.p;
  const int64_t group = p.q_per_kv();
  const Votes votes{p.window_reduce};
  Workspace<T> work(head);
  work.load_keys(block, n);
  std::vector<float> acc(group * kBlock, 0.0f);
  for (int64_t row0 = 0; row0 < head.num_rows(); row0 += kRowTile) {
    const int64_t num_rows = std::min(kRowTile, head.num_rows() - row0);
    if (head.end_of_rows(row0, row0 + num_rows) <= block) continue;
    work.load_queries(row0, num_rows);
    for (int64_t row = 0; row < num_rows; row += kRows) {
      const int64_t rows = std::min(kRows, num_rows - row);
      if (head.end_of_rows(row0 + row, row0 + row + rows) <= block) continue;
      float* x = work.products(row, n);
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
  const float factor = votes.factor(head.real_rows());
  const float* weights = p.weights ? p.weights + head.b * p.weights_batch_stride +
                                         head.h * p.weights_head_stride + block
                                   : nullptr;
  for (int64_t g = 0; g < group; ++g) {
    float* vote = acc.data() + g * kBlock;
    if (factor != 1.0f) {
      for (int64_t j = 0; j < n; ++j) vote[j] *= factor;
    }
    if (weights) multiply(weights, vote, n);
  }
  if (p.votes_per_q_head()) {
    for (int64_t g = 0; g < group; ++g) {
      float* to = p.votes + (head.b * p.num_q_heads + head.h * group + g) * p.seq_len + block;
      std::copy_n(acc.data() + g * kBlock, n, to);
    }
    return;
  }
  float* to = p.votes + (head.b * p.num_kv_heads + head.h) * p.seq_len + block;
  for (int64_t j = 0; j < n; ++j) {
    float all = acc[j];
    for (int64_t g = 1; g < group; ++g) {
      const float one = acc[g * kBlock + j];
      all = p.group_reduce == GroupReduce::kMax ? nan_max(one, all) : all + one;
    }
    to[j] = p.group_reduce == GroupReduce::kMean ? all / static_cast<float>(group) : all;
  }
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

template <typename T>
void run(const WindowScoresParams& p) {
  const int64_t heads = p.batch * p.num_kv_heads;
  const int64_t num_rows = p.q_per_kv() * p.window;
  const int64_t row_tiles = (num_rows + kRowTile - 1) / kRowTile;
  const int64_t blocks = (p.num_scored + kBlock - 1) / kBlock;
  // Chunks are whole blocks, and few enough: 64 items keep any pool busy.
  const int64_t wanted = std::min(p.max_chunks, std::max<int64_t>(64 / (heads * row_tiles), 1));
  const int64_t per_chunk = (p.seq_len + wanted * kBlock - 1) / (wanted * kBlock) * kBlock;
  const int64_t chunks = (p.seq_len + per_chunk - 1) / per_chunk;
  if (p.num_scored > 0) {
    if (!p.lse) {
      parallel_for(0, heads * row_tiles * chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t chunk = item % chunks, tile = item / chunks % row_tiles;
          const int64_t head = item / (chunks * row_tiles);
          row_statistics<T>({p, head / p.num_kv_heads, head % p.num_kv_heads}, tile, chunk,
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
        column_votes<T>({p, head / p.num_kv_heads, head % p.num_kv_heads}, block,
                        std::min(kBlock, p.num_scored - block));
      }
    });
  }
  parallel_for(0, p.batch * p.out_heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      write_scores(p, row / p.out_heads(), row % p.out_heads());
    }
  });
}

}  // namespace

void window_scores_cpu(const WindowScoresParams& params) {
  visit_float(params.dtype, "window_scores", [&](auto tag) { run<decltype(tag)>(params); });
}

}  // namespace kvc
