#include <cstring>

#include "host/parallel.h"
#include "store/append.h"

namespace kvc {

void append_cpu(const AppendParams& p) {
  for (int32_t i = 0; i < p.num_tensors; ++i) {
    const Rows& buffer = p.buffers[i];
    const Rows& rows = p.rows[i];
    // a decode step is a few KB: threads pay from about a quarter MB on
    const int64_t grain = 1 + (1 << 18) / (p.n * rows.bytes);
    parallel_for(0, p.batch * rows.heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / rows.heads, h = item % rows.heads;
        const int32_t* slots = p.slots + b * p.slots_batch_stride;
        for (int64_t t = 0; t < p.n; ++t) {
          if (slots[t] < 0 || slots[t] >= p.capacity) continue;
          std::memcpy(row_address(buffer, b, h, slots[t]), row_address(rows, b, h, t), rows.bytes);
        }
      }
    });
  }
}

}  // namespace kvc
