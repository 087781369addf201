// gather on CUDA: one launch writes every row of every new buffer, zeros included
// (device/copy_rows.cuh). Bound: the kept rows read once, the new buffers written once.
#include "device/copy_rows.cuh"
#include "store/gather.h"

namespace kvc {
namespace {

struct GatherJob {
  GatherParams p;

  __device__ RowMove operator()(int tensor, int64_t row) const {
    const Rows& out = p.outs[tensor];
    const Rows& source = p.sources[tensor];
    const int64_t i = row % p.capacity, bh = row / p.capacity;
    const int64_t b = bh / p.heads, h = bh % p.heads;
    RowMove move{nullptr, out.data + row * out.bytes};
    if (i < p.k) {
      const int64_t entry = p.index[b * p.index_batch_stride + h * p.index_head_stride + i];
      if (entry >= 0 && entry < p.seq_len) {
        move.from = row_address(source, b, h / (p.heads / source.heads), entry);
      }
    }
    return move;
  }
};

}  // namespace

void gather_cuda(const GatherParams& params, void* stream) {
  copy_rows::Plan plan;
  for (int i = 0; i < params.num_tensors; ++i) {
    plan.add(params.batch * params.heads * params.capacity, params.sources[i], params.outs[i]);
  }
  copy_rows::launch("gather", plan, GatherJob{params}, static_cast<cudaStream_t>(stream));
}

}  // namespace kvc
