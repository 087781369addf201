// Small integers [batch, units] on the device: lengths, tokens seen, limits. A unit is what shares
// a set of entries: a kv head, or all heads of a layer.
#pragma once

#include <cstdint>

namespace kvc {

template <typename Int>
struct UnitCounts {
  Int* data;                          // null: absent, where that is allowed
  int64_t batch_stride, unit_stride;  // in elements

  constexpr Int* at(int64_t b, int64_t u) const {
    return data + b * batch_stride + u * unit_stride;
  }
};

}  // namespace kvc
