// append_ on CUDA: one launch for all pairs (device/copy_rows.cuh). A decode step moves a few KB,
// so it costs one launch and nothing else.
#include "device/copy_rows.cuh"
#include "store/append.h"

namespace kvc {
namespace {

struct AppendJob {
  AppendParams p;

  __device__ RowMove operator()(int tensor, int64_t row) const {
    const Rows& buffer = p.buffers[tensor];
    const Rows& rows = p.rows[tensor];
    const int64_t t = row % p.n, bh = row / p.n;
    const int64_t b = bh / rows.heads, h = bh % rows.heads;
    const int64_t slot = p.slots[b * p.slots_batch_stride + t];
    const bool is_padding = slot < 0 || slot >= p.capacity;
    return {row_address(rows, b, h, t), is_padding ? nullptr : row_address(buffer, b, h, slot)};
  }
};

}  // namespace

void append_cuda(const AppendParams& params, void* stream) {
  copy_rows::Plan plan;
  for (int i = 0; i < params.num_tensors; ++i) {
    const int64_t rows = params.batch * params.rows[i].heads * params.n;
    plan.add(rows, params.rows[i], params.buffers[i]);
  }
  copy_rows::launch("append_", plan, AppendJob{params}, static_cast<cudaStream_t>(stream));
}

}  // namespace kvc
