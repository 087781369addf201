#include "store/row_list.h"

namespace kvc {

void check_row_list(const char* op, const char* argument, const std::vector<Tensor>& tensors,
                    RowLayout layout, const Tensor& anchor, const char* anchor_name,
                    bool is_written) {
  require(!tensors.empty() && tensors.size() <= kMaxTensors, op, argument,
          "1 to " + text(kMaxTensors) + " tensors", std::to_string(tensors.size()));
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const int64_t dims = t.dim();
    if (dims != layout.dims && dims != layout.dims + 1) {
      const std::string leading = std::string("[") + layout.names;
      fail(op, argument, leading + ", head_dim] or " + leading + "]",
           text(dims) + "D " + shape_string(t) + at(i));
    }
    const int64_t bytes = static_cast<int64_t>(t.element_size());
    if (bytes > 8) fail(op, argument, "of elements of 1, 2, 4 or 8 bytes", text(bytes) + at(i));
    if (t.get_device_index() != anchor.get_device_index() || t.is_cuda() != anchor.is_cuda()) {
      fail(op, argument,
           std::string("on the device of ") + anchor_name + " (" + device_string(anchor) + ")",
           device_string(t) + at(i));
    }
    if (t.size(dims - 1) > 1 && t.stride(dims - 1) != 1) {
      fail(op, argument, "contiguous in the last dimension",
           "a last stride of " + text(t.stride(dims - 1)) + at(i));
    }
    for (int64_t dim = 0; is_written && dim + 1 < dims; ++dim) {
      if (t.size(dim) > 1 && t.stride(dim) == 0) {
        fail(op, argument, "free of overlapping rows",
             "a stride of 0 in dimension " + text(dim) + at(i));
      }
    }
  }
}

void check_index(const char* op, const Tensor& index) {
  check_rank(op, "index", index, 3, "[batch, heads, k]");
  check_dtype(op, "index", index, ScalarType::Int);
  check_last_contiguous(op, "index", index);
}

namespace {

char* data_of(const Tensor& t, bool is_written) {
  return static_cast<char*>(is_written ? t.mutable_data_ptr()
                                       : const_cast<void*>(t.const_data_ptr()));
}

}  // namespace

Rows rows_of(const Tensor& t, bool is_written) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const auto stride = [&](size_t dim) { return sizes[dim] > 1 ? strides[dim] * bytes : 0; };
  return {
      .data = data_of(t, is_written),
      .batch_stride = stride(0),
      .head_stride = stride(1),
      .row_stride = stride(2),
      .bytes = sizes.size() == 4 ? sizes[3] * bytes : bytes,
      .heads = sizes[1],
  };
}

Rows packed_rows_of(const Tensor& t, bool is_written) {
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {
      .data = data_of(t, is_written),
      .row_stride = t.size(0) > 1 ? t.stride(0) * bytes : 0,
      .bytes = t.dim() == 2 ? t.size(1) * bytes : bytes,
      .heads = 1,
  };
}

}  // namespace kvc
