// history_scores on CUDA: a cluster of kBlocks blocks a (batch, head), each with its own stretch of
// slots (score/history_ranks.cuh). Bound: the history once, 4 * capacity * width bytes a head.
// Before sm_90 a cluster is one block.
#include <algorithm>

#include "device/launch.cuh"
#include "device/limits.cuh"
#include "score/history_ranks.cuh"
#include "score/history_scores.h"

namespace kvc {
namespace {

template <int kBlocks>
__global__ void __launch_bounds__(history::kThreads)
    history_scores_kernel(const __grid_constant__ HistoryScoresParams p) {
  launch_wait();
  launch_dependents();
  const int64_t b = blockIdx.x / kBlocks, h = blockIdx.y;
  const auto capacity = static_cast<int>(p.capacity);
  const int length = max(0, min(*p.lengths.at(b, p.unit(h)), capacity));
  const int stretch = (capacity + kBlocks - 1) / kBlocks;
  const int begin = static_cast<int>(blockIdx.x % kBlocks) * stretch;
  float* scores = p.scores + (b * p.heads + h) * p.capacity;
  history::ranks<kBlocks>(p.head(b, h), length, begin, min(begin + stretch, capacity),
                          [&](int slot, float score) { scores[slot] = score; });
}

template <int kBlocks>
void launch(const HistoryScoresParams& p, bool early, void* stream) {
  const dim3 blocks(static_cast<unsigned>(p.batch * kBlocks), static_cast<unsigned>(p.heads));
  Launch(blocks, history::kThreads, 0, static_cast<cudaStream_t>(stream))
      .cluster(kBlocks)
      .early(early)("history_scores", history_scores_kernel<kBlocks>, p);
}

}  // namespace

void history_scores_cuda(const HistoryScoresParams& params, void* stream) {
  const DeviceLimits& limits = device_limits();
  if (limits.major < 9) return launch<1>(params, false, stream);
  // eight blocks while the heads leave multiprocessors idle
  if (params.batch * params.heads > 2 * limits.multiprocessors) {
    return launch<1>(params, true, stream);
  }
  launch<8>(params, true, stream);
}

}  // namespace kvc
