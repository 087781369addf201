// What evict_append_ and its ragged form check and allocate alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "common/check.h"
#include "store/evict_append.h"

namespace kvc {

// The numbers of a call; `capacity` is what that argument is called. fuse is 0, or a HistoryFuse
// + 1.
inline void check_eviction(const char* op, const EvictAppendParams& p, const char* capacity,
                           int64_t fuse, bool has_scores, const std::optional<Tensor>& history) {
  const std::string most = std::string(capacity) + " (" + text(p.capacity) + ")";
  require(p.n >= 1 && p.n <= std::min(kEvictMaxNew, p.capacity), op, "n",
          "from 1 to 8 and at most the " + most, text(p.n));
  require(p.sink >= 0, op, "sink", "at least 0", text(p.sink));
  require(p.window >= 0, op, "window", "at least 0", text(p.window));
  require(
      p.sink + p.window < p.capacity, op, "window",
      std::string("below the ") + capacity + " less the sink (" + text(p.capacity - p.sink) + ")",
      text(p.window));
  require(fuse >= 0 && fuse <= 2, op, "fuse", "0 (none), 1 (sum) or 2 (max)", text(fuse));
  if (fuse == 0) return;
  require(history.has_value(), op, "history", "there with fuse", "none");
  require(!has_scores, op, "scores", "absent with fuse", "scores");
  const int64_t width = history->size(history->dim() - 1);
  require(width >= 1 && width <= kHistoryMaxWidth, op, "history",
          "of a width from 1 to 1024 with fuse", text(width));
}

// Where ranks by history go; whoever calls keeps the tensor until the launch.
inline Tensor rank_scratch(EvictAppendParams& p, int64_t fuse, const Tensor& like) {
  if (fuse == 0) return Tensor();
  p.fuse = static_cast<HistoryFuse>(fuse - 1);
  Tensor ranks = torch::stable::new_empty(like, {p.batch, p.units, p.capacity}, ScalarType::Float);
  p.ranks = ranks.mutable_data_ptr<float>();
  return ranks;
}

}  // namespace kvc
