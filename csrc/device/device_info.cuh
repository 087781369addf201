// Facts of the current device, asked once.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "device/check.cuh"

namespace kvc {

inline int num_sms() {
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<int>& slot = known[static_cast<size_t>(device) % known.size()];
  int count = slot.load(std::memory_order_relaxed);
  if (count == 0) {
    cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    slot.store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace kvc
