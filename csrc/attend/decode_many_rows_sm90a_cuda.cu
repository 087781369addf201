// Decode attention for many query rows of 16-bit elements on Hopper: several new tokens, or many
// query heads a kv head.
//
// Block = one worker of two warpgroups, which take the tiles of its part of the line in turn; the
// query rows of a slice are the M side, 64 of them. A warpgroup has a ring of its own, which one of
// its threads fills by TMA across the borders of stores: a stage is asked for again as soon as the
// output of its tile is there. While one warpgroup is at its softmax, the tensor cores work for the
// other; neither waits for the other until the row of the line ends.
//   rows x keys      A = Q in shared memory, B = K as it lies
//   rows x head_dim  A = P in the registers in which the first product has left it, B = V
//   transposed
// At the end of a row of the line the second warpgroup leaves its sums in the stage that it has
// just read, the first adds its own, and one partial result leaves for scratch, or the result
// itself where the worker has all tiles of the row. The query rows of the next row of the line are
// read meanwhile.
//
// Bound: K and V once; tensor cores are busy for a third of that time. No atomics: the same bits
// every run.
#include <algorithm>
#include <type_traits>

#include "attend/decode_attention.h"
#include "attend/decode_kernels.cuh"
#include "device/cache.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

namespace kvc {
namespace {

constexpr const char* kOp = "decode_attention";

template <typename T, int kDim_>
struct Many {
  using Element = T;
  static constexpr int kDim = kDim_;
  static constexpr AttendShape kShape = attend_shape(kDim, false);
  static constexpr int kRows = 64;  // of a product
  static constexpr int kKeys = static_cast<int>(kShape.tile);
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kSlabs = kDim / kSlabElements;
  static constexpr int kSlabBytes = kKeys * kSlabRowBytes;
  static constexpr int kHalfBytes = kSlabs * kSlabBytes;  // K or V of a stage
  static constexpr int kStageBytes = 2 * kHalfBytes;
  static constexpr int kStages = (64 << 10) / kStageBytes;  // of a warpgroup
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kQuerySlabBytes = kRows * kSlabRowBytes;
  static constexpr int kSharedBytes = 1024 + kWarpgroups * kRingBytes + kSlabs * kQuerySlabBytes;
  static constexpr int kPanel = std::min(kDim, 128);  // of head_dim, in a product with values
  static constexpr int kPanels = kDim / kPanel;
  // Three quarters of a multiprocessor's, so that a block of the merge may wait beside.
  static constexpr int kRegisters = kDim <= 128 ? 192 : 255;
  // Threads of a warpgroup that hold rows of a slice.
  static constexpr int kHolders = static_cast<int>(kShape.max_slice) * 2;
  // exp2 starts this far above 1, so that half precision does not lose small probabilities.
  static constexpr float kHeadroom = std::is_same_v<T, __half> ? 12.0f : 0.0f;
  static_assert(kShape.max_slice <= kRows && kShape.padded_dim == kDim && kHolders % kWarp == 0);
  static_assert(kHolders * kDim / 2 * sizeof(float) <= kStageBytes, "a stage holds sums");
};

// The tiles [first, end) of a row of the line that are the worker's, and where they lie.
struct Run {
  uint32_t store, slice, length, tiles;  // tiles of the row
  uint32_t first, end;
  uint32_t left;  // tiles in later rows
  int row, h, b;  // of the first entry, in the maps
};

// From tile `first` of the row on; the store is not empty.
template <typename X>
__device__ __forceinline__ void open_run(const DecodeAttentionParams& p, Run& run, uint32_t first) {
  run.length = length_of(p, run.store);
  run.tiles = (run.length + X::kKeys - 1) / X::kKeys;
  const uint32_t count = min(run.left, run.tiles - first);
  run.first = first;
  run.end = first + count;
  run.left -= count;
  run.row = run.h = run.b = 0;
  if (p.row_start != nullptr) {
    run.row = static_cast<int>(p.row_start[run.store]);
  } else {
    run.b = static_cast<int>(p.row_of_batch(run.store));
    run.h = static_cast<int>(p.kv_head(run.store));
  }
}
template <typename X>
__device__ __forceinline__ bool next_run(const DecodeAttentionParams& p, Run& run) {
  if (run.left == 0) return false;
  if (++run.slice == static_cast<uint32_t>(p.slices_a_store)) {
    run.slice = 0;
    do ++run.store;
    while (length_of(p, run.store) == 0);
  }
  open_run<X>(p, run, 0);
  return true;
}

// The stages of a warpgroup. K and V of a stage arrive for themselves.
template <typename X>
struct Ring {
  struct Barriers {
    Mbarrier keys[X::kStages], values[X::kStages];
  };
  unsigned char* stages;
  Barriers& in;

  __device__ __forceinline__ unsigned char* keys(uint32_t slot) const {
    return stages + slot * X::kStageBytes;
  }
  __device__ __forceinline__ unsigned char* values(uint32_t slot) const {
    return keys(slot) + X::kHalfBytes;
  }
};

// Around the ring.
template <typename X>
struct RingPlace {
  uint32_t slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot < X::kStages) return;
    slot = 0;
    parity ^= 1;
  }
};

// The one thread of a warpgroup that asks for its tiles, in their order.
template <typename X>
struct Asker {
  Run run;
  uint32_t tile, slot = 0;

  __device__ __forceinline__ Asker(const Run& run, uint32_t warpgroup)
      : run(run), tile(run.first + warpgroup) {}

  // The next tile, into the next stage, whose last reads are behind a barrier.
  __device__ __forceinline__ void ask(const DecodeAttentionParams& p, const Ring<X>& ring,
                                      const CUtensorMap* key_map, const CUtensorMap* value_map,
                                      uint32_t warpgroup) {
    while (tile >= run.end) {
      if (!next_run<X>(p, run)) return;
      tile = run.first + warpgroup;
    }
    const int row = run.row + static_cast<int>(tile) * X::kKeys;
    const auto load = [&](unsigned char* to, const CUtensorMap* map, Mbarrier* in) {
      mbarrier_expect_bytes(in, X::kHalfBytes);
#pragma unroll
      for (int slab = 0; slab < X::kSlabs; ++slab) {
        tma_load_rows(to + slab * X::kSlabBytes, map, in, slab * kSlabElements, row, run.h, run.b,
                      CacheHint::kNormal);
      }
    };
    load(ring.keys(slot), key_map, &ring.in.keys[slot]);
    load(ring.values(slot), value_map, &ring.in.values[slot]);
    tile += X::kWarpgroups;
    slot = slot + 1 == X::kStages ? 0 : slot + 1;
  }
};

// The query rows of a slice on their way to shared memory, where they lie as slabs. The order of
// the rows in a product is free: neighbours 2 i and 2 i + 1 of 16 are rows i and i + 8, so that one
// thread holds both.
template <typename X>
struct Queries {
  using T = typename X::Element;
  static constexpr int kUnits = X::kDim / 8;  // of a row, 16 bytes each
  static constexpr int kOwn = X::kRows * kUnits / X::kThreads;
  uint4 units[kOwn];

  __device__ __forceinline__ void load(const DecodeAttentionParams& p, const Run& run, int rows) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = i * X::kThreads + threadIdx.x, row = item / kUnits, d = item % kUnits * 8;
      units[i] = uint4{};
      if (row >= rows || d >= p.head_dim) continue;
      const int64_t at = p.q_offset(run.store, run.slice * p.rows_a_slice + row) + d;
      units[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) + at);
    }
  }
  __device__ __forceinline__ void store(unsigned char* queries) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = i * X::kThreads + threadIdx.x, row = item / kUnits, unit = item % kUnits;
      const int place = row / 16 * 16 + row % 2 * 8 + row % 16 / 2;
      *reinterpret_cast<uint4*>(queries + unit / 8 * X::kQuerySlabBytes +
                                swizzled(place, unit % 8)) = units[i];
    }
  }
};

// The running softmax of the query rows of a slice over the tiles of a warpgroup. A thread holds
// two rows, 16 (warp % 4) + 2 (lane / 4) and the next.
template <typename X>
struct Softmax {
  using T = typename X::Element;
  static constexpr int kSteps = X::kDim / 16, kKeySteps = X::kKeys / 16;
  float out[X::kPanels][X::kPanel / 2];
  float most[2], sum[2];
  uint32_t behind[2];  // new tokens behind the row's own, which it does not see

  static __device__ __forceinline__ int row(int half) {
    return threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4 * 2 + half;
  }

  // Four elements: of both rows the columns 8 i + 2 (lane % 4) and the next.
  __device__ __forceinline__ float* piece(int i) {
    constexpr int kPieces = X::kPanel / 8;
    return out[i / kPieces] + i % kPieces * 4;
  }

  __device__ __forceinline__ void start(const DecodeAttentionParams& p, const Run& run) {
    const auto queries = static_cast<uint32_t>(p.num_queries);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t r = run.slice * p.rows_a_slice + row(half);
      behind[half] = queries - 1 - (r - p.by_queries.quotient(r) * queries);
      most[half] = -INFINITY;
      sum[half] = 0;
    }
#pragma unroll
    for (int i = 0; i < X::kDim / 2; ++i) out[i / (X::kPanel / 2)][i % (X::kPanel / 2)] = 0;
  }

  // x = Q K^T: x[4 i + 2 half + j] is key 8 i + 2 (lane % 4) + j.
  __device__ __forceinline__ void logits(float (&x)[X::kKeys / 2], uint64_t queries,
                                         uint64_t keys) const {
    hold(x);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int slab = step / 4, within = step % 4;
      Wgmma<T, X::kKeys>::ss(x, queries + (slab * X::kQuerySlabBytes >> 4) + within * kWgmmaStep,
                             keys + (slab * X::kSlabBytes >> 4) + within * kWgmmaStep, step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(x);
  }

  // -inf where a row does not see a key; `first` is the tile's.
  __device__ __forceinline__ void hide(float (&x)[X::kKeys / 2], uint32_t first,
                                       uint32_t length) const {
#pragma unroll
    for (int i = 0; i < X::kKeys / 2; ++i) {
      const uint32_t key = first + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (key + behind[i / 2 % 2] >= length) x[i] = -INFINITY;
    }
  }

  __device__ __forceinline__ void return_logits(const DecodeAttentionParams& p,
                                                const float (&x)[X::kKeys / 2], const Run& run,
                                                uint32_t first, int rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row(half) >= rows) continue;
      float* to = p.logits +
                  p.out_row(run.store, run.slice * p.rows_a_slice + row(half)) * p.width + first +
                  threadIdx.x % 4 * 2;
      const uint32_t seen =
          run.length - min(run.length, first + behind[half] + threadIdx.x % 4 * 2);
#pragma unroll
      for (uint32_t i = 0; i < X::kKeys / 4; ++i) {
        const uint32_t key = i / 2 * 8 + i % 2;
        if (key < seen) to[key] = x[i / 2 * 4 + half * 2 + i % 2] * p.softmax_scale;
      }
    }
  }

  // Logits in base 2 for the merge to look at, in the order of step_logit.
  __device__ __forceinline__ void leave_logits(const DecodeAttentionParams& p,
                                               const float (&x)[X::kKeys / 2], const Run& run,
                                               uint32_t tile, int rows) const {
    constexpr uint32_t kSteps = X::kKeys / kStepKeys;  // of a tile
    if (row(0) >= rows) return;
    const uint32_t steps = (static_cast<uint32_t>(p.width) + kStepKeys - 1) / kStepKeys;
    const uint32_t pairs = (p.rows + 1) / 2, pair = (run.slice * p.rows_a_slice + row(0)) / 2;
    float4* to = reinterpret_cast<float4*>(p.step_logits) + threadIdx.x % 4 * 2 +
                 (static_cast<uint64_t>(run.store * steps + tile * kSteps) * pairs + pair) * 8;
    const float scale = p.scale_log2;
#pragma unroll
    for (uint32_t i = 0; i < kSteps * 2; ++i) {
      const uint32_t step = i / 2, at = step * 8 + i % 2;
      if (tile * X::kKeys + step * kStepKeys >= run.length) return;
      store_kept(to + step * pairs * 8 + i % 2, make_float4(x[at] * scale, x[at + 2] * scale,
                                                            x[at + 4] * scale, x[at + 6] * scale));
    }
  }

  // Logits become exp2(x - max + headroom), and the sums of before shrink to the new max.
  __device__ __forceinline__ void exponentials(float (&x)[X::kKeys / 2], float scale) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < X::kKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], x[i]);
    bool is_grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int offset = 1; offset <= 2; offset *= 2) {
        top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], offset));
      }
      top[half] = fmaxf(most[half], top[half] * scale);
      is_grown |= top[half] > most[half];
    }
    if (__any_sync(0xffffffffu, is_grown)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = decay(most[half], top[half]);
        most[half] = top[half];
        sum[half] *= factor;
#pragma unroll
        for (int i = 0; i < X::kDim / 4; ++i) piece(i / 2)[half * 2 + i % 2] *= factor;
      }
    }
    float shift[2], more[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shift[half] = most[half] == -INFINITY ? 0.0f : most[half] - X::kHeadroom;
    }
#pragma unroll
    for (int i = 0; i < X::kKeys / 2; ++i) {
      x[i] = exp2_approx(fmaf(x[i], scale, -shift[i / 2 % 2]));
      more[i / 2 % 2] += x[i];
    }
    sum[0] += more[0];
    sum[1] += more[1];
  }

  // out += P V. P enters as the sum of two numbers of T: rounding to one would cost half the
  // accuracy of the result, and the tensor cores wait for memory anyway.
  __device__ __forceinline__ void add_values(const float (&x)[X::kKeys / 2], uint64_t values) {
    uint32_t high[kKeySteps][4], low[kKeySteps][4];
#pragma unroll
    for (int i = 0; i < X::kKeys / 4; ++i) {
      const SplitPair pair = split<T>(x[2 * i], x[2 * i + 1]);
      high[i / 4][i % 4] = pair.high;
      low[i / 4][i % 4] = pair.low;
    }
#pragma unroll
    for (int panel = 0; panel < X::kPanels; ++panel) hold(out[panel]);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < X::kPanels; ++panel) {
#pragma unroll
      for (int step = 0; step < kKeySteps; ++step) {
        const uint64_t at = values + panel * (X::kPanel / kSlabElements * X::kSlabBytes >> 4) +
                            step * kWgmmaTransposedStep;
        Wgmma<T, X::kPanel>::template rs<true>(out[panel], high[step], at, true);
        Wgmma<T, X::kPanel>::template rs<true>(out[panel], low[step], at, true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int panel = 0; panel < X::kPanels; ++panel) hold(out[panel]);
  }

  // What the lanes of a row have added apart.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int offset = 1; offset <= 2; offset *= 2) {
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], offset);
      }
      most[half] -= X::kHeadroom;
    }
  }
};

// Rows behind the entries hold anything, NaN too, which no probability of zero hides. A warpgroup.
template <typename X>
__device__ __forceinline__ void clear_values(unsigned char* values, uint32_t entries,
                                             int warpgroup) {
  for (uint32_t i = entries * 8 + threadIdx.x % kWarpgroup; i < X::kKeys * 8; i += kWarpgroup) {
#pragma unroll
    for (int slab = 0; slab < X::kSlabs; ++slab) {
      *reinterpret_cast<uint4*>(values + slab * X::kSlabBytes + i * 16) = uint4{};
    }
  }
  async_proxy_fence();
  partial_sync(1 + warpgroup, kWarpgroup);
}

template <typename X>
struct Shared {
  typename Ring<X>::Barriers in[X::kWarpgroups];
  Mbarrier left, taken;    // the sums of the second warpgroup:
  float2 stats[X::kRows];  // max and sum
  uint32_t slot;           // where its weighted values lie
};

// What the second warpgroup has left in its ring.
template <typename X>
__device__ __forceinline__ float4* sums_at(unsigned char* rings, uint32_t slot) {
  return reinterpret_cast<float4*>(rings + X::kRingBytes + slot * X::kStageBytes);
}

// The second warpgroup: its sums, in the order of its threads, into the stage that it read last.
template <typename X>
__device__ __forceinline__ void leave_sums(Softmax<X>& softmax, Shared<X>& shared,
                                           unsigned char* rings, uint32_t slot) {
  const int thread = threadIdx.x % kWarpgroup;
  if (thread >= X::kHolders) return;
  float4* sums = sums_at<X>(rings, slot);
#pragma unroll
  for (int i = 0; i < X::kDim / 8; ++i) {
    const float* out = softmax.piece(i);
    sums[i * X::kHolders + thread] = make_float4(out[0], out[1], out[2], out[3]);
  }
  if (thread == 0) shared.slot = slot;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (thread % 4 != 0) continue;
    shared.stats[softmax.row(half)] = make_float2(softmax.most[half], softmax.sum[half]);
  }
}

// The first warpgroup: adds them to its own.
template <typename X>
__device__ __forceinline__ void add_sums(Softmax<X>& softmax, const Shared<X>& shared,
                                         unsigned char* rings) {
  const int thread = threadIdx.x % kWarpgroup;
  if (thread >= X::kHolders) return;
  const float4* sums = sums_at<X>(rings, shared.slot);
  float factor[2], other_factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 other = shared.stats[softmax.row(half)];
    const float highest = fmaxf(softmax.most[half], other.x);
    factor[half] = decay(softmax.most[half], highest);
    other_factor[half] = decay(other.x, highest);
    softmax.most[half] = highest;
    softmax.sum[half] = softmax.sum[half] * factor[half] + other.y * other_factor[half];
  }
#pragma unroll
  for (int i = 0; i < X::kDim / 8; ++i) {
    const float4 other = sums[i * X::kHolders + thread];
    float* out = softmax.piece(i);
    out[0] = out[0] * factor[0] + other.x * other_factor[0];
    out[1] = out[1] * factor[0] + other.y * other_factor[0];
    out[2] = out[2] * factor[1] + other.z * other_factor[1];
    out[3] = out[3] * factor[1] + other.w * other_factor[1];
  }
}

// The first warpgroup: the partial result of a run, or the result where it has the whole row.
template <typename X>
__device__ __forceinline__ void write_run(const DecodeAttentionParams& p, Softmax<X>& softmax,
                                          const Run& run, int rows) {
  using T = typename X::Element;
  const bool is_whole = run.first == 0 && run.end == run.tiles;
  const uint32_t row = run.store * p.slices_a_store + run.slice;
  const int64_t partial = attend_slot(blockIdx.x, row) * p.slice();
  const int64_t out_row = p.out_row(run.store, run.slice * p.rows_a_slice);
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = softmax.row(half);
    if (r >= rows) continue;
    const float highest = softmax.most[half], sum = softmax.sum[half];
    if (is_whole) {
      T* to = static_cast<T*>(p.out) + (out_row + r) * p.head_dim + column;
      const float factor = normalised(1.0f, sum);
#pragma unroll
      for (int i = 0; i < X::kDim / 8; ++i) {
        if (i * 8 >= p.head_dim) break;
        const float* x = softmax.piece(i) + 2 * half;
        *reinterpret_cast<uint32_t*>(to + i * 8) = pack<T>(x[0] * factor, x[1] * factor);
      }
    } else {
      float* to = p.partial_out + (partial + r) * p.head_dim + column;
#pragma unroll
      for (int i = 0; i < X::kDim / 8; ++i) {
        if (i * 8 >= p.head_dim) break;
        const float* x = softmax.piece(i) + 2 * half;
        *reinterpret_cast<float2*>(to + i * 8) = make_float2(x[0], x[1]);
      }
    }
    if (column != 0) continue;
    if (is_whole) p.lse[out_row + r] = natural_lse(highest, sum);
    reinterpret_cast<float2*>(p.partial_stats)[partial + r] = make_float2(highest, sum);
  }
  if (threadIdx.x == 0) leave_owner(p, row, run.first, run.end, run.tiles, is_whole);
}

template <typename X>
__global__ void __maxnreg__(X::kRegisters)
    decode_many_rows_sm90a_kernel(const __grid_constant__ DecodeAttentionParams p,
                                  const __grid_constant__ CUtensorMap key_map,
                                  const __grid_constant__ CUtensorMap value_map) {
  extern __shared__ unsigned char raw[];
  __shared__ Shared<X> shared;
  unsigned char* memory = raw + (-__cvta_generic_to_shared(raw) & 1023);
  unsigned char* query_slabs = memory + X::kWarpgroups * X::kRingBytes;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const bool asks = threadIdx.x % kWarpgroup == 0;
  const Ring<X> ring{memory + warpgroup * X::kRingBytes, shared.in[warpgroup]};

  // What depends on parameters alone is done while the launch before ends.
  fetch_params(p);
  if (asks) {
    tma_prefetch_map(&key_map);
    tma_prefetch_map(&value_map);
    for (int i = 0; i < X::kStages; ++i) {
      mbarrier_init(&ring.in.keys[i], 1);
      mbarrier_init(&ring.in.values[i], 1);
    }
    if (warpgroup == 0) {
      mbarrier_init(&shared.left, kWarpgroup);
      mbarrier_init(&shared.taken, kWarpgroup);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (p.lengths.data != nullptr) launch_wait();
  PartStart part;
  if (!find_part<X::kKeys, X::kWarpgroups>(p, part)) return;
  Run run{.store = part.store, .slice = 0, .left = part.count};
  const uint32_t tiles = tiles_of<X::kKeys>(p, run.store);
  for (; part.at >= tiles; part.at -= tiles) ++run.slice;
  open_run<X>(p, run, part.at);
  if (p.lengths.data == nullptr) launch_wait();
  launch_dependents();

  Asker<X> asker(run, warpgroup);
  const auto ask = [&] {
    if (asks) asker.ask(p, ring, &key_map, &value_map, warpgroup);
  };
#pragma unroll 1
  for (int i = 0; i < X::kStages; ++i) ask();
  RingPlace<X> place;
  uint32_t joints = 0;  // runs of both warpgroups
  const auto rows_of = [&](const Run& run) {
    return min(p.rows_a_slice, p.rows - static_cast<int>(run.slice) * p.rows_a_slice);
  };
  Queries<X> queries;
  queries.load(p, run, rows_of(run));
  queries.store(query_slabs);
  async_proxy_fence();
  __syncthreads();  // the queries are there
  while (true) {
    const int rows = rows_of(run);
    Softmax<X> softmax;
    softmax.start(p, run);
    uint32_t slot = 0;
    for (uint32_t tile = run.first + warpgroup; tile < run.end; tile += X::kWarpgroups) {
      const uint32_t first = tile * X::kKeys;
      slot = place.slot;
      float x[X::kKeys / 2];
      mbarrier_wait(&ring.in.keys[slot], place.parity);
      softmax.logits(x, wgmma_slab_at(shared_address(query_slabs)),
                     wgmma_slab_at(shared_address(ring.keys(slot))));
      if (p.logits != nullptr) softmax.return_logits(p, x, run, first, rows);
      if (first + X::kKeys + static_cast<uint32_t>(p.num_queries) - 1 > run.length) {
        softmax.hide(x, first, run.length);
      }
      if (p.step_logits != nullptr) softmax.leave_logits(p, x, run, tile, rows);
      softmax.exponentials(x, p.scale_log2);
      unsigned char* values = ring.values(slot);
      mbarrier_wait(&ring.in.values[slot], place.parity);
      if (first + X::kKeys > run.length) {
        clear_values<X>(values, run.length - first, warpgroup);
      }
      softmax.add_values(x, wgmma_transposed_at(shared_address(values), X::kSlabBytes));
      place.advance();
      if (tile + X::kWarpgroups < run.end) {
        partial_sync(1 + warpgroup, kWarpgroup);  // the stage is read
        ask();
      }
    }
    const Run done = run;
    const bool has_next = next_run<X>(p, run), is_joint = done.end - done.first > 1;
    if (has_next) queries.load(p, run, rows_of(run));
    softmax.finish();
    __syncthreads();  // queries and stages are read
    if (has_next) queries.store(query_slabs);
    async_proxy_fence();
    if (is_joint && warpgroup == 1) {
      leave_sums(softmax, shared, memory, slot);
      mbarrier_arrive(&shared.left);
      mbarrier_wait(&shared.taken, joints % 2);
    } else if (is_joint) {
      mbarrier_wait(&shared.left, joints % 2);
      add_sums(softmax, shared, memory);
      async_proxy_fence();
      mbarrier_arrive(&shared.taken);
    }
    joints += is_joint;
    __syncthreads();  // the next queries are there
    if (has_next && done.first + warpgroup < done.end) ask();
    if (warpgroup == 0) write_run(p, softmax, done, rows);
    if (!has_next) return;
  }
}

template <typename X>
int64_t launch(DecodeAttentionParams p, cudaStream_t stream) {
  const int64_t workers = std::min<int64_t>(p.max_workers, device_limits().multiprocessors);
  if (workers == 0) return 0;
  p.parts = AttendPlan(p.num_rows(), workers);
  const auto map = [&](const void* data, int64_t row_stride, int64_t head_stride,
                       int64_t batch_stride) {
    const bool is_ragged = p.row_start != nullptr;
    return row_map(
        kOp, p.dtype, data, p.head_dim,
        {is_ragged ? p.total : p.width, is_ragged ? 1 : p.num_kv_heads, is_ragged ? 1 : p.batch},
        {row_stride, head_stride, batch_stride}, X::kKeys);
  };
  Launch(static_cast<unsigned>(workers), X::kThreads, X::kSharedBytes, stream)
      .early(true)(kOp, decode_many_rows_sm90a_kernel<X>, p,
                   map(p.k, p.k_row_stride, p.k_head_stride, p.k_batch_stride),
                   map(p.v, p.v_row_stride, p.v_head_stride, p.v_batch_stride));
  return workers;
}

template <typename T>
int64_t launch_size(const DecodeAttentionParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch<Many<T, 64>>(p, stream);
  return p.head_dim <= 128 ? launch<Many<T, 128>>(p, stream) : launch<Many<T, 256>>(p, stream);
}

}  // namespace

// Up to 8 rows the other form is as fast, and 1 us ahead where stores are short.
bool decode_many_rows_fits_sm90a(const DecodeAttentionParams& p) {
  const bool is_ragged = p.row_start != nullptr;
  const auto takes = [&](const void* data, int64_t row_stride, int64_t head_stride,
                         int64_t batch_stride) {
    if (is_ragged) return tma_takes<1>(data, {p.total}, {row_stride});
    return tma_takes<3>(data, {p.width, p.num_kv_heads, p.batch},
                        {row_stride, head_stride, batch_stride});
  };
  const int64_t q_strides = p.q_batch_stride | p.q_head_stride | p.q_row_stride;
  return p.dtype != DType::kFloat32 && p.rows > 8 && reinterpret_cast<uintptr_t>(p.q) % 16 == 0 &&
         q_strides % 8 == 0 && takes(p.k, p.k_row_stride, p.k_head_stride, p.k_batch_stride) &&
         takes(p.v, p.v_row_stride, p.v_head_stride, p.v_batch_stride);
}

int64_t decode_many_rows_sm90a_cuda(const DecodeAttentionParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) return launch_size<__half>(p, stream);
  return launch_size<__nv_bfloat16>(p, stream);
}

}  // namespace kvc
