// kvcompress::build_id: tells the Python loader that the library is already in the process.
#include <torch/csrc/stable/library.h>

namespace kvc {
namespace {

int64_t build_id() {
  return KVC_VERSION_NUMBER;
}

STABLE_TORCH_LIBRARY_IMPL(kvcompress, CompositeExplicitAutograd, library) {
  library.impl("build_id", TORCH_BOX(&build_id));
}

}  // namespace
}  // namespace kvc
