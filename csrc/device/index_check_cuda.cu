// The index check on CUDA: one block walks all entries, the smallest wrong position wins. A
// debugging aid, so it is short rather than fast; the only code of the library that waits for the
// GPU.
#include <climits>

#include "device/check.cuh"
#include "host/index_check.h"

namespace kvc {
namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads) index_check_kernel(IndexCheckParams p) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = ULLONG_MAX;
  __syncthreads();
  const int64_t total = p.batch * p.heads * p.length;
  for (int64_t e = threadIdx.x; e < total; e += kThreads) {
    if (is_offence(p, index_row(p, e / p.length), e % p.length)) {
      atomicMin(&first, static_cast<unsigned long long>(e));
      break;  // this thread's later entries have larger positions
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  IndexOffence offence;
  if (first != ULLONG_MAX) {
    offence.position = static_cast<int64_t>(first);
    offence.value = index_row(p, offence.position / p.length)[offence.position % p.length];
  }
  *p.scratch = offence;
}

}  // namespace

void index_check_cuda(const IndexCheckParams& params, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  index_check_kernel<<<1, kThreads, 0, s>>>(params);
  launch_check("index_check");
  cuda_check(cudaMemcpyAsync(params.found, params.scratch, sizeof(IndexOffence),
                             cudaMemcpyDeviceToHost, s),
             "index_check");
  cuda_check(cudaStreamSynchronize(s), "index_check");
}

}  // namespace kvc
