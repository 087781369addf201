// topk of a few long rows, each shared by more blocks than a cluster has, or by as many where there
// are no clusters: two launches, a slice a block in both.
#pragma once

#include <cuda_runtime.h>

#include "select/topk.h"

namespace kvc {

// Bytes of params.scratch, on the current device; 0: too much competes, or too many rows do.
int64_t topk_split_scratch(const TopkParams& params);
void topk_split(const TopkParams& params, cudaStream_t stream);

}  // namespace kvc
