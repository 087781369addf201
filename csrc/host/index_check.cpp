#include "host/index_check.h"

namespace kvc {

void index_check_cpu(const IndexCheckParams& p) {
  for (int64_t row = 0; row < p.batch * p.heads; ++row) {
    const int32_t* entries = index_row(p, row);
    for (int64_t i = 0; i < p.length; ++i) {
      if (is_offence(p, entries, i)) {
        *p.found = {row * p.length + i, entries[i]};
        return;
      }
    }
  }
}

}  // namespace kvc
