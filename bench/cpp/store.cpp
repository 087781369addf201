// compact_ and gather of K and V: kept rows spread evenly at random.
#include "machine.h"
#include "store/compact.h"
#include "store/gather.h"

namespace kvc::bench {
namespace {

Rows rows_of(void* data, int64_t length) {
  const int64_t bytes = kHeadDim * 2;
  return {static_cast<char*>(data), kHeads * length * bytes, length * bytes, bytes, bytes, kHeads};
}

// k ascending entries of `length` a head: one out of each of k equal pieces.
int32_t* kept(Machine& machine, Random& random, int64_t length, int64_t k) {
  return machine.make<int32_t>(kHeads * k, [&](int64_t i) {
    const int64_t slot = i % k, begin = slot * length / k, end = (slot + 1) * length / k;
    return static_cast<int32_t>(begin + static_cast<int64_t>(random.bits() % (end - begin)));
  });
}

Work compact_work(Machine& machine, int64_t copies, int64_t length, int64_t k) {
  Random random;
  Work work;
  for (int64_t copy = 0; copy < copies; ++copy) {
    CompactParams p{};
    for (int tensor = 0; tensor < 2; ++tensor) {
      p.tensors[tensor] = rows_of(machine.room<uint16_t>(kHeads * length * kHeadDim), length);
    }
    p.index = kept(machine, random, length, k);
    p.index_batch_stride = kHeads * k;
    p.index_head_stride = k;
    p.batch = 1;
    p.heads = kHeads;
    p.seq_len = length;
    p.k = k;
    p.num_tensors = 2;
    work.sets.push_back([p, &machine] { KVC_BENCH_LAUNCH(compact, p, machine); });
  }
  work.bytes = 2.0 * 2.0 * static_cast<double>(kHeads * k * kHeadDim * 2);
  return work;
}

Work gather_work(Machine& machine, int64_t copies, int64_t length, int64_t k) {
  Random random;
  Work work;
  for (int64_t copy = 0; copy < copies; ++copy) {
    GatherParams p{};
    for (int tensor = 0; tensor < 2; ++tensor) {
      p.sources[tensor] = rows_of(machine.room<uint16_t>(kHeads * length * kHeadDim), length);
      p.outs[tensor] = rows_of(machine.room<uint16_t>(kHeads * k * kHeadDim), k);
    }
    p.index = kept(machine, random, length, k);
    p.index_batch_stride = kHeads * k;
    p.index_head_stride = k;
    p.batch = 1;
    p.heads = kHeads;
    p.seq_len = length;
    p.k = p.capacity = k;
    p.num_tensors = 2;
    work.sets.push_back([p, &machine] { KVC_BENCH_LAUNCH(gather, p, machine); });
  }
  work.bytes = 2.0 * 2.0 * static_cast<double>(kHeads * k * kHeadDim * 2);
  return work;
}

const Cases cases([](Machine& machine) {
  const std::vector<int64_t> lengths =
      machine.is_cuda() ? std::vector<int64_t>{8192, 32768, 131072} : std::vector<int64_t>{8192};
  for (const int64_t length : lengths) {
    for (const int64_t k : {int64_t{1024}, length / 4}) {
      const std::string shape = "B1_S" + std::to_string(length) + "_k" + std::to_string(k);
      const int64_t moved = 2 * 2 * kHeads * k * kHeadDim * 2;
      add_case("compact_", shape, machine, moved,
               [=](Machine& m, int64_t copies) { return compact_work(m, copies, length, k); });
      add_case("gather", shape, machine, moved,
               [=](Machine& m, int64_t copies) { return gather_work(m, copies, length, k); });
    }
  }
});

}  // namespace
}  // namespace kvc::bench
