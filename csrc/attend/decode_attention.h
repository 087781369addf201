// decode_attention, ragged_decode_attention and their observed forms: attention of a few new tokens
// over what is stored.
//
//   x[r, j] = softmax_scale * <q[r], k[j]>,   lse[r] = log sum over visible j of exp(x[r, j]),
//   out[r] = sum over visible j of exp(x[r, j] - lse[r]) v[j]
//
// Rows: the q_per_kv query heads of a kv head times the num_queries new tokens are packed, r = head
// in group * num_queries + i, so that K and V are read once for all of them. Query i sees the slots
// [0, length - (num_queries - 1 - i)) of its store: the new tokens are already in it. Where nothing
// is visible lse is -inf and out 0.
//
// Dense and ragged stores differ in one thing: where the entries of (b, h) start and how many they
// are.
//
// Split: the entries of all stores, cut into tiles, form one line, and worker w owns the w-th equal
// part of it: a store of ten times the entries gets ten times the workers. What a worker makes of
// one store is a partial result: max and sum of every row in base 2, and the weighted sum of
// values, all float32; a second step adds up the partials of a store in the order of their workers.
// The parts depend on sizes and lengths alone, so every run gives the same bits.
//
// Observed: what a rule of eviction needs of the step, from its logits and the final lse:
//
//   P[g, i, j] = exp(x - lse), 0 where query i does not see j
//   sums[j] = decay^n sums[j] + weights[j] * sum over i of decay^(n-1-i) reduce over g of P[g, i,
//   j]^power history[j, (seen - n + i) mod width] = reduce over g of x[g, i, j], -inf where query i
//   does not see j
//
// for every entry j; decay 0 leaves the last query's term alone, whatever sums held.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/dtype.h"
#include "host/fast_divisor.h"
#include "host/unit_counts.h"

namespace kvc {

constexpr int64_t kAttendMaxHeadDim = 256;
constexpr int64_t kAttendMaxQueries = 8;
constexpr int64_t kAttendMaxWorkers = 512;
constexpr int64_t kStepKeys = 16;  // keys a warp takes at a time
constexpr int64_t kObservedMaxRows = 1024;

// How much of a store a worker holds at once. Tile: 16 keys a warp, as many warps as fill 32 KB of
// shared memory with K and V, at most 4. Slice: the packed rows that the registers of these warps
// hold; more rows than that are cut into slices, each of which reads K and V again.
struct AttendShape {
  int64_t padded_dim, warps, tile, max_slice;
};

constexpr AttendShape attend_shape(int64_t head_dim, bool is_float32) {
  const int64_t padded_dim = head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  const int64_t warp_bytes = kStepKeys * padded_dim * 2 * (is_float32 ? 4 : 2);
  const int64_t warps = std::min<int64_t>(4, 32768 / warp_bytes);
  return {padded_dim, warps, warps * kStepKeys, warps * (is_float32 ? 8 : 16)};
}

enum class GroupReduce : int32_t { kMean = 1, kMax = 2, kSum = 3 };  // codes as in window_scores

struct ObservedParams {
  float* sums;                                  // one a slot, or null
  int64_t sums_batch_stride, sums_head_stride;  // ragged: 0
  const float* weights;                         // one a slot of a store, or null: 1
  int64_t weights_batch_stride, weights_head_stride;
  float* history;  // history_width a slot, neighbours, or null
  int64_t history_batch_stride, history_head_stride, history_row_stride, history_width;
  UnitCounts<const int32_t> seen;
  bool sums_by_head, history_by_head;  // one for each query head, not each kv head
  float decay;
  int32_t power;  // 1 or 2
  GroupReduce reduce;

  constexpr bool any() const { return sums != nullptr || history != nullptr; }
};

// The parts of a line of tiles, each of one worker; workers without a tile do not exist. All parts
// are equal but for one tile. 32 bits: 2^31 tiles are more keys than any memory holds.
struct AttendParts {
  uint32_t workers = 0;
  uint32_t each = 0, longer = 0;  // tiles of a part, the first `longer` ones one more

  constexpr AttendParts(int64_t num_tiles, int64_t available) {
    const auto tiles = static_cast<uint32_t>(num_tiles), most = static_cast<uint32_t>(available);
    if (tiles == 0 || most == 0) return;
    workers = tiles < most ? tiles : most;
    each = tiles / workers;
    longer = tiles - each * workers;
  }
  constexpr uint32_t begin(uint32_t worker) const {
    return worker * each + (worker < longer ? worker : longer);
  }
  constexpr uint32_t owner(uint32_t tile) const {
    const uint32_t in_longer = longer * (each + 1);
    return tile < in_longer ? tile / (each + 1) : longer + (tile - in_longer) / each;
  }
};

// Better parts of the line, what does not depend on its tiles: at every border of rows (a row is
// one slice of query rows of one store) inside a part the warps of its worker meet and start anew.
// Where all rows have equally many tiles, parts divide rows or are made of whole ones, unless that
// leaves more than a tenth of the workers idle. Where rows are few and differ, every row is cut for
// itself, into parts of as many tiles as leave each part a worker. What does not depend on the
// tiles is known before the launch.
struct AttendPlan {
  uint32_t rows = 0, most = 0;                        // of the line; workers there are
  uint32_t pieces = 1, rows_a_part = 1, workers = 0;  // parts of a row or rows of a part
  bool is_even = false, has_spare = false;
  FastDivisor by_most, by_pieces;

  constexpr AttendPlan() = default;
  constexpr AttendPlan(int64_t num_rows, int64_t available)
      : rows(static_cast<uint32_t>(num_rows)), most(static_cast<uint32_t>(available)) {
    if (rows == 0 || most == 0) return;
    pieces = rows < most ? most / rows : 1;
    rows_a_part = (rows + most - 1) / most;
    workers = rows < most ? rows * pieces : (rows + rows_a_part - 1) / rows_a_part;
    is_even = 10 * workers >= 9 * most;
    by_most = FastDivisor(most);
    by_pieces = FastDivisor(pieces);
    has_spare = 4 * rows <= most;
  }
  // A row has one worker, if all rows have equally many tiles.
  constexpr bool keeps_rows_whole() const { return is_even && pieces == 1; }
};

struct DecodeAttentionParams {
  const void* q;  // [batch, num_q_heads, num_queries, head_dim], last dimension contiguous
  const void* k;  // dense: BHSD [batch, num_kv_heads, width, head_dim]; ragged: packed
  const void* v;  // [total, head_dim]
  const int64_t* row_start;  // ragged: [batch * num_kv_heads], first packed row; dense: null
  UnitCounts<const int32_t> lengths;  // of (b, kv head); null: width
  void* out;                          // [batch, num_q_heads, num_queries, head_dim] dense
  float* lse;                         // [batch, num_q_heads, num_queries]
  float* logits;                      // [batch, num_q_heads, num_queries, width], or null
  bool fill_logits;      // -inf where nothing is visible; else nothing is written there
  float* partial_out;    // [max_workers + num_rows()][slice][head_dim] scratch
  float* partial_stats;  // [max_workers + num_rows()][slice][2] scratch: max, sum
  int32_t* owners;  // CUDA: [num_rows()][2] scratch: which workers hold partials, see owners_of
  int64_t batch, num_q_heads, num_kv_heads, num_queries, head_dim;
  int64_t width;  // upper bound of the lengths
  int64_t total;  // ragged: packed rows of k and v
  int64_t max_workers;
  int64_t q_batch_stride, q_head_stride, q_row_stride;  // in elements
  int64_t k_batch_stride, k_head_stride, k_row_stride;  // ragged: the first two are 0
  int64_t v_batch_stride, v_head_stride, v_row_stride;
  float softmax_scale, scale_log2;  // scale_log2 = softmax_scale * log2(e)
  ObservedParams observed;
  float* observed_scratch;  // observed_floats(): logits in the order of `logits` or of step_logit
  float* step_logits;       // CUDA, the latter: in base 2, -inf where not visible
  DType dtype;

  // Filled by plan(): divisions cost a GPU up to a hundred instructions each, and what a worker
  // needs of them is the same for all.
  int32_t q_per_kv, rows, rows_a_slice, slices_a_store;
  FastDivisor by_heads, by_queries, by_slices;
  AttendPlan parts;  // CUDA, filled by the launcher that knows its workers

  void plan() {
    q_per_kv = static_cast<int32_t>(num_q_heads / num_kv_heads);
    rows = q_per_kv * static_cast<int32_t>(num_queries);
    rows_a_slice = std::min(rows, static_cast<int32_t>(shape().max_slice));
    slices_a_store = (rows + rows_a_slice - 1) / rows_a_slice;
    by_heads = FastDivisor(static_cast<uint32_t>(num_kv_heads));
    by_queries = FastDivisor(static_cast<uint32_t>(num_queries));
    by_slices = FastDivisor(static_cast<uint32_t>(slices_a_store));
  }

  constexpr AttendShape shape() const { return attend_shape(head_dim, dtype == DType::kFloat32); }
  constexpr int64_t num_stores() const { return batch * num_kv_heads; }
  constexpr int64_t packed_rows() const { return rows; }
  constexpr int64_t slice() const { return rows_a_slice; }
  constexpr int64_t slices() const { return slices_a_store; }
  constexpr int64_t num_rows() const { return num_stores() * slices(); }  // store by store
  constexpr uint32_t row_of_batch(int64_t store) const {
    return by_heads.quotient(static_cast<uint32_t>(store));
  }
  constexpr uint32_t kv_head(int64_t store) const {
    return static_cast<uint32_t>(store) - row_of_batch(store) * static_cast<uint32_t>(num_kv_heads);
  }

  constexpr int64_t observed_floats() const {
    const int64_t steps = (width + kStepKeys - 1) / kStepKeys;
    return num_stores() * ((rows + 1) / 2 * 2) * std::max(width, steps * kStepKeys);
  }

  constexpr int64_t length(int64_t store) const {
    if (lengths.data == nullptr) return width;
    const int64_t n = *lengths.at(row_of_batch(store), kv_head(store));
    return n < 0 ? 0 : n < width ? n : width;
  }
  // What the i-th new token sees of a store of `length` entries.
  constexpr int64_t visible(int64_t length, int64_t i) const {
    const int64_t n = length - (num_queries - 1 - i);
    return n < 0 ? 0 : n;
  }
  constexpr int64_t k_offset(int64_t store) const {
    return row_start ? row_start[store] * k_row_stride
                     : row_of_batch(store) * k_batch_stride + kv_head(store) * k_head_stride;
  }
  constexpr int64_t v_offset(int64_t store) const {
    return row_start ? row_start[store] * v_row_stride
                     : row_of_batch(store) * v_batch_stride + kv_head(store) * v_head_stride;
  }
  // Element 0 of packed row r of a store in q.
  constexpr int64_t q_offset(int64_t store, int64_t r) const {
    const uint32_t in_group = by_queries.quotient(static_cast<uint32_t>(r));
    const uint32_t i = static_cast<uint32_t>(r) - in_group * static_cast<uint32_t>(num_queries);
    return row_of_batch(store) * q_batch_stride +
           (kv_head(store) * static_cast<int64_t>(q_per_kv) + in_group) * q_head_stride +
           i * q_row_stride;
  }
  // Its number in out, lse and logits: store * packed_rows() + r, since heads of a group are
  // neighbours.
  constexpr int64_t out_row(int64_t store, int64_t r) const { return store * packed_rows() + r; }
};

// The scratch slot of a partial result. From one partial to the next along the line the worker or
// the row grows, so the sum names each but once.
constexpr int64_t attend_slot(int64_t worker, int64_t row) {
  return worker + row;
}

// Where step_logits hold packed row r of entry j of a store: 16 entries and two rows lie together,
// in the order in which the tensor cores leave them, so that a warp writes whole lines.
constexpr int64_t step_logit(const DecodeAttentionParams& p, int64_t store, int64_t j, int32_t r) {
  const int64_t step = store * ((p.width + kStepKeys - 1) / kStepKeys) + j / kStepKeys;
  return (step * ((p.rows + 1) / 2) + r / 2) * (2 * kStepKeys) + j % 8 * 4 + j % kStepKeys / 8 * 2 +
         r % 2;
}

// Where the observed numbers of a store begin: of slot 0, for query head g of the group where they
// are kept by head.
constexpr float* observed_sums(const DecodeAttentionParams& p, int64_t store, int64_t g) {
  const ObservedParams& o = p.observed;
  if (p.row_start) return o.sums + p.row_start[store];
  const int64_t h = p.kv_head(store);
  return o.sums + p.row_of_batch(store) * o.sums_batch_stride +
         (o.sums_by_head ? h * p.q_per_kv + g : h) * o.sums_head_stride;
}
constexpr const float* observed_weights(const DecodeAttentionParams& p, int64_t store) {
  const ObservedParams& o = p.observed;
  if (p.row_start) return o.weights + p.row_start[store];
  return o.weights + p.row_of_batch(store) * o.weights_batch_stride +
         p.kv_head(store) * o.weights_head_stride;
}
constexpr float* observed_history(const DecodeAttentionParams& p, int64_t store, int64_t g) {
  const ObservedParams& o = p.observed;
  if (p.row_start) return o.history + p.row_start[store] * o.history_row_stride;
  const int64_t h = p.kv_head(store);
  return o.history + p.row_of_batch(store) * o.history_batch_stride +
         (o.history_by_head ? h * p.q_per_kv + g : h) * o.history_head_stride;
}

void decode_attention_cpu(const DecodeAttentionParams& params);
void decode_attention_cuda(const DecodeAttentionParams& params, void* stream);

}  // namespace kvc
