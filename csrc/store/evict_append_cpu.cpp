#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "host/parallel.h"
#include "store/evict_append.h"

namespace kvc {
namespace {

// Who leaves a unit of `length` entries for the token at position `seen`; slots in `taken` stay.
int32_t pick_victim(const EvictAppendParams& p, int64_t b, int64_t u, int64_t length, int64_t seen,
                    const int32_t* taken, int64_t num_taken) {
  const int32_t* positions =
      p.positions + b * p.positions_batch_stride + u * p.positions_unit_stride;
  const int64_t heads = p.scores.heads / p.units;
  EvictKey best = evict_none();
  for (int64_t slot = 0; slot < length; ++slot) {
    if (std::find(taken, taken + num_taken, slot) != taken + num_taken) continue;
    uint32_t key = evict_ordered(positions[slot]);
    if (p.scores.data) {
      float score = *p.scores.at(b, u * heads, slot);
      for (int64_t h = 1; h < heads; ++h) score += *p.scores.at(b, u * heads + h, slot);
      key = topk_key(std::bit_cast<uint32_t>(score));
    }
    best = std::min(best, evict_key(evict_protected(p, positions[slot], seen), key, positions[slot],
                                    static_cast<uint32_t>(slot)));
  }
  return best < evict_none() ? static_cast<int32_t>(best.second & 0xffffffffu) : -1;
}

void write_entry(const EvictAppendParams& p, int64_t b, int64_t u, int64_t t, int32_t slot,
                 int64_t position) {
  const auto heads_of_unit = [&](int64_t heads, auto&& f) {
    for (int64_t h = u * (heads / p.units); h < (u + 1) * (heads / p.units); ++h) f(h);
  };
  for (int32_t i = 0; i < p.num_tensors; ++i) {
    heads_of_unit(p.rows[i].heads, [&](int64_t h) {
      std::memcpy(row_address(p.buffers[i], b, h, slot), row_address(p.rows[i], b, h, t),
                  p.rows[i].bytes);
    });
  }
  p.positions[b * p.positions_batch_stride + u * p.positions_unit_stride + slot] =
      static_cast<int32_t>(position);
  heads_of_unit(p.scores.heads, [&](int64_t h) { *p.scores.at(b, h, slot) = p.fresh; });
  heads_of_unit(p.history.heads, [&](int64_t h) {
    std::fill_n(p.history.at(b, h, slot), p.history.width, -std::numeric_limits<float>::infinity());
  });
}

void run_unit(const EvictAppendParams& p, int64_t b, int64_t u) {
  const int64_t before = std::clamp<int64_t>(*p.lengths.at(b, u), 0, p.capacity);
  const int64_t limit =
      p.limits.data ? std::min<int64_t>(*p.limits.at(b, u), p.capacity) : p.capacity;
  const int64_t seen = *p.seen.at(b, u);
  int32_t* slots = p.slots + (b * p.units + u) * p.n;
  int64_t length = before;
  for (int64_t t = 0; t < p.n; ++t) {
    slots[t] = length < limit ? static_cast<int32_t>(length++)
                              : pick_victim(p, b, u, before, seen + t, slots, t);
  }
  for (int64_t t = 0; t < p.n; ++t) {
    if (slots[t] >= 0) write_entry(p, b, u, t, slots[t], seen + t);
  }
  *p.lengths.at(b, u) = static_cast<int32_t>(length);
  *p.seen.at(b, u) = static_cast<int32_t>(seen + p.n);
}

}  // namespace

void evict_append_cpu(const EvictAppendParams& p) {
  // a scan of the entries: threads pay from some 16k entries on
  const int64_t grain = 1 + (1 << 14) / (p.capacity + 1);
  parallel_for(0, p.batch * p.units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_unit(p, i / p.units, i % p.units);
  });
}

}  // namespace kvc
