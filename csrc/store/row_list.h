// The torch side of tensor lists whose rows an op moves: one set of checks and descriptors for
// all ops of this room.
#pragma once

#include <vector>

#include "common/check.h"
#include "host/rows.h"

namespace kvc {

// What stands in front of a row's own dimension: [batch, heads, seq_len], or [slots] of a packed
// buffer.
struct RowLayout {
  const char* names;
  int64_t dims = 3;
};

// 1 to kMaxTensors tensors [<layout>, head_dim] or [<layout>] on the device of `anchor`, elements
// of 1, 2, 4 or 8 bytes, contiguous in the last dimension and, where the op writes them, not
// overlapping themselves.
void check_row_list(const char* op, const char* argument, const std::vector<Tensor>& tensors,
                    RowLayout layout, const Tensor& anchor, const char* anchor_name,
                    bool is_written);

// An index [batch, heads, k] int32.
void check_index(const char* op, const Tensor& index);

// A copy-on-write tensor gets its own memory here if `is_written`, and keeps sharing it if not.
Rows rows_of(const Tensor& t, bool is_written);
// The same of a packed [slots, head_dim] or [slots].
Rows packed_rows_of(const Tensor& t, bool is_written);

// " at [2]": which tensor of a list an error speaks of.
inline std::string at(size_t i) {
  return " at [" + std::to_string(i) + "]";
}

}  // namespace kvc
