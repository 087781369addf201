// Values of an index tensor that only the data shows: looked at under the debug switch alone.
#pragma once

#include <cstdint>

namespace kvc {

struct IndexOffence {
  int64_t position = -1;  // of the first wrong entry, counted over [batch, heads, length]; -1: none
  int64_t value = 0;
};

struct IndexCheckParams {
  const int32_t* data;  // [batch, heads, length], last dimension contiguous
  int64_t batch, heads, length;
  int64_t batch_stride, head_stride;  // in elements
  int64_t low, high;                  // every entry lies in [low, high)
  bool ascending;                     // each row strictly ascends, then holds -1 alone
  bool distinct;                      // no row holds an entry twice, but for -1
  bool sorted;                        // no entry is below the one before it
  const int32_t* indptr;  // [parts + 1]: where the parts of a packed index begin, each a row of its
  int64_t parts;          // own to `ascending`; null: it is not packed
  IndexOffence* scratch;  // on the device of `data`; the CPU twin uses none
  IndexOffence* found;    // on the host
};

// Whether entry i has no entry before it.
constexpr bool is_first(const IndexCheckParams& p, int64_t i) {
  for (int64_t part = 0; part < p.parts; ++part) {
    if (p.indptr[part] == i) return true;
  }
  return i == 0;
}

// Whether entry i of a row is wrong.
constexpr bool is_offence(const IndexCheckParams& p, const int32_t* row, int64_t i) {
  const int64_t value = row[i];
  if (value < p.low || value >= p.high) return true;
  if (p.sorted && i > 0 && row[i - 1] > value) return true;
  if (value < 0) return false;
  if (p.ascending && !is_first(p, i) && (row[i - 1] < 0 || row[i - 1] >= value)) return true;
  if (p.distinct) {
    for (int64_t j = 0; j < i; ++j) {
      if (row[j] == value) return true;
    }
  }
  return false;
}

constexpr const int32_t* index_row(const IndexCheckParams& p, int64_t row) {
  return p.data + row / p.heads * p.batch_stride + row % p.heads * p.head_stride;
}

// Both fill *found. The CUDA form waits for the stream.
void index_check_cpu(const IndexCheckParams& params);
void index_check_cuda(const IndexCheckParams& params, void* stream);

}  // namespace kvc
