// The torch side of UnitCounts: one wording for every op that takes them.
#pragma once

#include "common/check.h"
#include "host/unit_counts.h"

namespace kvc {

// `t` as [batch, units] int32 of the batch and units of `positions`; where it is written, no two
// numbers share memory.
template <typename Int>
UnitCounts<Int> unit_counts(const char* op, const char* name, const Tensor& t,
                            const Tensor& positions, bool is_written) {
  const int64_t batch = positions.size(0), units = positions.size(1);
  require(t.dim() == 2 && t.size(0) == batch && t.size(1) == units, op, name,
          "[batch, units] [" + text(batch) + ", " + text(units) + "]",
          text(t.dim()) + "D " + shape_string(t));
  check_dtype(op, name, t, ScalarType::Int);
  check_same_device(op, name, t, positions, "positions");
  const bool overlaps = (batch > 1 && t.stride(0) == 0) || (units > 1 && t.stride(1) == 0);
  require(!(is_written && overlaps), op, name, "free of overlaps", "a stride of 0");
  return {
      static_cast<Int*>(is_written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr())),
      t.stride(0), t.stride(1)};
}

}  // namespace kvc
