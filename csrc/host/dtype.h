// The dtypes an op can be asked for, as a torch-free enum.
#pragma once

#include <cstdint>

namespace kvc {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32, kInt64 };

}  // namespace kvc
