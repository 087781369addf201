// topk, compact_ and gather: nothing is computed, so everything is equal.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "check.h"
#include "select/topk.h"
#include "store/compact.h"
#include "store/gather.h"

namespace kvc::test {
namespace {

std::vector<int32_t> topk_of(const std::vector<float>& scores, int64_t rows, int64_t length,
                             int64_t k, int64_t window) {
  std::vector<int32_t> index(rows * k, -7);
  topk_cpu(TopkParams{
      .scores = scores.data(),
      .index = index.data(),
      .batch = 1,
      .heads = rows,
      .seq_len = length,
      .k = k,
      .window = window,
      .batch_stride = rows * length,
      .head_stride = length,
  });
  return index;
}

void topk_like_a_sort(int64_t rows, int64_t length, int64_t k, int64_t window, int values) {
  Random random(length + k);
  std::vector<float> scores;
  for (int64_t i = 0; i < rows * length; ++i) {
    const float x = random.uniform();  // few values: many ties
    scores.push_back(values > 0 ? std::floor(x * static_cast<float>(values)) : x);
  }
  scores[3] = NAN;
  scores[length / 2] = INFINITY;
  std::vector<int32_t> want;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = scores.data() + r * length;
    const auto rank = [&](int32_t i) { return std::isnan(row[i]) ? -INFINITY : row[i]; };
    std::vector<int32_t> order(length);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const bool a_forced = a >= length - window, b_forced = b >= length - window;
      if (a_forced != b_forced) return a_forced;
      if (std::isnan(row[a]) != std::isnan(row[b])) return std::isnan(row[b]) != 0;
      return !a_forced && rank(a) > rank(b);
    });
    order.resize(k);
    std::sort(order.begin(), order.end());
    want.insert(want.end(), order.begin(), order.end());
  }
  expect_equal("topk S " + std::to_string(length) + " k " + std::to_string(k),
               topk_of(scores, rows, length, k, window), want);
}

void rows_move(int64_t heads, int64_t length, int64_t k, int64_t bytes) {
  Random random(length * bytes);
  std::vector<int32_t> index, before;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t begin = i * length / k, end = (i + 1) * length / k;
      index.push_back(
          static_cast<int32_t>(begin + static_cast<int64_t>(random.bits() % (end - begin))));
    }
  }
  std::vector<char> buffer(heads * length * bytes), out(heads * (k + 2) * bytes, 1);
  for (char& one : buffer) one = static_cast<char>(random.bits());
  const std::vector<char> source = buffer;
  const Rows rows{buffer.data(), heads * length * bytes, length * bytes, bytes, bytes, heads};
  const Rows outs{out.data(), heads * (k + 2) * bytes, (k + 2) * bytes, bytes, bytes, heads};

  GatherParams g{};
  g.sources[0] = rows;
  g.outs[0] = outs;
  g.index = index.data();
  g.index_batch_stride = heads * k;
  g.index_head_stride = k;
  g.batch = 1;
  g.heads = heads;
  g.seq_len = length;
  g.k = k;
  g.capacity = k + 2;
  g.num_tensors = 1;
  gather_cpu(g);
  CompactParams c{};
  c.tensors[0] = rows;
  c.index = index.data();
  c.index_batch_stride = heads * k;
  c.index_head_stride = k;
  c.batch = 1;
  c.heads = heads;
  c.seq_len = length;
  c.k = k;
  c.num_tensors = 1;
  compact_cpu(c);

  std::vector<int32_t> compacted, gathered, wanted, wanted_with_room;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < length * bytes; ++i) {
      const int64_t row = i / bytes;
      const int64_t from = row < k ? index[h * k + row] : row;
      compacted.push_back(buffer[h * length * bytes + i]);
      wanted.push_back(source[(h * length + from) * bytes + i % bytes]);
    }
    for (int64_t i = 0; i < (k + 2) * bytes; ++i) {
      gathered.push_back(out[h * (k + 2) * bytes + i]);
      wanted_with_room.push_back(
          i / bytes < k ? source[(h * length + index[h * k + i / bytes]) * bytes + i % bytes] : 0);
    }
  }
  const std::string shape = " S " + std::to_string(length) + ", rows of " + std::to_string(bytes);
  expect_equal("compact_" + shape, compacted, wanted);
  expect_equal("gather" + shape, gathered, wanted_with_room);
}

const Checks checks([] {
  for (const int values : {0, 1, 3}) {
    topk_like_a_sort(3, 1000, 77, 0, values);
    topk_like_a_sort(2, 4099, 1024, 16, values);
    topk_like_a_sort(1, 65, 64, 5, values);
  }
  for (const int64_t bytes : {1, 6, 16, 130, 256}) {
    rows_move(3, 101, 40, bytes);
    rows_move(1, 1024, 1000, bytes);
  }
});

}  // namespace
}  // namespace kvc::test
