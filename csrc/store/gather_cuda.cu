// gather on CUDA: one launch writes every row of every new buffer, zeros included
// (device/copy_rows.cuh); packed buffers are zero already, and only their kept rows are written.
// Bound: the kept rows read once, the new buffers written once.
#include "device/copy_rows.cuh"
#include "store/gather.h"

namespace kvc {
namespace {

// Entry `entry` of what head (b, h) reads, or null.
__device__ const char* kept_row(const GatherParams& p, const Rows& source, int64_t b, int64_t h,
                                int64_t entry) {
  if (entry < 0 || entry >= p.seq_len) return nullptr;
  return row_address(source, b, h / (p.heads / source.heads), entry);
}

struct DenseJob {
  GatherParams p;

  __device__ RowMove operator()(int tensor, int64_t row) const {
    const Rows& out = p.outs[tensor];
    const int64_t i = row % p.capacity, bh = row / p.capacity;
    RowMove move{nullptr, out.data + row * out.bytes};
    if (i < p.k) {
      const int64_t b = bh / p.heads, h = bh % p.heads;
      const int32_t entry = p.index[b * p.index_batch_stride + h * p.index_head_stride + i];
      move.from = kept_row(p, p.sources[tensor], b, h, entry);
    }
    return move;
  }
};

struct RaggedJob {
  GatherParams p;

  // The last head whose part of the index begins at or before it: the one that it belongs to.
  __device__ int64_t head_of(int64_t entry) const {
    int64_t low = 0, high = p.batch * p.heads;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.indptr[middle + 1] <= entry) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  __device__ RowMove operator()(int tensor, int64_t entry) const {
    const int64_t head = head_of(entry);
    RowMove move{nullptr, nullptr};
    if (head == p.batch * p.heads) return move;  // behind the last part
    move.from = kept_row(p, p.sources[tensor], head / p.heads, head % p.heads, p.index[entry]);
    const Rows& out = p.outs[tensor];
    const int64_t i = entry - p.indptr[head];
    if (move.from != nullptr && i >= 0) move.to = out.data + (p.row_start[head] + i) * out.bytes;
    return move;
  }
};

}  // namespace

void gather_cuda(const GatherParams& params, void* stream) {
  const bool ragged = params.indptr != nullptr;
  copy_rows::Plan plan;
  for (int i = 0; i < params.num_tensors; ++i) {
    const int64_t rows = ragged ? params.k : params.batch * params.heads * params.capacity;
    plan.add(rows, params.sources[i], params.outs[i]);
  }
  const auto on = static_cast<cudaStream_t>(stream);
  if (ragged) {
    copy_rows::launch("gather_ragged", plan, RaggedJob{params}, on);
  } else {
    copy_rows::launch("gather", plan, DenseJob{params}, on);
  }
}

}  // namespace kvc
