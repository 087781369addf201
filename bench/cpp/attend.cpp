// decode_attention of one new token over a dense store.
#include "attend/decode_attention.h"

#include <algorithm>
#include <cmath>

#include "machine.h"

namespace kvc::bench {
namespace {

Work decode_work(Machine& machine, int64_t copies, int64_t batch, int64_t length) {
  Work work;
  const int64_t rows = batch * kQueryHeads, entries = batch * kHeads * length;
  const double scale = 1.0 / std::sqrt(static_cast<double>(kHeadDim));
  for (int64_t copy = 0; copy < copies; ++copy) {
    DecodeAttentionParams p{};
    p.q = machine.bfloat16(rows * kHeadDim);
    p.k = machine.bfloat16(entries * kHeadDim);
    p.v = machine.bfloat16(entries * kHeadDim);
    p.out = machine.room<uint16_t>(rows * kHeadDim);
    p.lse = machine.room<float>(rows);
    p.batch = batch;
    p.num_q_heads = kQueryHeads;
    p.num_kv_heads = kHeads;
    p.num_queries = 1;
    p.head_dim = kHeadDim;
    p.width = length;
    p.max_workers = kAttendMaxWorkers;
    p.q_batch_stride = kQueryHeads * kHeadDim;
    p.k_batch_stride = p.v_batch_stride = kHeads * length * kHeadDim;
    p.k_head_stride = p.v_head_stride = length * kHeadDim;
    p.q_head_stride = p.q_row_stride = p.k_row_stride = p.v_row_stride = kHeadDim;
    p.softmax_scale = static_cast<float>(scale);
    p.scale_log2 = static_cast<float>(scale * 1.44269504088896340736);
    p.dtype = DType::kBFloat16;
    p.plan();
    const int64_t partials = (p.max_workers + p.num_rows()) * p.slice();
    p.partial_out = machine.room<float>(partials * kHeadDim);
    p.partial_stats = machine.room<float>(partials * 2);
    p.owners = machine.room<int32_t>(2 * p.num_rows());
    work.sets.push_back([p, &machine] { KVC_BENCH_LAUNCH(decode_attention, p, machine); });
  }
  work.bytes = 2.0 * 2.0 * static_cast<double>(entries * kHeadDim);
  return work;
}

const Cases cases([](Machine& machine) {
  struct Shape {
    int64_t batch, length;
  };
  std::vector<Shape> shapes{{1, 1024}, {1, 8192}};
  if (machine.is_cuda()) shapes.insert(shapes.end(), {{1, 32768}, {8, 8192}, {64, 1024}});
  for (const auto& [batch, length] : shapes) {
    add_case("decode_attention", "B" + std::to_string(batch) + "_S" + std::to_string(length),
             machine, 2 * 2 * batch * kHeads * length * kHeadDim,
             [=, batch = batch, length = length](Machine& m, int64_t copies) {
               return decode_work(m, copies, batch, length);
             });
  }
});

}  // namespace
}  // namespace kvc::bench
