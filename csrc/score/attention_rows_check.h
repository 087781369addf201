// The torch side of AttentionRows: checks and scratch that its ops share.
#pragma once

#include <string>

#include "common/check.h"
#include "score/attention_rows.h"

namespace kvc {

// An optional float32 companion [d0, d1, d2] of q or k.
void check_companion(const char* op, const char* name, const std::optional<Tensor>& t,
                     const std::string& layout, int64_t d0, int64_t d1, int64_t d2,
                     const Tensor& q);

// Checks all of these and fills all but row_weights, positions and row_stats.
AttentionRows checked_rows(const char* op, const Tensor& q, const Tensor& k,
                           const std::optional<Tensor>& lse, const std::optional<Tensor>& seq_start,
                           int64_t first_query, double softmax_scale);

// Decides max_chunks, allocates row_stats and sets it in `rows`. Keep the tensor while they are
// used.
Tensor new_row_stats(AttentionRows& rows, const Tensor& q);

}  // namespace kvc
