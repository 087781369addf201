// window_scores, with and without the prefill's log-sum-exp.
#include "score/window_scores.h"

#include <algorithm>
#include <cmath>

#include "machine.h"

namespace kvc::bench {
namespace {

Work window_scores_work(Machine& machine, int64_t copies, int64_t batch, int64_t length,
                        int64_t window, bool with_lse) {
  Work work;
  const int64_t rows = batch * kQueryHeads * window;
  for (int64_t copy = 0; copy < copies; ++copy) {
    WindowScoresParams p{AttentionRows{
        .q = machine.bfloat16(rows * kHeadDim),
        .k = machine.bfloat16(batch * kHeads * length * kHeadDim),
        .lse = with_lse ? machine.make<float>(rows, [](int64_t) { return 10.0f; }) : nullptr,
        .batch = batch,
        .num_q_heads = kQueryHeads,
        .num_kv_heads = kHeads,
        .window = window,
        .seq_len = length,
        .head_dim = kHeadDim,
        .first_query = length - window,
        .q_batch_stride = kQueryHeads * window * kHeadDim,
        .q_head_stride = window * kHeadDim,
        .q_row_stride = kHeadDim,
        .k_batch_stride = kHeads * length * kHeadDim,
        .k_head_stride = length * kHeadDim,
        .k_row_stride = kHeadDim,
        .lse_batch_stride = kQueryHeads * window,
        .lse_head_stride = window,
        .scale_log2 = static_cast<float>(kLog2e / std::sqrt(static_cast<double>(kHeadDim))),
        .dtype = DType::kBFloat16,
    }};
    p.num_scored = length - window;
    p.kernel_size = 5;
    p.window_reduce = WindowReduce::kSum;
    p.group_reduce = GroupReduce::kMean;
    p.pool = Pool::kAvg;
    p.pool_first = false;
    p.max_chunks = p.chunks_wanted();
    p.row_stats = machine.room<float>(p.max_chunks * rows * 2);
    p.votes =
        machine.room<float>(batch * std::max(p.vote_heads(), kHeads * p.row_groups()) * length);
    p.out = machine.room<float>(batch * p.out_heads() * length);
    work.sets.push_back([p, &machine] { KVC_BENCH_LAUNCH(window_scores, p, machine); });
  }
  work.bytes = static_cast<double>(batch * kHeads * length * kHeadDim * 2);
  work.flop = 2.0 * static_cast<double>(rows * length * kHeadDim);
  return work;
}

const Cases cases([](Machine& machine) {
  const std::vector<int64_t> lengths =
      machine.is_cuda() ? std::vector<int64_t>{8192, 32768, 131072} : std::vector<int64_t>{8192};
  for (const int64_t length : lengths) {
    for (const int64_t window : {32, 64}) {
      for (const bool with_lse : {false, true}) {
        add_case(with_lse ? "window_scores_lse" : "window_scores",
                 "B1_S" + std::to_string(length) + "_W" + std::to_string(window) + "_avg5", machine,
                 kHeads * length * kHeadDim * 2, [=](Machine& m, int64_t copies) {
                   return window_scores_work(m, copies, 1, length, window, with_lse);
                 });
      }
    }
  }
});

}  // namespace
}  // namespace kvc::bench
