// cosine_importance: how little a block turns the residual stream.
//
//   out[b] = mean over real tokens s of <h, a> / (max(|h|, eps) max(|a|, eps)),   eps = 1e-8
//
// h = before[b, s], a = after[b, s], or h + after[b, s] rounded to the dtype, as the model's own
// residual add rounds it, when is_update. Sums are float32. Token cosines are added in tiles of
// kCosineTile, the tiles of a row in kCosineLanes strided sums and these by pairs, so that CPU and
// CUDA add in the same order and every run gives the same bits.
#pragma once

#include <cstdint>

#include "host/dtype.h"

namespace kvc {

constexpr int64_t kCosineTile = 16;   // tokens of one block: few, so that 8k tokens fill a GPU
constexpr int64_t kCosineLanes = 32;  // strided sums over the tiles of a row
constexpr float kCosineEps = 1e-8f;

struct CosineImportanceParams {
  const void* before;        // [batch, seq_len, hidden], last dimension contiguous
  const void* after;         // same
  const int32_t* seq_start;  // [batch] first real token, or null
  float* partial;            // [batch, num_tiles] scratch
  float* out;                // [batch]
  int64_t batch, seq_len, hidden, num_tiles;
  int64_t before_batch_stride, before_seq_stride;  // in elements
  int64_t after_batch_stride, after_seq_stride;
  DType dtype;
  bool is_update;
};

void cosine_importance_cpu(const CosineImportanceParams& params);
void cosine_importance_cuda(const CosineImportanceParams& params, void* stream);

}  // namespace kvc
