// compact_: the kept rows of K, V and whatever lies beside them move to the front of the same
// buffers.
//
//   row i of (b, h) = row index[b, h, i] of (b, h)     for every i with index[b, h, i] >= 0, in
//   every tensor
//
// index ascends, so index[b, h, i] >= i: no row moves backwards. Rows behind the kept ones, and
// rows of slots that hold -1, keep what they held. Entries outside [0, seq_len) are skipped (the
// debug switch reports them). No second buffer and no scratch.
//
// compact_ragged_ is the same for packed buffers, each head in a stretch of its own and with a
// count of its own:
//
//   row row_start[r] + i = row row_start[r] + index[indptr[r] + i]     for i < indptr[r + 1] -
//   indptr[r]
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "host/rows.h"

namespace kvc {

struct CompactParams {
  Rows tensors[kMaxTensors];  // [batch, heads, seq_len] rows, of at least one byte; or [seq_len]
  const int32_t* index;       // [batch, heads, k], last dimension contiguous; or [k]
  int64_t index_batch_stride, index_head_stride;  // in elements
  const int64_t* row_start;                       // [batch * heads] packed tensors, or null
  const int32_t* indptr;                          // [batch * heads + 1], with row_start
  int64_t batch, heads, seq_len, k;
  int32_t num_tensors;
};

// What one head of one tensor moves.
struct CompactHead {
  char* base;            // row 0
  const int32_t* index;  // [k]
  int32_t k, seq_len;    // entries outside [0, seq_len) are skipped
};

constexpr CompactHead compact_head(const CompactParams& p, const Rows& rows, uint32_t head) {
  if (p.row_start != nullptr) {
    const int64_t start = p.row_start[head];
    const int32_t first = p.indptr[head], last = p.indptr[head + 1];
    return {.base = rows.data + start * rows.row_stride,
            .index = p.index + first,
            .k = last > first ? last - first : 0,
            .seq_len = static_cast<int32_t>(
                std::min<int64_t>(p.seq_len - start, std::numeric_limits<int32_t>::max()))};
  }
  const auto heads = static_cast<uint32_t>(p.heads);
  const uint32_t b = head / heads, h = head % heads;
  return {.base = row_address(rows, b, h, 0),
          .index = p.index + b * p.index_batch_stride + h * p.index_head_stride,
          .k = static_cast<int32_t>(p.k),
          .seq_len = static_cast<int32_t>(p.seq_len)};
}

void compact_cpu(const CompactParams& params);
void compact_cuda(const CompactParams& params, void* stream);

}  // namespace kvc
