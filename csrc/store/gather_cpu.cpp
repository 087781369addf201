#include <algorithm>
#include <cstring>

#include "host/parallel.h"
#include "store/gather.h"

namespace kvc {

void gather_cpu(const GatherParams& p) {
  const int64_t rows = p.batch * p.heads;
  parallel_for(0, p.num_tensors * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Rows& source = p.sources[item / rows];
      const Rows& out = p.outs[item / rows];
      const int64_t b = item % rows / p.heads, h = item % p.heads;
      const char* from = row_address(source, b, h / (p.heads / source.heads), 0);
      const bool packed = p.indptr != nullptr;
      const int64_t row = b * p.heads + h;
      const int32_t* index = packed ? p.index + p.indptr[row]
                                    : p.index + b * p.index_batch_stride + h * p.index_head_stride;
      const int64_t k = packed ? p.indptr[row + 1] - p.indptr[row] : p.k;
      char* to = packed ? out.data + p.row_start[row] * out.bytes : row_address(out, b, h, 0);
      for (int64_t i = 0; i < k; ++i, to += out.bytes) {
        const int64_t entry = index[i];
        if (entry >= 0 && entry < p.seq_len) {
          std::memcpy(to, from + entry * source.row_stride, out.bytes);
        } else if (!packed) {
          std::memset(to, 0, out.bytes);
        }
      }
      if (!packed) std::memset(to, 0, (p.capacity - p.k) * out.bytes);
    }
  });
}

}  // namespace kvc
