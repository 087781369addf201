// Rows of bytes: what the ops that move cache entries see of a tensor. They copy and never compute,
// so the dtype is only a number of bytes.
#pragma once

#include <cstdint>

namespace kvc {

constexpr int kMaxTensors = 8;  // tensors one call moves together

// Row (b, h, i) is `bytes` bytes at data + b * batch_stride + h * head_stride + i * row_stride.
struct Rows {
  char* data;
  int64_t batch_stride, head_stride, row_stride;  // in bytes; 0 where the dimension has one entry
  int64_t bytes;
  int64_t heads;
};

constexpr char* row_address(const Rows& rows, int64_t b, int64_t h, int64_t i) {
  return rows.data + b * rows.batch_stride + h * rows.head_stride + i * rows.row_stride;
}

// The widest access, 1 to 16 bytes, that every row of `rows` is aligned to and made of.
inline int64_t access_width(const Rows& rows) {
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data)) |
                      rows.batch_stride | rows.head_stride | rows.row_stride | rows.bytes | 16;
  return all & -all;
}

}  // namespace kvc
