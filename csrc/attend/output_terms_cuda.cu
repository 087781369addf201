// output_terms_ on CUDA: a warp an entry, its lanes share head_dim; the outputs of the kv head's
// query rows lie in shared memory as float32. Lane r % 32 makes the term of row r, and all lanes
// add the terms up in the order of the heads. Bound: V once and the logits, from L2 where the
// attention has left them.
#include "attend/output_terms.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/reduce.cuh"

namespace kvc {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kKeys = 64;       // entries of a block
constexpr int kLaneValues = 8;  // of head_dim, at most 256
constexpr float kLog2e = 1.44269504088896340736f;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    output_terms_kernel(const __grid_constant__ OutputTermsParams p) {
  launch_wait();
  launch_dependents();
  extern __shared__ float out[];  // [rows][head_dim]
  __shared__ float out_square[kTermsMaxRows], term[kWarps][kTermsMaxRows];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rows = static_cast<int>(p.rows()), dim = static_cast<int>(p.head_dim);
  const int64_t chunks = (p.capacity + kKeys - 1) / kKeys;
  const int64_t store = blockIdx.x / chunks, first = blockIdx.x % chunks * kKeys;
  const int64_t b = store / p.num_kv_heads, h = store % p.num_kv_heads;
  const int64_t last = min(first + kKeys, p.length(store));
  if (first >= last) return;
  const T* from = static_cast<const T*>(p.out) + store * rows * dim;
  for (int i = threadIdx.x; i < rows * dim; i += kThreads) out[i] = to_float(from[i]);
  __syncthreads();
  for (int r = warp; r < rows; r += kWarps) {
    float square = 0;
    for (int d = lane; d < dim; d += kWarp)
      square = fmaf(out[r * dim + d], out[r * dim + d], square);
    square = warp_sum(square);
    if (lane == 0) out_square[r] = square;
  }
  __syncthreads();
  const T* values = static_cast<const T*>(p.v) + b * p.v_batch_stride + h * p.v_head_stride;
  float* sums = p.sums + b * p.sums_batch_stride + h * p.sums_head_stride;
  for (int64_t j = first + warp; j < last; j += kWarps) {
    float value[kLaneValues], square = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int d = lane + i * kWarp;
      value[i] = d < dim ? to_float(values[j * p.v_row_stride + d]) : 0.0f;
      square = fmaf(value[i], value[i], square);
    }
    square = warp_sum(square);
    for (int r = 0; r < rows; ++r) {
      float product = 0;
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        const int d = lane + i * kWarp;
        if (d < dim) product = fmaf(out[r * dim + d], value[i], product);
      }
      product = warp_sum(product);
      if (lane == r % kWarp) {
        const float x = p.logits[(store * rows + r) * p.capacity + j];
        const float share = exp2f((x - p.lse[store * rows + r]) * kLog2e);
        term[warp][r] =
            x == -INFINITY ? 0.0f : output_term(p.terms, share, x, square, out_square[r], product);
      }
    }
    __syncwarp();
    if (lane == 0) {
      sums[j] = add_output_terms(
          p, sums[j], [&](int64_t g, int64_t i) { return term[warp][g * p.num_queries + i]; });
    }
    __syncwarp();
  }
}

}  // namespace

void output_terms_cuda(const OutputTermsParams& p, void* stream) {
  const int64_t chunks = (p.capacity + kKeys - 1) / kKeys;
  const size_t shared_bytes = p.rows() * p.head_dim * sizeof(float);
  visit_float_cuda(p.dtype, "output_terms_", [&](auto tag) {
    const auto kernel = output_terms_kernel<decltype(tag)>;
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "output_terms_");
    Launch(static_cast<unsigned>(p.batch * p.num_kv_heads * chunks), kThreads, shared_bytes,
           static_cast<cudaStream_t>(stream))
        .early(device_limits().major >= 9)("output_terms_", kernel, p);
  });
}

}  // namespace kvc
