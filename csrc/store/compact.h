// compact_: the kept rows of K, V and whatever lies beside them move to the front of the same
// buffers.
//
//   row i of (b, h) = row index[b, h, i] of (b, h)     for every i with index[b, h, i] >= 0, in
//   every tensor
//
// index ascends, so index[b, h, i] >= i: no row moves backwards. Rows behind the kept ones, and
// rows of slots that hold -1, keep what they held. Entries outside [0, seq_len) are skipped (the
// debug switch reports them). No second buffer and no scratch.
#pragma once

#include <cstdint>

#include "host/rows.h"

namespace kvc {

struct CompactParams {
  Rows tensors[kMaxTensors];  // [batch, heads, seq_len] rows, of at least one byte
  const int32_t* index;       // [batch, heads, k], last dimension contiguous
  int64_t index_batch_stride, index_head_stride;  // in elements
  int64_t batch, heads, seq_len, k;
  int32_t num_tensors;
};

void compact_cpu(const CompactParams& params);
void compact_cuda(const CompactParams& params, void* stream);

}  // namespace kvc
