#include <cstring>

#include "host/parallel.h"
#include "store/compact.h"

namespace kvc {
namespace {

// Rows that are asked for ahead of their turn: sources lie anywhere, and no hardware follows them.
// Measured on a fifth-generation Xeon, 1024 of 8192 rows: 380 us without, 337 with 8, 403 with 4,
// 469 with 16.
constexpr int64_t kAhead = 8;

// Moves the rows of one (tensor, batch row, head) in ascending order: every source lies at or
// behind its destination, so nothing is overwritten before it was read. Runs of neighbours move in
// one piece.
void compact_rows(const CompactHead& head, int64_t stride, int64_t bytes) {
  const auto& [base, index, k, seq_len] = head;
  for (int64_t i = 0, run = 1; i < k; i += run) {
    const int64_t source = index[i];
    run = 1;
    if (i + kAhead < k && index[i + kAhead] >= 0 && index[i + kAhead] < seq_len) {
      const char* next = base + index[i + kAhead] * stride;
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(next + byte);
    }
    if (source <= i || source >= seq_len) continue;  // in place already, padding or out of range
    while (stride == bytes && i + run < k && index[i + run] == source + run &&
           source + run < seq_len) {
      ++run;
    }
    std::memmove(base + i * stride, base + source * stride, run * bytes);
  }
}

}  // namespace

void compact_cpu(const CompactParams& p) {
  const int64_t rows = p.batch * p.heads;
  parallel_for(0, p.num_tensors * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Rows& tensor = p.tensors[item / rows];
      compact_rows(compact_head(p, tensor, static_cast<uint32_t>(item % rows)), tensor.row_stride,
                   tensor.bytes);
    }
  });
}

}  // namespace kvc
