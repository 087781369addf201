// cosine_importance on CUDA.
//
// Block = (tile of kCosineTile tokens, batch row), a warp a token, lane = 16 bytes of both vectors
// a step. Three float32 sums a token stay in registers; the block writes one partial sum, and a
// second launch adds the partials of a row in a fixed order: no atomics, the same bits every run.
// Bound: reading `before` and `after` once, 2 * batch * seq_len * hidden elements; both are
// streamed past L1.
#include <limits>

#include "budget/cosine_importance.h"
#include "device/check.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"

namespace kvc {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

struct Sums {
  float dot = 0, before = 0, after = 0;

  template <typename T, bool kIsUpdate>
  __device__ __forceinline__ void add(T h, T a) {
    const float x = to_float(h);
    float y = to_float(a);
    if (kIsUpdate) y = to_float(from_float<T>(x + y));
    dot = fmaf(x, y, dot);
    before = fmaf(x, x, before);
    after = fmaf(y, y, after);
  }
};

// The cosine of one token, known to all lanes of the warp.
template <typename T, bool kIsUpdate, bool kVectorised>
__device__ __forceinline__ float token_cosine(const T* h, const T* a, int64_t hidden, int lane) {
  Sums sums;
  if constexpr (kVectorised) {
    constexpr int kVec = Vec<T>::kSize;
#pragma unroll 4
    for (int64_t i = lane * kVec; i < hidden; i += kWarp * kVec) {
      const Vec<T> hv = load_streaming(h + i);
      const Vec<T> av = load_streaming(a + i);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sums.add<T, kIsUpdate>(hv.data[j], av.data[j]);
    }
  } else {
    for (int64_t i = lane; i < hidden; i += kWarp) sums.add<T, kIsUpdate>(h[i], a[i]);
  }
  const float dot = warp_sum(sums.dot);
  const float before = warp_sum(sums.before);
  const float after = warp_sum(sums.after);
  return dot / (fmaxf(sqrtf(before), kCosineEps) * fmaxf(sqrtf(after), kCosineEps));
}

template <typename T, bool kIsUpdate, bool kVectorised>
__global__ void __launch_bounds__(kThreads) cosine_importance_kernel(CosineImportanceParams p) {
  const int64_t tile = blockIdx.x, b = blockIdx.y;
  launch_dependents();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t start = p.seq_start ? p.seq_start[b] : 0;
  const T* h = static_cast<const T*>(p.before) + b * p.before_batch_stride;
  const T* a = static_cast<const T*>(p.after) + b * p.after_batch_stride;

  __shared__ float cosines[kCosineTile];
  for (int i = warp; i < kCosineTile; i += kWarps) {
    const int64_t s = tile * kCosineTile + i;
    float cosine = 0;
    if (s >= start && s < p.seq_len) {
      cosine = token_cosine<T, kIsUpdate, kVectorised>(h + s * p.before_seq_stride,
                                                       a + s * p.after_seq_stride, p.hidden, lane);
    }
    if (lane == 0) cosines[i] = cosine;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kCosineTile; ++i) sum += cosines[i];
    p.partial[b * p.num_tiles + tile] = sum;
  }
}

// A warp a row: lane l adds the tiles l, l + 32, ... in ascending order, then the lanes add by
// pairs.
__global__ void row_mean_kernel(CosineImportanceParams p) {
  static_assert(kCosineLanes == kWarp);
  const int64_t b = blockIdx.x;
  launch_wait();
  const int64_t tokens = p.seq_len - (p.seq_start ? p.seq_start[b] : 0);
  float sum = 0;
#pragma unroll 16
  for (int64_t tile = threadIdx.x; tile < p.num_tiles; tile += kWarp) {
    sum += p.partial[b * p.num_tiles + tile];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) p.out[b] = tokens > 0 ? sum / static_cast<float>(tokens) : nanf("");
}

template <typename T>
bool vectorisable(const CosineImportanceParams& p) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const int64_t all = p.before_batch_stride | p.before_seq_stride | p.after_batch_stride |
                      p.after_seq_stride | p.hidden;
  return aligned(p.before) && aligned(p.after) && all % Vec<T>::kSize == 0;
}

template <typename T>
void launch(const CosineImportanceParams& p, cudaStream_t stream) {
  if (p.num_tiles > 0) {
    const dim3 grid(static_cast<unsigned>(p.num_tiles), static_cast<unsigned>(p.batch));
    const bool wide = vectorisable<T>(p);
    const auto kernel = p.is_update ? (wide ? cosine_importance_kernel<T, true, true>
                                            : cosine_importance_kernel<T, true, false>)
                                    : (wide ? cosine_importance_kernel<T, false, true>
                                            : cosine_importance_kernel<T, false, false>);
    kernel<<<grid, kThreads, 0, stream>>>(p);
    launch_check("cosine_importance");
  }
  const bool may_be_early = p.num_tiles > 0 && device_limits().major >= 9;
  Launch(static_cast<unsigned>(p.batch), kWarp, 0, stream)
      .early(may_be_early)("cosine_importance", row_mean_kernel, p);
}

}  // namespace

void cosine_importance_cuda(const CosineImportanceParams& params, void* stream) {
  visit_float_cuda(params.dtype, "cosine_importance", [&](auto tag) {
    launch<decltype(tag)>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace kvc
