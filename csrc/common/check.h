// Argument checks of all ops: one wording, "op: argument must be <what>, got <what came>".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "host/dtype.h"

namespace kvc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const char* op, const char* argument, const std::string& must,
                       const std::string& got);

inline void require(bool ok, const char* op, const char* argument, const std::string& must,
                    const std::string& got) {
  if (!ok) [[unlikely]] {
    fail(op, argument, must, got);
  }
}

std::string shape_string(const Tensor& t);   // "[1, 8, 4096, 128]"
std::string dtype_string(ScalarType dtype);  // "float32"
std::string device_string(const Tensor& t);  // "cuda:0"

// float32, float16 or bfloat16, else an error.
DType float_dtype(const char* op, const char* argument, const Tensor& t);

void check_rank(const char* op, const char* argument, const Tensor& t, int64_t rank,
                const char* layout);
void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType dtype);
void check_same_device(const char* op, const char* argument, const Tensor& t, const Tensor& anchor,
                       const char* anchor_name);
void check_same_dtype(const char* op, const char* argument, const Tensor& t, const Tensor& anchor,
                      const char* anchor_name);
void check_last_contiguous(const char* op, const char* argument, const Tensor& t);
// The whole of a small int32 vector [batch]: seq_start, counts and their like.
void check_row_vector(const char* op, const char* argument, const std::optional<Tensor>& t,
                      int64_t batch, const Tensor& anchor, const char* anchor_name);

inline std::string text(int64_t value) {
  return std::to_string(value);
}

// The pointer of an optional int32 tensor, null when it is absent.
inline const int32_t* optional_int32(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

}  // namespace kvc
