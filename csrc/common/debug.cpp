#include "common/debug.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

#include "common/on_device.h"
#include "host/index_check.h"

namespace kvc {
namespace {

bool from_environment() {
  const char* value = std::getenv("KVCOMPRESS_DEBUG");
  return value != nullptr && std::string_view(value) == "1";
}

std::atomic<bool> enabled{from_environment()};

void set_debug(bool on) {
  enabled.store(on, std::memory_order_relaxed);
}

STABLE_TORCH_LIBRARY_IMPL(kvcompress, CompositeExplicitAutograd, library) {
  library.impl("set_debug", TORCH_BOX(&set_debug));
}

}  // namespace

bool debug_enabled() {
  return enabled.load(std::memory_order_relaxed);
}

void check_index_values(const char* op, const char* argument, const Tensor& t,
                        const IndexRule& rule, const std::string& must) {
  if (t.numel() == 0) return;
  const int64_t dims = t.dim();
  Tensor scratch = torch::stable::new_empty(t, {2}, ScalarType::Long);
  IndexOffence found;
  const IndexCheckParams params{
      .data = static_cast<const int32_t*>(t.const_data_ptr()),
      .batch = dims > 1 ? t.size(0) : 1,
      .heads = dims > 2 ? t.size(1) : 1,
      .length = t.size(dims - 1),
      .batch_stride = dims > 1 ? t.stride(0) : 0,
      .head_stride = dims > 2 ? t.stride(1) : 0,
      .low = rule.low,
      .high = rule.high,
      .ascending = rule.ascending,
      .distinct = rule.distinct,
      .sorted = rule.sorted,
      .indptr = rule.indptr == nullptr ? nullptr
                                       : static_cast<const int32_t*>(rule.indptr->const_data_ptr()),
      .parts = rule.indptr == nullptr ? 0 : rule.indptr->numel() - 1,
      .scratch = static_cast<IndexOffence*>(scratch.mutable_data_ptr()),
      .found = &found,
  };
  KVC_LAUNCH(index_check, t, params);
  if (found.position < 0) return;
  std::string at = "]";
  for (int64_t dim = dims - 1, rest = found.position; dim >= 0; --dim) {
    at.insert(0, text(rest % t.size(dim)));
    at.insert(0, dim > 0 ? ", " : "[");
    rest /= t.size(dim);
  }
  fail(op, argument, must, text(found.value) + " at " + at);
}

}  // namespace kvc
