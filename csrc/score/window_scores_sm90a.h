// The Hopper form of passes 1 and 2 of window_scores; pass 3 and the choice between the forms are
// in window_scores_cuda.cu.
#pragma once

#include "score/window_scores.h"

namespace kvc {

// Shapes, strides and reductions that the wgmma passes take. Whether they are worth it is policy.
bool window_scores_fits_sm90a(const WindowScoresParams& params);

// Whether pass 2 pools as well and writes params.out; else it writes votes, and pass 3 follows.
bool window_scores_pools_sm90a(const WindowScoresParams& params);

// Writes params.out or params.votes, [batch, num_kv_heads, vote_planes, seq_len] or one plane per
// query head.
void window_votes_sm90a(const WindowScoresParams& params, void* stream);

}  // namespace kvc
