// topk of short rows: the keys of a row in the registers of one warp, or of one block.
#pragma once

#include <cuda_runtime.h>

#include "select/topk.h"

namespace kvc {

// Whether it beats the other forms, by sizes only.
bool topk_short_pays(const TopkParams& params);
void topk_short(const TopkParams& params, cudaStream_t stream);

}  // namespace kvc
