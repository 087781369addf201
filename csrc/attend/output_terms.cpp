#include "attend/output_terms.h"

#include "common/check.h"
#include "common/on_device.h"

namespace kvc {
namespace {

constexpr const char* kOp = "output_terms_";

void check_contiguous(const char* name, const Tensor& t) {
  require(t.is_contiguous(), kOp, name, "contiguous", "strides of its own");
}

void output_terms(const Tensor& sums, const Tensor& out, const Tensor& v, const Tensor& logits,
                  const Tensor& lse, const std::optional<Tensor>& lengths, double decay,
                  int64_t terms) {
  check_rank(kOp, "out", out, 4, "[batch, num_q_heads, num_queries, head_dim]");
  check_rank(kOp, "v", v, 4, "[batch, num_kv_heads, capacity, head_dim]");
  check_rank(kOp, "sums", sums, 3, "[batch, num_kv_heads, capacity]");
  check_rank(kOp, "logits", logits, 4, "[batch, num_q_heads, num_queries, capacity]");
  check_rank(kOp, "lse", lse, 3, "[batch, num_q_heads, num_queries]");
  const DType dtype = float_dtype(kOp, "out", out);
  check_same_dtype(kOp, "v", v, out, "out");
  check_dtype(kOp, "sums", sums, ScalarType::Float);
  check_dtype(kOp, "logits", logits, ScalarType::Float);
  check_dtype(kOp, "lse", lse, ScalarType::Float);
  check_same_device(kOp, "v", v, out, "out");
  check_same_device(kOp, "sums", sums, out, "out");
  check_same_device(kOp, "logits", logits, out, "out");
  check_same_device(kOp, "lse", lse, out, "out");
  const int64_t batch = out.size(0), num_q_heads = out.size(1), num_queries = out.size(2);
  const int64_t num_kv_heads = v.size(1), capacity = v.size(2), head_dim = out.size(3);
  require(v.size(0) == batch && v.size(3) == head_dim, kOp, "v",
          "of the batch (" + text(batch) + ") and head_dim (" + text(head_dim) + ") of out",
          shape_string(v));
  require(num_kv_heads >= 1, kOp, "num_kv_heads", "at least 1", text(num_kv_heads));
  require(num_q_heads >= 1 && num_q_heads % num_kv_heads == 0, kOp, "num_q_heads",
          "a multiple of num_kv_heads (" + text(num_kv_heads) + ")", text(num_q_heads));
  require(sums.size(0) == batch && sums.size(1) == num_kv_heads && sums.size(2) == capacity, kOp,
          "sums", "of the batch, heads and capacity of v " + shape_string(v), shape_string(sums));
  require(logits.size(0) == batch && logits.size(1) == num_q_heads &&
              logits.size(2) == num_queries && logits.size(3) == capacity,
          kOp, "logits",
          "of the batch, heads and queries of out " + shape_string(out) +
              " and the capacity of v (" + text(capacity) + ")",
          shape_string(logits));
  require(lse.size(0) == batch && lse.size(1) == num_q_heads && lse.size(2) == num_queries, kOp,
          "lse", "of the batch, heads and queries of out " + shape_string(out), shape_string(lse));
  check_contiguous("out", out);
  check_contiguous("logits", logits);
  check_contiguous("lse", lse);
  check_last_contiguous(kOp, "v", v);
  check_last_contiguous(kOp, "sums", sums);
  const bool overlaps =
      (batch > 1 && sums.stride(0) == 0) || (num_kv_heads > 1 && sums.stride(1) == 0);
  require(!overlaps, kOp, "sums", "free of overlaps", "a stride of 0");
  check_row_vector(kOp, "lengths", lengths, batch, out, "out");
  require(head_dim >= 1 && head_dim <= 256, kOp, "head_dim", "from 1 to 256", text(head_dim));
  require(num_q_heads / num_kv_heads * num_queries <= kTermsMaxRows, kOp, "out",
          "of at most 64 queries a kv head, num_queries times q_per_kv",
          text(num_q_heads / num_kv_heads * num_queries));
  require(decay >= 0 && decay <= 1, kOp, "decay", "from 0 to 1", std::to_string(decay));
  require(terms >= 1 && terms <= 7, kOp, "terms", "a sum of 1 (value), 2 (key) and 4 (cross)",
          text(terms));
  OutputTermsParams params{
      .sums = static_cast<float*>(sums.mutable_data_ptr()),
      .sums_batch_stride = sums.stride(0),
      .sums_head_stride = sums.stride(1),
      .out = out.const_data_ptr(),
      .v = v.const_data_ptr(),
      .v_batch_stride = v.stride(0),
      .v_head_stride = v.stride(1),
      .v_row_stride = v.stride(2),
      .logits = static_cast<const float*>(logits.const_data_ptr()),
      .lse = static_cast<const float*>(lse.const_data_ptr()),
      .batch = batch,
      .num_q_heads = num_q_heads,
      .num_kv_heads = num_kv_heads,
      .num_queries = num_queries,
      .capacity = capacity,
      .head_dim = head_dim,
      .decay = static_cast<float>(decay),
      .terms = static_cast<int32_t>(terms),
      .dtype = dtype,
  };
  if (lengths.has_value()) params.lengths = {optional_int32(lengths), 1, 0};
  if (batch * capacity * num_queries > 0) KVC_LAUNCH(output_terms, out, params);
}

KVC_REGISTER(output_terms_, output_terms)

}  // namespace
}  // namespace kvc
