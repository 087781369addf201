// CUDA error checks of the launchers. Torch-free.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace kvc {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// After every launch: reports a bad launch configuration at the op that made it.
inline void launch_check(const char* op) {
  cuda_check(cudaGetLastError(), op);
}

}  // namespace kvc
