// Until the kernel lands: an error that says so.
#include <stdexcept>

#include "store/compact.h"

namespace kvc {

void compact_cuda(const CompactParams&, void*) {
  throw std::runtime_error("compact: no CUDA kernel yet");
}

}  // namespace kvc
