// topk where a few long rows meet a device without clusters: two launches, a slice a block in both.
#pragma once

#include <cuda_runtime.h>

#include "select/topk.h"

namespace kvc {

// Bytes of params.scratch, on the current device; 0: not the form for these sizes.
int64_t topk_split_scratch(const TopkParams& params);
void topk_split(const TopkParams& params, cudaStream_t stream);

}  // namespace kvc
