// gather: the kept rows of K, V and whatever lies beside them, copied into new buffers with room
// behind them.
//
//   out[b, h, i] = tensor[b, h / (heads / tensor heads), index[b, h, i]]   for i < k and index[b,
//   h, i] >= 0 out[b, h, i] = 0                                                      everywhere
//   else, up to capacity
//
// index need not ascend and may repeat entries. With more heads than a tensor has (a multiple), its
// heads are stored once per query head. Entries outside [0, seq_len) give zeros (the debug switch
// reports them).
//
// gather_ragged packs instead, from an index that is packed as well: head r = b * heads + h starts
// at row row_start[r] of one buffer, and only its kept entries are written:
//
//   out[row_start[r] + i] = tensor[..., index[indptr[r] + i]]   for i < indptr[r + 1] - indptr[r]
//                                                               and an index >= 0
#pragma once

#include <cstdint>

#include "host/rows.h"

namespace kvc {

struct GatherParams {
  Rows sources[kMaxTensors];  // [batch, tensor heads, seq_len] rows
  Rows outs[kMaxTensors];     // [batch, heads, capacity] rows of the same bytes, contiguous
  const int32_t* index;       // [batch, heads, k], last dimension contiguous; packed: [k]
  int64_t index_batch_stride, index_head_stride;  // in elements; dense only
  const int32_t* indptr;     // [batch * heads + 1] parts of a packed index, or null: dense
  const int64_t* row_start;  // [batch * heads] where packed outs start
  int64_t batch, heads, seq_len, k, capacity;
  int32_t num_tensors;
};

void gather_cpu(const GatherParams& params);
void gather_cuda(const GatherParams& params, void* stream);

}  // namespace kvc
