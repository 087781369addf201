// Binds the core's thread pool to torch's own when the library loads.
#include "host/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace kvc {
namespace {

void on_torch_pool(int64_t begin, int64_t end, int64_t grain, const RangeFunction& f) {
  torch::stable::parallel_for(begin, end, grain, f);
}

[[maybe_unused]] const bool bound = (set_parallel_for(on_torch_pool), true);

}  // namespace
}  // namespace kvc
