// The CPU twin: keys (and values) enter in blocks of kBlock, converted to float32 and transposed
// once a block, so that a register tile of kRows rows x keys runs over L2-resident panels; products
// of kRows rows live in L1 for as long as exp2 and the statistic need them. Rows above the diagonal
// of a block are skipped, blocks above the diagonal of a row too.
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "host/dispatch.h"
#include "host/exp2.h"
#include "host/outer.h"
#include "host/parallel.h"
#include "host/simd.h"
#include "score/column_sums.h"

namespace kvc {
namespace {

constexpr int64_t kBlock = 256;  // keys: 128 KB of panels at head_dim 128, half of a small L2
constexpr int64_t kRows = kOuterRows;
constexpr int64_t kTileRows = 256;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInf = std::numeric_limits<float>::infinity();
static_assert(kBlock % kOuterPanel == 0 && kTileRows % kRows == 0);

float nan_max(float a, float b) {
  return a > b || a != a ? a : b;
}

// One batch row and query head.
struct QueryHead {
  const ColumnSumsParams& p;
  int64_t b, h;
  int64_t kv_head() const { return h / p.q_per_kv(); }
  int64_t start() const {
    return p.seq_start ? std::clamp<int64_t>(p.seq_start[b], 0, p.seq_len) : 0;
  }
  // Row i sees keys [start(), end(i)).
  int64_t end(int64_t i) const {
    const int64_t position =
        p.positions ? p.positions[b * p.positions_stride + i] : p.first_query + i;
    return position < start() ? 0 : std::min(position + 1, p.seq_len);
  }
  int64_t row(int64_t i) const { return (b * p.num_q_heads + h) * p.window + i; }
  float* stats(int64_t i) const { return p.row_stats + 2 * row(i); }
};

float* aligned(std::vector<float>& v) {
  const auto address = reinterpret_cast<uintptr_t>(v.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Products of up to kTileRows left rows with up to kBlock right rows.
template <typename T>
class Products {
 public:
  explicit Products(int64_t head_dim)
      : head_dim_(head_dim),
        left_(kTileRows * head_dim + kAlign),
        panels_(kBlock * head_dim + kAlign),
        out_(kRows * kBlock + kAlign) {}

  // The rows up to the next multiple of kRows are zero.
  void load_left(const T* rows, int64_t stride, int64_t n) {
    float* to = aligned(left_);
    for (int64_t r = 0; r < n; ++r) widen(rows + r * stride, to + r * head_dim_, head_dim_);
    const int64_t padded = (n + kRows - 1) / kRows * kRows;
    std::fill(to + n * head_dim_, to + padded * head_dim_, 0.0f);
  }
  void load_right(const T* rows, int64_t stride, int64_t n) {
    pack_panels(rows, stride, n, head_dim_, aligned(panels_));
  }
  // Of kRows left rows from `row` on with the first n right rows; rows kBlock apart.
  float* of(int64_t row, int64_t n) {
    outer_products(aligned(left_) + row * head_dim_, head_dim_, aligned(panels_),
                   (n + kOuterPanel - 1) / kOuterPanel, aligned(out_), kBlock);
    return aligned(out_);
  }

 private:
  static constexpr int64_t kAlign = 16;
  int64_t head_dim_;
  std::vector<float> left_, panels_, out_;
};

template <typename T>
const T* queries_of(const QueryHead& head) {
  const ColumnSumsParams& p = head.p;
  return static_cast<const T*>(p.q) + head.b * p.q_batch_stride + head.h * p.q_head_stride;
}
template <typename T>
const T* keys_of(const QueryHead& head) {
  const ColumnSumsParams& p = head.p;
  return static_cast<const T*>(p.k) + head.b * p.k_batch_stride + head.kv_head() * p.k_head_stride;
}

constexpr int64_t padded(int64_t n) {
  return (n + kOuterPanel - 1) / kOuterPanel * kOuterPanel;
}

// Pass 1: (max, row weight / sum) of the rows [row0, row0 + n) of a query head.
template <typename T>
void row_statistics(const QueryHead& head, int64_t row0, int64_t n) {
  const ColumnSumsParams& p = head.p;
  std::vector<float> most(n, -kInf), sum(n, 0.0f);
  const int64_t last = head.end(row0 + n - 1);
  if (!p.lse && head.start() < last) {
    Products<T> products(p.head_dim);
    products.load_left(queries_of<T>(head) + row0 * p.q_row_stride, p.q_row_stride, n);
    for (int64_t block = head.start(); block < last; block += kBlock) {
      const int64_t keys = std::min(kBlock, last - block);
      products.load_right(keys_of<T>(head) + block * p.k_row_stride, p.k_row_stride, keys);
      const int64_t first = std::max<int64_t>(p.first_row_from(head.b, block) - row0, 0);
      for (int64_t row = first / kRows * kRows; row < n; row += kRows) {
        float* x = products.of(row, keys);
        for (int64_t i = row; i < std::min(row + kRows, n); ++i, x += kBlock) {
          const int64_t seen = std::min(head.end(row0 + i) - block, keys);
          if (seen <= 0) continue;
          std::fill(x + seen, x + padded(keys), -kInf);
          // rounded as exp2_of_scaled rounds it, but for one bit that fma may keep
          const float top = std::max(most[i], max_of(x, padded(keys)) * p.scale_log2);
          const float shift = top == -kInf ? 0.0f : top;
          const float before = sum[i] == 0 ? 0.0f : sum[i] * std::exp2(most[i] - shift);
          sum[i] = before + exp2_of_scaled(x, p.scale_log2, shift, padded(keys));
          most[i] = top;
        }
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    float* to = head.stats(row0 + i);
    const float weight = p.row_weights
                             ? p.row_weights[head.b * p.row_weights_batch_stride +
                                             head.h * p.row_weights_head_stride + row0 + i]
                             : 1.0f;
    if (p.lse) {
      const float lse = p.lse[head.b * p.lse_batch_stride + head.h * p.lse_head_stride + row0 + i];
      to[0] = lse * static_cast<float>(kLog2e);
      to[1] = weight;
    } else {
      to[0] = most[i] == -kInf ? 0.0f : most[i];
      to[1] = weight / sum[i];
    }
  }
}

template <typename T>
float square_of(const T* row, int64_t n) {
  float sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += to_float(row[d]) * to_float(row[d]);
  return sum;
}

// --- how a row joins the columns: `p` and the products of n entries, the row's own numbers

struct RowOfMap {
  const float* p;         // not yet weighted and normalised
  const float* products;  // <q, k>
  const float* along;
  const float* value_squares;
  float weight, scale, output_square;
};

template <typename Statistic>
__attribute__((always_inline)) inline void join_row(const RowOfMap& row, float* acc, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    MapEntry entry;
    entry.p = row.p[j] * row.weight;
    if constexpr (Statistic::kOutputAware) {
      entry.logit = row.products[j] * row.scale;
      entry.along = row.along[j];
      entry.output_square = row.output_square;
      entry.value_square = row.value_squares[j];
    }
    acc[j] = Statistic::join(acc[j], Statistic::term(entry));
  }
}

KVC_CLONES void join(SumOfRows, const RowOfMap& row, float* acc, int64_t n) {
  join_row<SumOfRows>(row, acc, n);
}
KVC_CLONES void join(SumOfSquares, const RowOfMap& row, float* acc, int64_t n) {
  join_row<SumOfSquares>(row, acc, n);
}
KVC_CLONES void join(MaxOfRows, const RowOfMap& row, float* acc, int64_t n) {
  join_row<MaxOfRows>(row, acc, n);
}
KVC_CLONES void join(KeyChange, const RowOfMap& row, float* acc, int64_t n) {
  join_row<KeyChange>(row, acc, n);
}
KVC_CLONES void join(CrossChange, const RowOfMap& row, float* acc, int64_t n) {
  join_row<CrossChange>(row, acc, n);
}
KVC_CLONES void join(JointChange, const RowOfMap& row, float* acc, int64_t n) {
  join_row<JointChange>(row, acc, n);
}

// Pass 2: the columns [block, block + n) of the query heads of a kv head, one after the other.
template <typename T, typename Statistic>
void columns(const ColumnSumsParams& p, int64_t b, int64_t kv_head, int64_t block, int64_t n) {
  const int64_t group = p.q_per_kv();
  const QueryHead any{p, b, kv_head * group};
  if (block + n <= any.start()) return;  // padding: nobody reads these sums
  Products<T> logits(p.head_dim), outputs(Statistic::kOutputAware ? p.head_dim : 0);
  logits.load_right(keys_of<T>(any) + block * p.k_row_stride, p.k_row_stride, n);
  std::vector<float> value_squares(Statistic::kOutputAware ? n : 0), map(kBlock + 16);
  if constexpr (Statistic::kOutputAware) {
    const T* values = static_cast<const T*>(p.v) + b * p.v_batch_stride +
                      kv_head * p.v_head_stride + block * p.v_row_stride;
    outputs.load_right(values, p.v_row_stride, n);
    for (int64_t j = 0; j < n; ++j) {
      value_squares[j] = square_of(values + j * p.v_row_stride, p.head_dim);
    }
  }
  const int64_t first_row = p.first_row_from(b, std::max(block, any.start()));
  for (int64_t g = 0; g < group; ++g) {
    const QueryHead head{p, b, kv_head * group + g};
    float* acc = p.sums + (b * p.num_q_heads + head.h) * p.seq_len + block;
    std::fill_n(acc, n, 0.0f);
    for (int64_t row0 = first_row; row0 < p.window; row0 += kTileRows) {
      const int64_t rows = std::min(kTileRows, p.window - row0);
      logits.load_left(queries_of<T>(head) + row0 * p.q_row_stride, p.q_row_stride, rows);
      const T* output = nullptr;
      if constexpr (Statistic::kOutputAware) {
        output = static_cast<const T*>(p.output) + b * p.output_batch_stride +
                 head.h * p.output_head_stride + row0 * p.output_row_stride;
        outputs.load_left(output, p.output_row_stride, rows);
      }
      for (int64_t row = 0; row < rows; row += kRows) {
        float* x = logits.of(row, n);
        const float* y = Statistic::kOutputAware ? outputs.of(row, n) : nullptr;
        for (int64_t i = row; i < std::min(row + kRows, rows); ++i, x += kBlock) {
          const int64_t begin = std::max<int64_t>(head.start() - block, 0);
          const int64_t end = std::min(head.end(row0 + i) - block, n);
          if (begin >= end) continue;
          const float* stats = head.stats(row0 + i);
          float* e = x;
          if constexpr (Statistic::kOutputAware) {  // the products are still wanted
            e = aligned(map);
            std::copy_n(x, padded(n), e);
          }
          exp2_of_scaled(e, p.scale_log2, stats[0], padded(n));
          RowOfMap row_of_map{.p = e + begin, .weight = stats[1]};
          if constexpr (Statistic::kOutputAware) {
            row_of_map.products = x + begin;
            row_of_map.along = y + (i - row) * kBlock + begin;
            row_of_map.value_squares = value_squares.data() + begin;
            row_of_map.scale = p.scale_log2 * kLn2;
            row_of_map.output_square = p.output_squares[head.row(row0 + i)];
          }
          join(Statistic{}, row_of_map, acc + begin, end - begin);
        }
      }
    }
  }
}

// Pass 3: one row of the output.
void write_columns(const ColumnSumsParams& p, int64_t b, int64_t h) {
  const int64_t group = p.num_q_heads / p.out_heads();
  const int64_t start = QueryHead{p, b, h * group}.start();
  const float* sums = p.sums + (b * p.num_q_heads + h * group) * p.seq_len;
  float* out = p.out + (b * p.out_heads() + h) * p.seq_len;
  std::fill(out, out + start, -kInf);
  for (int64_t j = start; j < p.seq_len; ++j) {
    float all = sums[j];
    for (int64_t g = 1; g < group; ++g) {
      const float one = sums[g * p.seq_len + j];
      all = p.group_reduce == GroupReduce::kMax ? nan_max(one, all) : all + one;
    }
    if (p.group_reduce == GroupReduce::kMean) all /= static_cast<float>(group);
    if (p.statistic == ColumnStatistic::kMean) {
      all /= static_cast<float>(std::max<int64_t>(p.window - p.first_row_from(b, j), 1));
    }
    out[j] = all;
  }
}

template <typename T>
void run(const ColumnSumsParams& p) {
  const int64_t tiles = (p.window + kTileRows - 1) / kTileRows;
  const int64_t blocks = (p.seq_len + kBlock - 1) / kBlock;
  parallel_for(0, p.batch * p.num_q_heads * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / tiles, row0 = item % tiles * kTileRows;
      const QueryHead query_head{p, head / p.num_q_heads, head % p.num_q_heads};
      const int64_t n = std::min(kTileRows, p.window - row0);
      row_statistics<T>(query_head, row0, n);
      if (!p.output) continue;
      const T* output = static_cast<const T*>(p.output) + query_head.b * p.output_batch_stride +
                        query_head.h * p.output_head_stride;
      for (int64_t i = row0; i < row0 + n; ++i) {
        p.output_squares[query_head.row(i)] =
            square_of(output + i * p.output_row_stride, p.head_dim);
      }
    }
  });
  parallel_for(0, p.batch * p.num_kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, block = item % blocks * kBlock;
      const int64_t n = std::min(kBlock, p.seq_len - block);
      visit_statistic(p.statistic, [&](auto statistic) {
        columns<T, decltype(statistic)>(p, head / p.num_kv_heads, head % p.num_kv_heads, block, n);
      });
    }
  });
  parallel_for(0, p.batch * p.out_heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      write_columns(p, row / p.out_heads(), row % p.out_heads());
    }
  });
}

}  // namespace

void column_sums_cpu(const ColumnSumsParams& params) {
  visit_float(params.dtype, "column_sums", [&](auto tag) { run<decltype(tag)>(params); });
}

}  // namespace kvc
