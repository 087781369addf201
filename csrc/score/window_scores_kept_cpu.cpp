// One pass of products instead of two: a tile of query heads keeps exp2(x - s), s the largest logit
// so far rounded up to a whole number, block by block; when all keys are through, the columns are
// added up with the weights 2^(s - last s) / sum. The shifts being whole numbers, equal logits keep
// equal bits whichever block they lie in. Tiles beyond kMapBytes (long prompts, wide windows) are
// left to the two passes.
#include <cmath>
#include <vector>

#include "host/exp2.h"
#include "host/parallel.h"
#include "score/window_scores_cpu.h"

namespace kvc::scores_cpu {
namespace {

// Of kept exponentials a worker: writing and reading them still beats a second pass of products.
constexpr int64_t kMapBytes = 32 << 20;
// Tiles wanted, while they have so many rows: to turn the keys once more costs as 10 rows of
// products.
constexpr int64_t kMapItems = 16, kMapRows = 64;

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

template <typename T, typename E>
void passes(const WindowScoresParams& p, int64_t heads) {
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

}  // namespace

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

void kept_passes(const WindowScoresParams& p, int64_t heads) {
  visit_products(p, [&](auto t, auto e) { passes<decltype(t), decltype(e)>(p, heads); });
}

}  // namespace kvc::scores_cpu
