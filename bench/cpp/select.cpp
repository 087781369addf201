// topk.
#include "select/topk.h"

#include "machine.h"

namespace kvc::bench {
namespace {

Work topk_work(Machine& machine, int64_t copies, int64_t rows, int64_t length, int64_t k) {
  Random random;
  Work work;
  for (int64_t copy = 0; copy < copies; ++copy) {
    const TopkParams p{
        .scores = machine.make<float>(rows * length, [&](int64_t) { return random.uniform(); }),
        .index = machine.room<int32_t>(rows * k),
        .batch = rows / kHeads,
        .heads = kHeads,
        .seq_len = length,
        .k = k,
        .batch_stride = kHeads * length,
        .head_stride = length,
    };
    work.sets.push_back([p, &machine] { KVC_BENCH_LAUNCH(topk, p, machine); });
  }
  work.bytes = 4.0 * static_cast<double>(rows * (length + k));
  return work;
}

const Cases cases([](Machine& machine) {
  struct Shape {
    int64_t rows, length;
  };
  std::vector<Shape> shapes{{8, 8192}, {8, 32768}};
  if (machine.is_cuda()) {
    shapes.insert(shapes.end(), {{8, 131072}, {64, 32768}, {64, 131072}, {256, 32768}});
  }
  for (const auto& [rows, length] : shapes) {
    for (const int64_t k : {int64_t{1024}, length / 4}) {
      const std::string shape =
          "rows" + std::to_string(rows) + "_S" + std::to_string(length) + "_k" + std::to_string(k);
      add_case("topk", shape, machine, 4 * rows * length,
               [=, rows = rows, length = length](Machine& m, int64_t copies) {
                 return topk_work(m, copies, rows, length, k);
               });
    }
  }
});

}  // namespace
}  // namespace kvc::bench
