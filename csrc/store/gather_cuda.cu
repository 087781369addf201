// gather on CUDA: one launch writes every row of every new buffer, zeros included
// (device/copy_rows.cuh); packed buffers are zero already, and only their kept rows are written.
// Bound: the kept rows read once, the new buffers written once.
#include "device/copy_rows.cuh"
#include "store/gather.h"

namespace kvc {
namespace {

// Entry i of index head (b, h) in the tensor it names, or null.
__device__ const char* kept_row(const GatherParams& p, const Rows& source, int64_t b, int64_t h,
                                int64_t i) {
  const int64_t entry = p.index[b * p.index_batch_stride + h * p.index_head_stride + i];
  if (entry < 0 || entry >= p.seq_len) return nullptr;
  return row_address(source, b, h / (p.heads / source.heads), entry);
}

struct DenseJob {
  GatherParams p;

  __device__ RowMove operator()(int tensor, int64_t row) const {
    const Rows& out = p.outs[tensor];
    const int64_t i = row % p.capacity, bh = row / p.capacity;
    RowMove move{nullptr, out.data + row * out.bytes};
    if (i < p.k) move.from = kept_row(p, p.sources[tensor], bh / p.heads, bh % p.heads, i);
    return move;
  }
};

struct RaggedJob {
  GatherParams p;

  __device__ RowMove operator()(int tensor, int64_t row) const {
    const Rows& out = p.outs[tensor];
    const int64_t i = row % p.k, bh = row / p.k;
    RowMove move{kept_row(p, p.sources[tensor], bh / p.heads, bh % p.heads, i), nullptr};
    if (move.from != nullptr) move.to = out.data + (p.row_start[bh] + i) * out.bytes;
    return move;
  }
};

}  // namespace

void gather_cuda(const GatherParams& params, void* stream) {
  const bool ragged = params.row_start != nullptr;
  copy_rows::Plan plan;
  for (int i = 0; i < params.num_tensors; ++i) {
    plan.add(params.batch * params.heads * (ragged ? params.k : params.capacity), params.sources[i],
             params.outs[i]);
  }
  const auto on = static_cast<cudaStream_t>(stream);
  if (ragged) {
    copy_rows::launch("gather_ragged", plan, RaggedJob{params}, on);
  } else {
    copy_rows::launch("gather", plan, DenseJob{params}, on);
  }
}

}  // namespace kvc
