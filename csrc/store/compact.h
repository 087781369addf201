// compact_: the kept rows of K, V and whatever lies beside them move to the front of the same
// buffers.
//
//   row i of (b, h) = row index[b, h, i] of (b, h)     for every i with index[b, h, i] >= 0, in
//   every tensor
//
// index ascends, so index[b, h, i] >= i: no row moves backwards. Rows behind the kept ones, and
// rows of slots that hold -1, keep what they held. Entries outside [0, seq_len) are skipped (the
// debug switch reports them). No second buffer: scratch is the flags of the CUDA form for long
// indices.
#pragma once

#include <cstdint>

#include "host/rows.h"

namespace kvc {

// Rows are staged through shared memory. A tensor is cut into column slices, which never touch each
// other; a block that holds all k rows of a slice needs no other block. Longer indices are cut into
// tiles of rows as well.
constexpr int64_t kCompactWholeRows = 2048;  // largest k that one block stages whole
constexpr int64_t kCompactTileBytes = 32 << 10;
constexpr int64_t kCompactMaxTileRows = 1024;
constexpr int64_t kCompactMaxSlice = 1024;  // bytes of a row that a tile takes

struct CompactTile {
  int64_t slice_bytes, slices, rows, tiles;
};

// How tensors with rows of `bytes` bytes are cut when k > kCompactWholeRows.
constexpr CompactTile compact_tile(int64_t bytes, int64_t k) {
  const int64_t slice = bytes < kCompactMaxSlice ? bytes : kCompactMaxSlice;
  const int64_t fits = kCompactTileBytes / slice;
  const int64_t rows = fits < kCompactMaxTileRows ? fits : kCompactMaxTileRows;
  return {slice, (bytes + slice - 1) / slice, rows, (k + rows - 1) / rows};
}

struct CompactParams {
  Rows tensors[kMaxTensors];  // [batch, heads, seq_len] rows, of at least one byte
  const int32_t* index;       // [batch, heads, k], last dimension contiguous
  int32_t* scratch;  // flags of all tiles, then the ticket counter; null if k <= kCompactWholeRows
  int64_t scratch_size;
  int64_t index_batch_stride, index_head_stride;  // in elements
  int64_t batch, heads, seq_len, k;
  int32_t num_tensors;
};

void compact_cpu(const CompactParams& params);
void compact_cuda(const CompactParams& params, void* stream);

}  // namespace kvc
