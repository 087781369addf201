// What the current device can do, asked once a device.
#pragma once

#include <mutex>

#include "device/check.cuh"

namespace kvc {

struct DeviceLimits {
  int major;  // compute capability
  int multiprocessors;
  int shared_bytes;      // most that one block may use
  int shared_bytes_all;  // of a multiprocessor, all blocks together
};

inline const DeviceLimits& device_limits() {
  constexpr int kMaxDevices = 64;
  static DeviceLimits limits[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  int device = 0;
  cuda_check(cudaGetDevice(&device), "device_limits");
  if (device >= kMaxDevices) throw std::runtime_error("device_limits: more than 64 GPUs");
  std::call_once(asked[device], [&] {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      cuda_check(cudaDeviceGetAttribute(&value, attribute, device), "device_limits");
      return value;
    };
    limits[device] = {.major = ask(cudaDevAttrComputeCapabilityMajor),
                      .multiprocessors = ask(cudaDevAttrMultiProcessorCount),
                      .shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      .shared_bytes_all = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
  return limits[device];
}

}  // namespace kvc
