// append_: new rows of K, V and whatever lies beside them, written into their slots of the same
// buffers.
//
//   buffer[b, h, slots[b, t]] = rows[b, h, t]     for every t with slots[b, t] >= 0, in every pair
//
// Slots of one batch row differ from each other, but for -1 (padding, skipped). Slots outside [0,
// capacity) are skipped too (the debug switch reports them).
#pragma once

#include <cstdint>

#include "host/rows.h"

namespace kvc {

struct AppendParams {
  Rows buffers[kMaxTensors];   // [batch, heads, capacity] rows
  Rows rows[kMaxTensors];      // [batch, heads, n] rows of the same bytes
  const int32_t* slots;        // [batch, n], last dimension contiguous
  int64_t slots_batch_stride;  // in elements
  int64_t batch, capacity, n;
  int32_t num_tensors;
};

void append_cpu(const AppendParams& params);
void append_cuda(const AppendParams& params, void* stream);

}  // namespace kvc
