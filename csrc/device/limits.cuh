// What the current device can do, asked once a device.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <string>

#include "device/check.cuh"

namespace kvc {

struct DeviceLimits {
  int major;  // compute capability
  int multiprocessors;
  int shared_bytes;      // most that one block may use
  int shared_bytes_all;  // of a multiprocessor, all blocks together
};

// KVCOMPRESS_SM=80 in the environment: a newer card gets what sm_80 gets, for comparisons.
inline DeviceLimits lowered(DeviceLimits limits) {
  const char* wanted = std::getenv("KVCOMPRESS_SM");
  if (wanted == nullptr) return limits;
  if (std::string(wanted) != "80") {
    throw std::runtime_error(std::string("KVCOMPRESS_SM must be 80, or not set, got ") + wanted);
  }
  limits.major = std::min(limits.major, 8);
  limits.shared_bytes = std::min(limits.shared_bytes, 163 << 10);
  limits.shared_bytes_all = std::min(limits.shared_bytes_all, 164 << 10);
  return limits;
}

// ask(device), called once for each current device. F is a lambda: each keeps answers of its own.
template <typename F>
const auto& once_a_device(const F& ask) {
  constexpr int kMaxDevices = 64;
  static decltype(ask(0)) answers[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  int device = 0;
  cuda_check(cudaGetDevice(&device), "device_limits");
  if (device >= kMaxDevices) throw std::runtime_error("device_limits: more than 64 GPUs");
  std::call_once(asked[device], [&] { answers[device] = ask(device); });
  return answers[device];
}

inline const DeviceLimits& device_limits() {
  return once_a_device([](int device) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      cuda_check(cudaDeviceGetAttribute(&value, attribute, device), "device_limits");
      return value;
    };
    return lowered({
        .major = ask(cudaDevAttrComputeCapabilityMajor),
        .multiprocessors = ask(cudaDevAttrMultiProcessorCount),
        .shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        .shared_bytes_all = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
    });
  });
}

}  // namespace kvc
