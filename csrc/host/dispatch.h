// Runtime dtype -> template argument, once for every CPU twin.
#pragma once

#include <stdexcept>
#include <string>

#include "host/dtype.h"
#include "host/half.h"

namespace kvc {

// Calls f(T{}) with the CPU storage type of a floating dtype.
template <typename F>
decltype(auto) visit_float(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(f16{});
    case DType::kBFloat16:
      return f(bf16{});
    default:
      throw std::invalid_argument(std::string(op) + ": no kernel for dtype code " +
                                  std::to_string(static_cast<int>(dtype)));
  }
}

}  // namespace kvc
