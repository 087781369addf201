#include "common/check.h"

#include <torch/headeronly/core/ScalarType.h>

namespace kvc {

void fail(const char* op, const char* argument, const std::string& must, const std::string& got) {
  STD_TORCH_CHECK(false, op, ": ", argument, " must be ", must, ", got ", got);
  __builtin_unreachable();
}

std::string shape_string(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(t.size(i));
  }
  return out + "]";
}

std::string dtype_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "an unsupported device";
}

DType float_dtype(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, argument, "float32, float16 or bfloat16", dtype_string(t.scalar_type()));
  }
}

void check_rank(const char* op, const char* argument, const Tensor& t, int64_t rank,
                const char* layout) {
  require(t.dim() == rank, op, argument, layout, std::to_string(t.dim()) + "D " + shape_string(t));
}

void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType dtype) {
  require(t.scalar_type() == dtype, op, argument, dtype_string(dtype),
          dtype_string(t.scalar_type()));
}

void check_same_device(const char* op, const char* argument, const Tensor& t, const Tensor& anchor,
                       const char* anchor_name) {
  require(device_string(t) == device_string(anchor), op, argument,
          std::string("on the device of ") + anchor_name + " (" + device_string(anchor) + ")",
          device_string(t));
}

void check_same_dtype(const char* op, const char* argument, const Tensor& t, const Tensor& anchor,
                      const char* anchor_name) {
  require(t.scalar_type() == anchor.scalar_type(), op, argument,
          std::string("of the dtype of ") + anchor_name + " (" +
              dtype_string(anchor.scalar_type()) + ")",
          dtype_string(t.scalar_type()));
}

void check_last_contiguous(const char* op, const char* argument, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  require(t.size(last) <= 1 || t.stride(last) == 1, op, argument,
          "contiguous in the last dimension", "a last stride of " + std::to_string(t.stride(last)));
}

void check_row_vector(const char* op, const char* argument, const std::optional<Tensor>& t,
                      int64_t batch, const Tensor& anchor, const char* anchor_name) {
  if (!t.has_value()) return;
  require(t->dim() == 1 && t->size(0) == batch, op, argument,
          "[batch] (" + std::to_string(batch) + ")",
          std::to_string(t->dim()) + "D " + shape_string(*t));
  check_dtype(op, argument, *t, ScalarType::Int);
  check_same_device(op, argument, *t, anchor, anchor_name);
  check_last_contiguous(op, argument, *t);
}

}  // namespace kvc
