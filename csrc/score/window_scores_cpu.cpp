// The CPU twin: the passes as window_scores.h has them, products computed in each. Where the
// exponentials of a tile can be kept, window_scores_kept_cpu.cpp takes the place of passes 1 and 2.
#include "score/window_scores_cpu.h"

#include <cmath>
#include <vector>

#include "host/exp2.h"
#include "host/parallel.h"
#include "host/simd.h"

namespace kvc::scores_cpu {

KVC_CLONES void add_scaled(const float* p, float scale, float* acc, int64_t n) {
  for (int64_t j = 0; j < n; ++j) acc[j] += p[j] * scale;
}
KVC_CLONES void max_scaled(const float* p, float scale, float* acc, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float x = p[j] * scale;
    acc[j] = x > acc[j] || x != x ? x : acc[j];
  }
}
namespace {

KVC_CLONES void multiply(const float* factors, float* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] *= factors[j];
}

}  // namespace

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

namespace {

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

}  // namespace

}  // namespace kvc::scores_cpu

namespace kvc {

void window_scores_cpu(const WindowScoresParams& p) {
  using namespace scores_cpu;
  if (p.num_scored > 0) {
    if (const int64_t heads = p.lse ? 0 : kept_heads(p); heads > 0) {
      kept_passes(p, heads);
    } else {
      visit_products(p, [&](auto t, auto e) { two_passes<decltype(t), decltype(e)>(p); });
    }
  }
  parallel_for(0, p.batch * p.out_heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      write_scores(p, row / p.out_heads(), row % p.out_heads());
    }
  });
}

}  // namespace kvc
