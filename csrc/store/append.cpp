#include "store/append.h"

#include "common/debug.h"
#include "common/on_device.h"
#include "store/row_list.h"

namespace kvc {
namespace {

constexpr const char* kOp = "append_";

// rows[i] has the shape of buffers[i], but for n instead of capacity.
bool pairs(const Tensor& buffer, const Tensor& rows, int64_t n) {
  const auto to = buffer.sizes(), from = rows.sizes();
  return from.size() == to.size() && from[0] == to[0] && from[1] == to[1] && from[2] == n &&
         (to.size() == 3 || from[3] == to[3]);
}

void append(const std::vector<Tensor>& buffers, const std::vector<Tensor>& rows,
            const Tensor& slots) {
  check_rank(kOp, "slots", slots, 2, "[batch, n]");
  check_dtype(kOp, "slots", slots, ScalarType::Int);
  check_last_contiguous(kOp, "slots", slots);
  check_row_list(kOp, "buffers", buffers, {"batch, heads, capacity"}, slots, "slots",
                 /*is_written=*/true);
  check_row_list(kOp, "rows", rows, {"batch, heads, n"}, slots, "slots", /*is_written=*/false);
  require(rows.size() == buffers.size(), kOp, "rows",
          "as many tensors as buffers (" + std::to_string(buffers.size()) + ")",
          std::to_string(rows.size()));
  const int64_t batch = slots.size(0), n = slots.size(1), capacity = buffers[0].size(2);
  AppendParams params{
      .slots = static_cast<const int32_t*>(slots.const_data_ptr()),
      .slots_batch_stride = slots.stride(0),
      .batch = batch,
      .capacity = capacity,
      .n = n,
  };
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Tensor& buffer = buffers[i];
    if (rows[i].scalar_type() != buffer.scalar_type()) {
      check_same_dtype(kOp, "rows", rows[i], buffer, "buffers");
    }
    if (buffer.size(0) != batch || buffer.size(2) != capacity) {
      fail(kOp, "buffers",
           "of the batch of slots (" + text(batch) + ") and the capacity of buffers[0] (" +
               text(capacity) + ")",
           shape_string(buffer) + at(i));
    }
    if (!pairs(buffer, rows[i], n)) {
      fail(kOp, "rows",
           "of the shape of buffers " + shape_string(buffer) + " with n (" + text(n) +
               ") for the capacity",
           shape_string(rows[i]) + at(i));
    }
    if (rows[i].numel() == 0) continue;
    params.buffers[params.num_tensors] = rows_of(buffer, /*is_written=*/true);
    params.rows[params.num_tensors++] = rows_of(rows[i], /*is_written=*/false);
  }
  if (debug_enabled()) [[unlikely]] {
    check_index_values(kOp, "slots", slots, {.low = -1, .high = capacity, .distinct = true},
                       "-1 or in [0, capacity), none twice in a row");
  }
  if (params.num_tensors == 0) return;
  KVC_LAUNCH(append, slots, params);
}

KVC_REGISTER(append_, append)

}  // namespace
}  // namespace kvc
