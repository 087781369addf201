// cosine_importance, plain and with the residual add inside.
#include "budget/cosine_importance.h"
#include "machine.h"

namespace kvc::bench {
namespace {

Work cosine_work(Machine& machine, int64_t copies, int64_t length, int64_t hidden, bool is_update) {
  Work work;
  for (int64_t copy = 0; copy < copies; ++copy) {
    const int64_t tiles = (length + kCosineTile - 1) / kCosineTile;
    const CosineImportanceParams p{
        .before = machine.bfloat16(length * hidden),
        .after = machine.bfloat16(length * hidden),
        .partial = machine.room<float>(tiles),
        .out = machine.room<float>(1),
        .batch = 1,
        .seq_len = length,
        .hidden = hidden,
        .num_tiles = tiles,
        .before_batch_stride = length * hidden,
        .before_seq_stride = hidden,
        .after_batch_stride = length * hidden,
        .after_seq_stride = hidden,
        .dtype = DType::kBFloat16,
        .is_update = is_update,
    };
    work.sets.push_back([p, &machine] { KVC_BENCH_LAUNCH(cosine_importance, p, machine); });
  }
  work.bytes = 2.0 * 2.0 * static_cast<double>(length * hidden);
  return work;
}

const Cases cases([](Machine& machine) {
  const std::vector<int64_t> lengths =
      machine.is_cuda() ? std::vector<int64_t>{8192, 32768} : std::vector<int64_t>{8192};
  for (const int64_t length : lengths) {
    for (const int64_t hidden : {4096, 8192}) {
      for (const bool is_update : {false, true}) {
        const std::string shape = "B1_S" + std::to_string(length) + "_H" + std::to_string(hidden);
        add_case(is_update ? "cosine_importance_update" : "cosine_importance", shape, machine,
                 2 * 2 * length * hidden, [=](Machine& m, int64_t copies) {
                   return cosine_work(m, copies, length, hidden, is_update);
                 });
      }
    }
  }
});

}  // namespace
}  // namespace kvc::bench
