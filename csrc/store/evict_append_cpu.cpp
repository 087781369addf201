#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "host/dispatch.h"
#include "host/parallel.h"
#include "store/evict_append.h"

namespace kvc {
namespace {

// A unit before the call.
struct Unit {
  int64_t b, u, base;
  int32_t* positions;
  int64_t held, limit, seen;

  Unit(const EvictAppendParams& p, int64_t index)
      : b(index / p.units), u(index % p.units), base(p.base(b, u)) {
    positions = p.positions + b * p.positions_batch_stride + u * p.positions_unit_stride + base;
    held = std::clamp<int64_t>(*p.lengths.at(b, u), 0, p.capacity);
    limit = p.limits.data ? std::min<int64_t>(*p.limits.at(b, u), p.capacity) : p.capacity;
    seen = *p.seen.at(b, u);
  }
  // f(h) for its heads, `each` of them.
  template <typename F>
  void for_heads(int64_t each, F&& f) const {
    for (int64_t h = u * each; h < (u + 1) * each; ++h) f(h);
  }
};

void rank_by_history(const EvictAppendParams& p, const Unit& unit) {
  bool adds = false;
  unit.for_heads(p.history.heads_a_unit, [&](int64_t h) {
    history_ranks_cpu(p.history_of(unit.b, unit.u, h, unit.seen), unit.held,
                      p.ranks_of(unit.b, unit.u), adds);
    adds = true;
  });
}

// Who leaves for the token at position `seen`; slots in `taken` stay.
int32_t pick_victim(const EvictAppendParams& p, const Unit& unit, int64_t seen,
                    const int32_t* taken, int64_t num_taken) {
  const int64_t heads = p.scores.heads_a_unit;
  EvictKey best = evict_none();
  for (int64_t slot = 0; slot < unit.held; ++slot) {
    if (std::find(taken, taken + num_taken, slot) != taken + num_taken) continue;
    const int32_t position = unit.positions[slot];
    uint32_t key = evict_ordered(position);
    if (p.ranks != nullptr) {
      key = topk_key(std::bit_cast<uint32_t>(p.ranks_of(unit.b, unit.u)[slot]));
    } else if (p.scores.data) {
      float score = *p.scores.at(unit.b, unit.u * heads, unit.base + slot);
      for (int64_t h = 1; h < heads; ++h) {
        score += *p.scores.at(unit.b, unit.u * heads + h, unit.base + slot);
      }
      key = topk_key(std::bit_cast<uint32_t>(score));
    }
    best = std::min(best, evict_key(evict_protected(p, position, seen), key, position,
                                    static_cast<uint32_t>(slot)));
  }
  return best < evict_none() ? static_cast<int32_t>(best.second & 0xffffffffu) : -1;
}

void write_entry(const EvictAppendParams& p, const Unit& unit, int64_t t, int32_t slot) {
  const int64_t b = unit.b, at = unit.base + slot;
  for (int32_t i = 0; i < p.num_tensors; ++i) {
    unit.for_heads(p.heads_a_unit[i], [&](int64_t h) {
      std::memcpy(row_address(p.buffers[i], b, h, at), row_address(p.rows[i], b, h, t),
                  p.rows[i].bytes);
    });
  }
  unit.positions[slot] = static_cast<int32_t>(unit.seen + t);
  unit.for_heads(p.scores.heads_a_unit, [&](int64_t h) { *p.scores.at(b, h, at) = p.fresh; });
  unit.for_heads(p.history.heads_a_unit, [&](int64_t h) {
    std::fill_n(p.history.at(b, h, at), p.history.width, -std::numeric_limits<float>::infinity());
  });
}

template <typename T>
void rotate_sinks(const EvictAppendParams& p, const Unit& unit, int64_t shift) {
  for (int64_t i = 0; i < p.half; ++i) {
    const double angle = static_cast<double>(shift) * static_cast<double>(p.inv_freq[i]);
    const float cos = static_cast<float>(std::cos(angle)),
                sin = static_cast<float>(std::sin(angle));
    unit.for_heads(p.sinks_a_unit, [&](int64_t h) {
      for (int64_t slot = 0; slot < p.num_sinks; ++slot) {
        const T* from = reinterpret_cast<const T*>(row_address(p.sinks, unit.b, h, slot));
        T* to = reinterpret_cast<T*>(row_address(p.buffers[0], unit.b, h, unit.base + slot));
        const float x = to_float(from[i]), y = to_float(from[p.half + i]);
        to[i] = from_float<T>(x * cos - y * sin);
        to[p.half + i] = from_float<T>(y * cos + x * sin);
      }
    });
  }
}

void run_unit(const EvictAppendParams& p, int64_t index) {
  const Unit unit(p, index);
  int32_t* slots = p.slots + index * p.n;
  int64_t length = unit.held;
  if (p.ranks != nullptr && length + p.n > unit.limit) rank_by_history(p, unit);
  for (int64_t t = 0; t < p.n; ++t) {
    slots[t] = length < unit.limit ? static_cast<int32_t>(length++)
                                   : pick_victim(p, unit, unit.seen + t, slots, t);
  }
  for (int64_t t = 0; t < p.n; ++t) {
    if (slots[t] >= 0) write_entry(p, unit, t, slots[t]);
  }
  *p.lengths.at(unit.b, unit.u) = static_cast<int32_t>(length);
  *p.seen.at(unit.b, unit.u) = static_cast<int32_t>(unit.seen + p.n);
  if (p.sinks.data == nullptr) return;
  visit_float(p.sink_dtype, "evict_append_",
              [&](auto tag) { rotate_sinks<decltype(tag)>(p, unit, unit.seen + p.n - length); });
}

}  // namespace

void evict_append_cpu(const EvictAppendParams& p) {
  // a scan of the entries: threads pay from some 16k entries on
  const int64_t width = p.ranks != nullptr ? p.history.width : 1;
  const int64_t grain = 1 + (1 << 14) / (p.capacity * width + 1);
  parallel_for(0, p.batch * p.units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_unit(p, i);
  });
}

}  // namespace kvc
