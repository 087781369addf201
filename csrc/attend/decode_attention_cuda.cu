// decode_attention on CUDA: two launches, the workers and the merge; one where every worker has
// whole stores and the host knows.
//
// The second launch is cheaper than its reputation. With both launched early (programmatic
// dependent launch) the merge's blocks are resident when the last worker ends, and the next call's
// workers when the merge ends. Measured on an H100 with real traffic and no arithmetic, 8 heads of
// 1024 entries: 5.5 us a call against 5.4 for a ticket and the last block merging, 5.0 for clusters
// of 8, 6.6 for a grid-wide barrier; at 8192 entries 14.7, 14.8, 14.7, 16.1. A ticket needs memory
// that is zero before the first launch, a cluster ends at 8 blocks a head, and neither spreads the
// statistics of a step over the machine.
#include "attend/decode_attention.h"
#include "attend/decode_kernels.cuh"
#include "device/limits.cuh"

namespace kvc {

void decode_attention_cuda(const DecodeAttentionParams& params, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  DecodeAttentionParams p = params;
  const bool is_few = decode_few_rows_fits(p);
  const bool is_many_sm90a =
      !is_few && device_limits().major == 9 && decode_many_rows_fits_sm90a(p);
  if (p.observed.any()) {
    (is_few || is_many_sm90a ? p.step_logits : p.logits) = p.observed_scratch;
  }
  const int64_t workers = is_few          ? decode_few_rows_cuda(p, on)
                          : is_many_sm90a ? decode_many_rows_sm90a_cuda(p, on)
                                          : decode_many_rows_cuda(p, on);
  if ((is_few || is_many_sm90a) && workers > 0 && p.lengths.data == nullptr && !p.observed.any() &&
      !p.fill_logits && AttendPlan(p.num_rows(), workers).keeps_rows_whole()) {
    return;  // the workers have written all that there is
  }
  decode_merge_cuda(p, workers, on);
}

}  // namespace kvc
