// topk with one read of the scores, in clusters of 1, 2, 4 or 8 blocks a row.
#pragma once

#include <cuda_runtime.h>

#include "select/topk.h"

namespace kvc {

// Whether it beats two reads, by sizes only.
bool topk_once_pays(const TopkParams& params, int blocks);
void topk_once(const TopkParams& params, int blocks, cudaStream_t stream);

// Clusters of 1, 2, 4 or 8 blocks that run at once where each block fills a multiprocessor.
int lonely_clusters(int blocks);

}  // namespace kvc
