// window_scores on Hopper: passes 1 and 2 with wgmma, keys by TMA through a ring of stages; pass 2
// pools and fills as well wherever a row group's votes are all there is to a score.
//
// The query heads of a kv head are cut into row groups of at most 256 rows (128 where head_dim is
// above 128), whole heads, each window padded to a multiple of 8: r = head in group * padded window
// + i. A block owns a row group and a run of its keys. One extra warp asks for them: where memory
// is the bound, the thread that asks waits.
//   pass 1  rows on the M side: a warpgroup owns 64 rows, all read the same keys. A thread sums
//           exp2(x - reference) over its share of the columns. The reference is the first maximum
//           it met: a float carries sums of 2^64 as exactly as sums of 1, so it moves only on
//           overflow, and the loop computes no maxima.
//   pass 2  keys on the M side: a warpgroup owns 64 keys, and multiplies them with all rows of the
//           group, which stay in shared memory. P = exp2(x - log2 of the row's sum); a key's vote
//           adds up inside a thread, two shuffles join the quad. Three more warps pool the votes
//           tile by tile; neighbouring runs overlap by what the pool reaches across.
// Pass 1 walks a run upwards, pass 2 downwards: what the first read last is still in L2.
// Four warpgroups take turns: exponentials of three run under the product of the fourth. What a
// tile needs besides is done while its own product runs.
// Bound: tensor cores and exponentials, 1024 clocks each for 64 keys x 256 rows x 128, which share
// the ports of the register file; below 128 rows the keys' bytes. Orders of addition follow from
// sizes and the SM count.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "device/check.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "score/pooled.cuh"
#include "score/window_scores_sm90a.h"

namespace kvc {
namespace {

constexpr const char* kOp = "window_scores";
constexpr float kInf = __builtin_huge_valf();
constexpr float kLowest = -1.7e38f;  // "no logit yet": finite, so that differences are never NaN
constexpr int kMaxHalf = 32;  // of a pool in pass 2: two tiles hold all votes of a tile of scores
constexpr int64_t kKeptBytes = 40 << 20;  // of keys that pass 1 asks L2 to keep
constexpr int kAhead = 2;  // stages asked for before queries and sums: a full ring delays these

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// A value that all threads of the warp share, said so that it stays in a uniform register.
template <typename Int>
__device__ __forceinline__ Int uniform(Int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

// Warpgroups start their products in turn, so that the first has its result while the others still
// wait: started together they end together, and then all want exponentials at once.
struct Turns {
  static constexpr int kBarrier = 2;  // and the three next
  int own;

  __device__ __forceinline__ Turns(int warpgroup, bool any) : own(warpgroup) {
    if (own == 3 && any) pass();  // the first is warpgroup 0's
  }
  __device__ __forceinline__ void wait() const { partial_sync(kBarrier + own, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const {
    partial_arrive(kBarrier + (own + 1) % 4, 2 * kWarpgroup);
  }
};

// How the work is cut; all of it follows from sizes and the SM count.
struct Plan {
  FastDivisor padded_window;
  int q_per_kv, group_heads;   // query heads of a kv head, of a row group
  int rows;                    // group_heads * padded window
  int row_groups;              // of a kv head
  int items;                   // batch * num_kv_heads * row_groups
  int kept_stages;             // pass 1: of each block, the last it reads, for pass 2 to find in L2
  int row_chunks, key_chunks;  // blocks that share the keys of an item, in passes 1 and 2
  int warpgroups_m;            // pass 1: warpgroups side by side over rows, the others over stages
  int half;                    // pass 2: how far the pool reaches on either side
  bool pools;                  // pass 2 writes scores, not votes
  Pool pool;                   // in pass 2
};

// --- shared by both passes

// One batch row, kv head and group of its query rows.
struct RowGroup {
  const WindowScoresParams& p;
  const Plan& plan;
  int b, h, group, start, seq_len;

  __device__ __forceinline__ RowGroup(const WindowScoresParams& p, const Plan& plan, int item)
      : p(p), plan(plan), start(0), seq_len(static_cast<int>(p.seq_len)) {
    group = item % plan.row_groups;
    const int head = item / plan.row_groups, kv_heads = static_cast<int>(p.num_kv_heads);
    b = head / kv_heads;
    h = head % kv_heads;
  }
  // Once earlier launches are complete.
  __device__ __forceinline__ void read_start() {
    if (p.seq_start) start = min(max(p.seq_start[b], 0), seq_len);
  }

  // Last key that a row sees, -1 if it is padding.
  __device__ __forceinline__ int limit(int r) const {
    const int g = plan.padded_window.quotient(r), i = in_window(r);
    const int64_t position = p.first_query + i;
    if (r >= plan.rows || group * plan.group_heads + g >= plan.q_per_kv) return -1;
    if (i >= p.window || position < start) return -1;
    return static_cast<int>(min(position, p.seq_len - 1));
  }
  // Over all real rows, wherever there is one: the first real row and the last.
  __device__ __forceinline__ int least_limit() const {
    return static_cast<int>(min(max(p.first_query, static_cast<int64_t>(start)), p.seq_len - 1));
  }
  __device__ __forceinline__ int greatest_limit() const {
    const int64_t position = p.first_query + p.window - 1;
    return position < start ? -1 : static_cast<int>(min(position, p.seq_len - 1));
  }
  // A real row: its query head, its place in the window.
  __device__ __forceinline__ int q_head(int r) const {
    return h * plan.q_per_kv + group * plan.group_heads + plan.padded_window.quotient(r);
  }
  __device__ __forceinline__ int in_window(int r) const {
    return r - plan.padded_window.quotient(r) * static_cast<int>(plan.padded_window.divisor);
  }
  // Its index among all rows [batch, num_q_heads, window].
  __device__ __forceinline__ int64_t row_index(int r) const {
    return (b * p.num_q_heads + q_head(r)) * p.window + in_window(r);
  }

  // The query rows as swizzled slabs of slab_rows rows; one thread asks, their bytes arrive at the
  // barrier. Heads beyond the group and rows beyond the window come as zeros.
  template <int kSlabs>
  __device__ __forceinline__ void ask_queries(unsigned char* to, int slab_rows,
                                              const CUtensorMap* map, Mbarrier* barrier) const {
    mbarrier_expect_bytes(barrier, kSlabs * plan.rows * kSlabRowBytes);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      tma_load_5d(to + slab * slab_rows * kSlabRowBytes, map, barrier, slab * kSlabElements, 0,
                  group * plan.group_heads, h, b);
    }
  }
  // Zeros where TMA left what was there, behind the last row, or brought left padding, which may be
  // NaN. All `threads` threads, once the bytes have arrived.
  template <int kSlabs>
  __device__ __forceinline__ void clear_padding(unsigned char* queries, int slab_rows,
                                                int used_rows, int threads) const {
    if (plan.rows == used_rows && p.first_query >= start) return;
    for (int item = threadIdx.x; item < used_rows * 8; item += threads) {
      if (limit(item / 8) >= 0) continue;
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        unsigned char* at = queries + slab * slab_rows * kSlabRowBytes + item * 16;
        *reinterpret_cast<uint4*>(at) = uint4{};
      }
    }
  }
};

// The ring that one thread fills with stages of kRows keys; see mbarrier.cuh.
template <int kStages_, int kRows_, int kSlabs_>
struct KeyRing {
  static constexpr int kStages = kStages_, kRows = kRows_, kSlabs = kSlabs_;
  static constexpr int kSlabBytes = kRows * kSlabRowBytes;
  static constexpr int kStageBytes = kSlabs * kSlabBytes;
  static_assert(kStages >= 4);  // a warpgroup has one of its own

  struct Barriers {
    Mbarrier full[kStages], empty[kStages];
  };
  unsigned char* stages;
  Barriers& barriers;

  __device__ __forceinline__ void init(int consuming_warps) const {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&barriers.full[s], 1);
      mbarrier_init(&barriers.empty[s], consuming_warps);
    }
    mbarrier_init_fence();
  }
  // Stage `n` counted from 0, keys from row on. One thread.
  __device__ __forceinline__ void fill(const CUtensorMap* map, int n, int row, int h, int b,
                                       CacheHint hint) const {
    const int s = n % kStages;
    mbarrier_wait(&barriers.empty[s], n / kStages % 2 ^ 1);
    mbarrier_expect_bytes(&barriers.full[s], kStageBytes);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      tma_load_rows(stages + s * kStageBytes + slab * kSlabBytes, map, &barriers.full[s],
                    slab * kSlabElements, row, h, b, hint);
    }
  }
};

// Stages of `keys` keys, at most 512 keys in all, that fit beside `others` bytes.
constexpr int ring_stages(int keys, int stage_bytes, int others) {
  return std::min(512 / keys, (227 * 1024 - 1024 - others) / stage_bytes);
}

// Where a warpgroup stands in a ring: every kStep-th stage is its own. All in uniform registers,
// moved on by additions alone: a warpgroup has little else to hide address arithmetic behind.
template <typename Ring>
struct RingPlace {
  uint32_t slot, parity = 0, full, empty;
  uint64_t first;  // descriptor of the ring

  __device__ __forceinline__ RingPlace(const Ring& ring, int slot)
      : slot(slot),
        full(uniform(mbarrier_address(ring.barriers.full))),
        empty(uniform(mbarrier_address(ring.barriers.empty))),
        first(wgmma_slab_at(uniform(shared_address(ring.stages)))) {}
  __device__ __forceinline__ void wait() const { mbarrier_wait_at(full + 8 * slot, parity); }
  __device__ __forceinline__ void release() const {  // one lane a warp
    mbarrier_arrive_at(empty + 8 * slot);
  }
  __device__ __forceinline__ uint64_t stage() const {
    return first + slot * (Ring::kStageBytes >> 4);
  }
  __device__ __forceinline__ void advance(uint32_t step) {
    slot += step;
    if (slot >= Ring::kStages) {
      slot -= Ring::kStages;
      parity ^= 1;
    }
  }
};

// --- pass 1

template <typename T_, int kSteps_>
struct RowTraits {
  using T = T_;
  static constexpr int kSteps = kSteps_;  // of 16 elements of head_dim
  static constexpr int kSlabs = (kSteps + 3) / 4;
  static constexpr int kRows = most_rows_of_group(16 * kSteps);
  static constexpr int kKeys = kSteps <= 8 ? 128 : 64;  // of a stage and product
  static constexpr int kWarpgroups = 4;
  static constexpr int kConsumers = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarp;
  static constexpr int kQueryBytes = kSlabs * kRows * kSlabRowBytes;
  using Ring = KeyRing<ring_stages(kKeys, kSlabs * kKeys * kSlabRowBytes, kQueryBytes + 4096),
                       kKeys, kSlabs>;
  struct Shared {
    typename Ring::Barriers barriers;
    Mbarrier queries;
    float2 parts[kWarpgroups][64];
  };
  static constexpr int kSharedBytes =
      1024 + kQueryBytes + Ring::kStages * Ring::kStageBytes + sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);
};

// Sum of exp2(x - most) of a thread's share of one row.
struct RowSum {
  float most = kLowest, sum = 0;

  __device__ __forceinline__ void raise(float top) {
    if (top > most) {
      sum *= exp2_approx(most - top);
      most = top;
    }
  }
  __device__ __forceinline__ void merge(float other_most, float other_sum) {
    const float top = fmaxf(most, other_most);
    sum = sum * exp2_approx(most - top) + other_sum * exp2_approx(other_most - top);
    most = top;
  }
};

// The two rows of a thread's sums, element i of a product belongs to row i / 2 % 2.
struct RowSums {
  RowSum row[2];

  template <int kCount>
  __device__ __forceinline__ void raise(const float (&x)[kCount], float scale) {
    float top[2] = {-kInf, -kInf};
#pragma unroll
    for (int i = 0; i < kCount; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], x[i]);
    row[0].raise(top[0] * scale);
    row[1].raise(top[1] * scale);
  }
  template <int kCount>
  __device__ __forceinline__ void parts(float (&more)[2], const float (&x)[kCount],
                                        float scale) const {
    float all[2][2] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      all[i / 2 % 2][i % 2] += exp2_approx(fmaf(x[i], scale, -row[i / 2 % 2].most));
    more[0] = all[0][0] + all[0][1];
    more[1] = all[1][0] + all[1][1];
  }
  // The references start at the first maxima, or where nothing was seen at all, so low that the
  // next sum overflows.
  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], float scale, bool first) {
    constexpr float kMuch = 18446744073709551616.0f;  // 2^64
    if (first) raise(x, scale);
    float more[2];
    parts(more, x, scale);
    if (!(more[0] < kMuch && more[1] < kMuch)) [[unlikely]] {  // NaN comes here too, and stays
      raise(x, scale);
      parts(more, x, scale);
    }
    row[0].sum += more[0];
    row[1].sum += more[1];
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    row_sums_sm90a_kernel(const __grid_constant__ WindowScoresParams p,
                          const __grid_constant__ Plan plan,
                          const __grid_constant__ CUtensorMap query_map,
                          const __grid_constant__ CUtensorMap key_map) {
  using T = typename Traits::T;
  using Ring = typename Traits::Ring;
  extern __shared__ unsigned char raw[];
  unsigned char* memory = raw + (-__cvta_generic_to_shared(raw) & 1023);
  unsigned char* queries = memory + Ring::kStages * Ring::kStageBytes;
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(queries + Traits::kQueryBytes);
  const Ring ring{memory, shared.barriers};

  const int chunk = blockIdx.x % plan.row_chunks;
  RowGroup rows(p, plan, blockIdx.x / plan.row_chunks);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const int warpgroup = warp / 4;
  const int sharers = Traits::kWarpgroups / plan.warpgroups_m;  // over stages

  const bool asks = threadIdx.x == Traits::kConsumers;
  if (asks) {
    tma_prefetch_map(&query_map);
    tma_prefetch_map(&key_map);
    mbarrier_init(&shared.queries, 1);
    ring.init(4 * plan.warpgroups_m);
  }
  __syncthreads();
  launch_wait();
  launch_dependents();

  // A run of the stages that any row sees. Pass 2 walks it backwards: its end is in L2 then.
  rows.read_start();
  const int first_stage = rows.start / Traits::kKeys;
  const int stages = (rows.greatest_limit() + Traits::kKeys) / Traits::kKeys - first_stage;
  const int per_chunk = max(stages, 0) / plan.row_chunks;
  const int more = max(stages, 0) % plan.row_chunks;  // chunks with one stage more
  const int first = first_stage + chunk * per_chunk + min(chunk, more);
  const int count = per_chunk + (chunk < more);
  const auto key_of = [&](int n) { return (first + n) * Traits::kKeys; };
  const auto fill = [&](int n) {
    ring.fill(&key_map, n, key_of(n), rows.h, rows.b,
              n < count - plan.kept_stages ? CacheHint::kOnce : CacheHint::kNormal);
  };

  const bool is_asking = warp >= 4 * Traits::kWarpgroups;
  if (is_asking) {
    if (asks) {
      rows.ask_queries<Traits::kSlabs>(queries, Traits::kRows, &query_map, &shared.queries);
      for (int n = 0; n < min(count, kAhead); ++n) fill(n);
    }
    __syncwarp();
  } else {
    mbarrier_wait(&shared.queries, 0);
    rows.clear_padding<Traits::kSlabs>(queries, Traits::kRows, 64 * plan.warpgroups_m,
                                       Traits::kConsumers);
    async_proxy_fence();
  }
  __syncthreads();  // the queries are ready
  if (is_asking) {
    if (asks) {
      for (int n = kAhead; n < count; ++n) fill(n);
    }
    return;
  }

  const int row0 = warpgroup % plan.warpgroups_m * 64, share = warpgroup / plan.warpgroups_m;
  int limits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    limits[half] = rows.limit(row0 + warp % 4 * 16 + 8 * half + lane / 4);
  // Stages [plain, plain_end) hide no key from any row.
  const int plain_end = uniform((rows.least_limit() + 1) / Traits::kKeys - first);
  const int plain = uniform(ceil_div(rows.start, Traits::kKeys) - first);

  RowSums sums;
  RingPlace<Ring> place(ring, share);
  const uint64_t own_rows = wgmma_slab_at(uniform(shared_address(queries)) + row0 * kSlabRowBytes);
  // Each warpgroup takes every sharers-th stage; one with none left works on what the ring holds
  // and drops it, so that all run the same loop.
  const Turns turns(warpgroup, count > 0);
  for (int i = 0; i < count; i += sharers) {
    const int n = i + share;
    float x[Traits::kKeys / 2];
    if (n < count) place.wait();
    const uint64_t stage = place.stage();
    turns.wait();
    hold(x);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      Wgmma<T, Traits::kKeys>::ss(
          x, own_rows + (step / 4 * Traits::kRows * kSlabRowBytes >> 4) + step % 4 * kWgmmaStep,
          stage + (step / 4 * Ring::kSlabBytes >> 4) + step % 4 * kWgmmaStep, step > 0);
    }
    wgmma_commit();
    if (i + sharers < count || warpgroup < 3) turns.pass();
    wgmma_wait<0>();
    hold(x);
    if (n >= count) continue;
    if (lane == 0) place.release();
    place.advance(sharers);
    if (n < plain || n >= plain_end) [[unlikely]] {
      const int key0 = key_of(n);
#pragma unroll
      for (int i = 0; i < Traits::kKeys / 2; ++i) {
        const int key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key < rows.start || key > limits[i / 2 % 2]) x[i] = -kInf;
      }
    }
    sums.add(x, p.scale_log2, i == 0);
    __syncwarp();
  }

  // Merge over the four lanes of a row, then over the warpgroups that shared the stages.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      const float most = __shfl_xor_sync(0xffffffffu, sums.row[half].most, offset);
      const float other = __shfl_xor_sync(0xffffffffu, sums.row[half].sum, offset);
      sums.row[half].merge(most, other);
    }
    if (lane % 4 == 0) {
      shared.parts[warpgroup][warp % 4 * 16 + 8 * half + lane / 4] =
          make_float2(sums.row[half].most, sums.row[half].sum);
    }
  }
  partial_sync(1, Traits::kConsumers);
  for (int r = threadIdx.x; r < plan.rows; r += Traits::kConsumers) {
    if (rows.limit(r) < 0) continue;
    RowSum sum;
    for (int n = 0; n < sharers; ++n) {
      const float2 part = shared.parts[n * plan.warpgroups_m + r / 64][r % 64];
      sum.merge(part.x, part.y);
    }
    reinterpret_cast<float2*>(p.row_stats)[chunk * p.num_rows() + rows.row_index(r)] =
        make_float2(sum.most, sum.sum);
  }
}

// --- pass 2

// The keys of a block and the scores that it writes.
//
// The keys that are scored are cut into runs, newest first. Neighbouring runs share 2 * half keys,
// whose votes both blocks compute, so that each pools its own scores.
struct Run {
  int top;          // the first tile ends here, the others lie below
  int count;        // of tiles
  int first, last;  // scores [first, last)

  __device__ __forceinline__ Run(const Plan& plan, int start, int num_scored, int tile, int chunk) {
    const int shared = 2 * plan.half, keys = max(num_scored - start, 0);
    const int length = ceil_div(keys + shared * (plan.key_chunks - 1), plan.key_chunks);
    const int step = length - shared;
    top = num_scored - chunk * step;
    const int low = max(top - length, start);
    // Few keys: the runs before this one may have ended at the first.
    const bool any = chunk == 0 || (step > 0 && top - shared > start);
    count = any ? ceil_div(max(top - low, 0), tile) : 0;
    first = low == start ? start : low + plan.half;
    last = chunk == 0 ? num_scored : top - plan.half;
  }
};

// Votes on their way from the warpgroups to the warp that pools them: a ring of kTiles tiles, in
// which a key lies at its distance from the block's first tile.
template <int kKeys>
struct VoteLine {
  static constexpr int kTiles = 16, kSize = kTiles * kKeys;
  float votes[kSize];
  Mbarrier voted[kTiles], pooled[kTiles];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kTiles; ++i) {
      mbarrier_init(&voted[i], kWarpgroup);
      mbarrier_init(&pooled[i], 2 * kWarp);  // a tile is read in its own step and in the next
    }
  }
  __device__ __forceinline__ float& at(int distance) { return votes[distance & (kSize - 1)]; }

  // A warpgroup, around its writes of tile n. Every lane arrives: one for its warp, behind a
  // __syncwarp, would be as right and is no faster, but racecheck cannot follow it.
  __device__ __forceinline__ void wait_for_room(int n) {
    mbarrier_wait(&pooled[n % kTiles], n / kTiles % 2 ^ 1);
  }
  __device__ __forceinline__ void vote(int n) { mbarrier_arrive(&voted[n % kTiles]); }
  // A warp that pools.
  __device__ __forceinline__ void wait_for_votes(int n) {
    mbarrier_wait(&voted[n % kTiles], n / kTiles % 2);
  }
  __device__ __forceinline__ void release(int n) { mbarrier_arrive(&pooled[n % kTiles]); }
};

template <typename T_, int kSteps_, int kCols_, int kParts_>
struct VoteTraits {
  using T = T_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kSlabs = (kSteps + 3) / 4;
  static constexpr int kCols = kCols_;    // rows of the group in one product
  static constexpr int kParts = kParts_;  // products that cover the group
  static constexpr int kRows = kCols * kParts;
  static constexpr int kKeys = 64;  // of a stage
  static constexpr int kWarpgroups = 4;
  static constexpr int kConsumers = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarpgroup;  // one warp asks, three pool
  static constexpr int kQueryBytes = kSlabs * kRows * kSlabRowBytes;
  using Ring = KeyRing<ring_stages(kKeys, kSlabs * kKeys * kSlabRowBytes, kQueryBytes + 8192),
                       kKeys, kSlabs>;
  struct Shared {
    typename Ring::Barriers barriers;
    Mbarrier queries;
    VoteLine<kKeys> line;
    alignas(16) float minus_sums[kRows];  // -log2 of the rows' sums, see stat_at
    alignas(16) int limits[kRows];
  };
  static constexpr int kSharedBytes =
      1024 + kQueryBytes + Ring::kStages * Ring::kStageBytes + sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);
};

// A thread reads the columns 8 n + 2 (lane % 4) and the next of two octets n, n + 1 at once.
__device__ __forceinline__ int stat_at(int r) {
  return r / 16 * 16 + r % 8 / 2 * 4 + r / 8 % 2 * 2 + r % 2;
}

// -log2 of a row's sum of exp2 over all its keys, from the chunks of pass 1 or from log-sum-exp;
// -inf for padding, which makes its P zero. Two neighbouring lanes a row, each merges every other
// chunk.
__device__ __forceinline__ float minus_log2_sum(const WindowScoresParams& p, const RowGroup& rows,
                                                int chunks, int r, int part) {
  if (rows.limit(r) < 0) return -kInf;
  if (p.lse) {
    const float* lse = p.lse + rows.b * p.lse_batch_stride + rows.q_head(r) * p.lse_head_stride;
    return -lse[rows.in_window(r)] * static_cast<float>(kLog2e);
  }
  constexpr int kAtOnce = 8;
  const int64_t num_rows = p.num_rows();
  const float2* stats = reinterpret_cast<const float2*>(p.row_stats) + rows.row_index(r);
  RowSum all;
  for (int first = part; first < chunks; first += 2 * kAtOnce) {
    float2 some[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int c = first + 2 * i;
      some[i] = c < chunks ? stats[c * num_rows] : make_float2(kLowest, 0);
    }
    float most = all.most;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) most = fmaxf(most, some[i].x);
    all.raise(most);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) all.sum += some[i].y * exp2_approx(some[i].x - all.most);
  }
  const unsigned pair = 3u << (threadIdx.x % kWarp & ~1);
  const float most = __shfl_xor_sync(pair, all.most, 1), sum = __shfl_xor_sync(pair, all.sum, 1);
  all.merge(most, sum);
  return -(all.most + log2f(all.sum));
}

// Scores j and j + kWarp from the votes within half on either side: all of them count.
template <typename VoteAt>
__device__ __forceinline__ float2 pooled_pair(Pool pool, int half, int j, VoteAt&& vote_at) {
  const bool largest = pool == Pool::kMax;
  float2 all = largest ? make_float2(-kInf, -kInf) : make_float2(0, 0);
#pragma unroll 4
  for (int i = j - half; i <= j + half; ++i) {
    const float a = vote_at(i), b = vote_at(i + kWarp);
    all.x = largest ? nan_max(all.x, a) : all.x + a;
    all.y = largest ? nan_max(all.y, b) : all.y + b;
  }
  if (pool == Pool::kAvg) {
    all.x /= static_cast<float>(2 * half + 1);
    all.y /= static_cast<float>(2 * half + 1);
  }
  return all;
}

// Warp `own` of `warps`: takes every warps-th tile of votes and writes scores, or the votes
// themselves.
template <int kKeys>
__device__ __forceinline__ void write_scores(const WindowScoresParams& p, const Plan& plan,
                                             const RowGroup& rows, const Run& run, int chunk,
                                             VoteLine<kKeys>& line, int own, int warps) {
  const int lane = threadIdx.x % kWarp, num_scored = static_cast<int>(p.num_scored);
  const int64_t plane = (rows.b * p.num_kv_heads + rows.h) * plan.row_groups + rows.group;
  float* to = (plan.pools ? p.out : p.votes) + plane * p.seq_len;
  if (plan.pools) {  // every chunk its part of the fills
    const int stride = plan.key_chunks * warps * kWarp;
    const int at = (chunk * warps + own) * kWarp + lane;
    for (int j = at; j < rows.start; j += stride) to[j] = -kInf;
    for (int j = max(num_scored, rows.start) + at; j < rows.seq_len; j += stride) to[j] = kInf;
  }
  const int bottom = run.top - kKeys, half = plan.half;  // bottom of the first tile
  const auto vote_at = [&](int key) { return line.at(key - bottom); };
  for (int n = own; n < run.count; n += warps) {
    const int key0 = bottom - n * kKeys;
    if (n > 0) line.wait_for_votes(n - 1);
    line.wait_for_votes(n);
    // Of this tile and half a pool of the last: what reaches no further down.
    const int first = n + 1 == run.count ? run.first : max(key0 + half, run.first);
    const int last = min(key0 + kKeys + half, run.last);
    if (last - first == kKeys && first - half >= rows.start && last + half <= num_scored) {
      static_assert(kKeys == 2 * kWarp);
      const float2 scores = pooled_pair(plan.pool, half, first + lane, vote_at);
      to[first + lane] = scores.x;
      to[first + kWarp + lane] = scores.y;
    } else {
      for (int j = first + lane; j < last; j += kWarp) {
        to[j] = pooled(plan.pool, 2 * half + 1, max(j - half, rows.start),
                       min(j + half + 1, num_scored), vote_at);
      }
    }
    line.release(n);
    if (n > 0) line.release(n - 1);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    key_votes_sm90a_kernel(const __grid_constant__ WindowScoresParams p,
                           const __grid_constant__ Plan plan,
                           const __grid_constant__ CUtensorMap query_map,
                           const __grid_constant__ CUtensorMap key_map) {
  using T = typename Traits::T;
  using Ring = typename Traits::Ring;
  extern __shared__ unsigned char raw[];
  unsigned char* memory = raw + (-__cvta_generic_to_shared(raw) & 1023);
  unsigned char* queries = memory + Ring::kStages * Ring::kStageBytes;
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(queries + Traits::kQueryBytes);
  const Ring ring{memory, shared.barriers};

  const int chunk = blockIdx.x % plan.key_chunks;
  RowGroup rows(p, plan, blockIdx.x / plan.key_chunks);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const int warpgroup = warp / 4;

  const bool asks = threadIdx.x == Traits::kConsumers;
  if (asks) {
    tma_prefetch_map(&query_map);
    tma_prefetch_map(&key_map);
    mbarrier_init(&shared.queries, 1);
    shared.line.init();
    ring.init(4);
  }
  __syncthreads();
  if (p.lse) launch_wait();  // else pass 1 has waited for what comes before it
  launch_dependents();

  rows.read_start();
  const Run run(plan, rows.start, static_cast<int>(p.num_scored), Traits::kKeys, chunk);
  const int count = run.count;
  const auto key_of = [&](int n) { return run.top - (n + 1) * Traits::kKeys; };
  const auto fill = [&](int n) {
    ring.fill(&key_map, n, key_of(n), rows.h, rows.b, CacheHint::kOnce);
  };
  const bool is_asking = warp == 4 * Traits::kWarpgroups;
  if (is_asking) {
    if (asks) {
      rows.ask_queries<Traits::kSlabs>(queries, Traits::kRows, &query_map, &shared.queries);
      for (int n = 0; n < min(count, kAhead); ++n) fill(n);
    }
    __syncwarp();
  } else if (warpgroup < Traits::kWarpgroups) {
    launch_wait();  // for the sums of pass 1
    for (int i = threadIdx.x; i < 2 * Traits::kRows; i += Traits::kConsumers) {
      const int r = i / 2;
      const float minus_sum = minus_log2_sum(p, rows, plan.row_chunks, r, i % 2);
      if (i % 2 == 1) continue;
      shared.minus_sums[stat_at(r)] = minus_sum;
      shared.limits[stat_at(r)] = rows.limit(r);
    }
    mbarrier_wait(&shared.queries, 0);
    rows.clear_padding<Traits::kSlabs>(queries, Traits::kRows, Traits::kRows, Traits::kConsumers);
    async_proxy_fence();
  }
  __syncthreads();  // queries and row statistics are ready
  if (warpgroup == Traits::kWarpgroups) fewer_registers<40>();
  if (is_asking) {
    if (asks) {
      for (int n = kAhead; n < count; ++n) fill(n);
    }
    __syncwarp();
    return;
  }
  if (warpgroup == Traits::kWarpgroups) {
    write_scores(p, plan, rows, run, chunk, shared.line, warp % 4 - 1, 3);
    return;
  }
  more_registers<104>();

  float factor = 1;
  if (p.window_reduce == WindowReduce::kMean) {
    const int64_t real = min(max(p.first_query + p.window - rows.start, int64_t{1}), p.window);
    factor = 1.0f / static_cast<float>(real);
  }
  if (!p.votes_per_q_head() && p.group_reduce == GroupReduce::kMean) {
    factor /= static_cast<float>(plan.q_per_kv);
  }
  const float* weights =
      p.weights ? p.weights + rows.b * p.weights_batch_stride + rows.h * p.weights_head_stride
                : nullptr;
  // Tiles [plain, plain_end) hide no key from any row.
  const int plain = uniform(ceil_div(run.top - 1 - rows.least_limit(), Traits::kKeys));
  const int plain_end = uniform((run.top - rows.start) / Traits::kKeys);

  RingPlace<Ring> place(ring, warpgroup);
  const uint64_t query_slab = wgmma_slab_at(uniform(shared_address(queries)));
  const float4* all_stats = reinterpret_cast<const float4*>(shared.minus_sums) + lane % 4;
  const int4* all_limits = reinterpret_cast<const int4*>(shared.limits) + lane % 4;
  constexpr int kGroups = Traits::kCols / 16;  // of two octets of rows
  float sums[2][2] = {};                       // [key half of the tile][row parity]

  // Products of the tile with part of the rows start.
  const auto issue = [&](float (&x)[Traits::kCols / 2], int part) {
    const uint64_t tile = place.stage();
    hold(x);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      const int slab = step / 4;
      Wgmma<T, Traits::kCols>::ss(
          x, tile + (slab * Ring::kSlabBytes >> 4) + step % 4 * kWgmmaStep,
          query_slab + ((slab * Traits::kRows + part * Traits::kCols) * kSlabRowBytes >> 4) +
              step % 4 * kWgmmaStep,
          step > 0);
    }
    wgmma_commit();
  };
  // Their exponentials join the sums.
  const auto add = [&](const float (&x)[Traits::kCols / 2], const float4(&ahead)[2], int n,
                       int part) {
    const float4* stats = all_stats + part * Traits::kCols / 4;
    if (n < plain || n >= plain_end) [[unlikely]] {
      const int4* limits = all_limits + part * Traits::kCols / 4;
      const int key0 = key_of(n);
#pragma unroll
      for (int c = 0; c < kGroups; ++c) {
        const float4 stat = stats[4 * c];
        const int4 limit = limits[4 * c];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2, j = i / 4 * 2 + i % 2;
          const int key = key0 + warp % 4 * 16 + 8 * half + lane / 4;
          const float minus = j == 0 ? stat.x : j == 1 ? stat.y : j == 2 ? stat.z : stat.w;
          const int until = j == 0 ? limit.x : j == 1 ? limit.y : j == 2 ? limit.z : limit.w;
          const float e = exp2_approx(fmaf(x[8 * c + i], p.scale_log2, minus));
          if (key >= rows.start && key <= until) sums[half][j % 2] += e;
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < kGroups; ++c) {
        const float4 stat = c < 2 ? ahead[c] : stats[4 * c];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2, j = i / 4 * 2 + i % 2;
          const float minus = j == 0 ? stat.x : j == 1 ? stat.y : j == 2 ? stat.z : stat.w;
          sums[half][j % 2] += exp2_approx(fmaf(x[8 * c + i], p.scale_log2, minus));
        }
      }
    }
  };
  // All rows are in: the quad's sums become the votes of tile n, half 0 in lane 0, half 1 in 1.
  const auto finish = [&](int n) {
    const bool odd = lane % 2;
    const float of_half[2] = {sums[0][0] + sums[0][1], sums[1][0] + sums[1][1]};
    float vote = odd ? of_half[1] : of_half[0];
    vote += __shfl_xor_sync(0xffffffffu, odd ? of_half[0] : of_half[1], 1);
    vote += __shfl_xor_sync(0xffffffffu, vote, 2);
    vote *= factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] = 0;
    shared.line.wait_for_room(n);
    if (lane % 4 < 2) {
      const int within = warp % 4 * 16 + 8 * (lane % 4) + lane / 4, key = key_of(n) + within;
      if (weights && key >= rows.start) vote *= weights[key];
      shared.line.at(within - n * Traits::kKeys) = vote;
    }
    shared.line.vote(n);
  };

  // Each warpgroup takes every kWarpgroups-th tile, kParts products each. While the first product
  // runs it finishes the tile before. One without a tile in the last round only passes its turns.
  const Turns turns(warpgroup, count > 0);
  const int rounds = ceil_div(count, Traits::kWarpgroups);
  for (int round = 0; round < rounds; ++round) {
    const int n = round * Traits::kWarpgroups + warpgroup;
    const bool last = round + 1 == rounds && warpgroup == 3;
    if (n >= count) {
#pragma unroll
      for (int part = 0; part < Traits::kParts; ++part) {
        turns.wait();
        if (!last || part + 1 < Traits::kParts) turns.pass();
      }
      break;
    }
    place.wait();
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part) {
      float x[Traits::kCols / 2];
      turns.wait();
      issue(x, part);
      if (!last || part + 1 < Traits::kParts) turns.pass();
      if (part == 0 && round > 0) finish(n - Traits::kWarpgroups);
      const float4* stats = all_stats + part * Traits::kCols / 4;
      const float4 ahead[2] = {stats[0], stats[4]};
      wgmma_wait<0>();
      hold(x);
      if (part + 1 == Traits::kParts) {
        if (lane == 0) place.release();
        place.advance(Traits::kWarpgroups);
      }
      add(x, ahead, n, part);
    }
  }
  if (count > warpgroup) {
    finish((count - 1 - warpgroup) / Traits::kWarpgroups * Traits::kWarpgroups + warpgroup);
  }
}

// --- policy

Plan make_plan(const WindowScoresParams& p, int64_t stage_bytes) {
  const int64_t padded_window = ceil_div(p.window, int64_t{8}) * 8;
  const int64_t group_heads = ceil_div(p.q_per_kv(), p.row_groups());
  const int64_t rows = group_heads * padded_window, row_tiles = ceil_div(rows, int64_t{64});
  const int64_t items = p.batch * p.num_kv_heads * p.row_groups();
  const int64_t slots = device_limits().multiprocessors;
  // Chunks fill the machine once if that leaves few blocks idle, else about three times.
  const int64_t once = slots / items;
  const int64_t wanted = once * items * 10 >= slots * 9 ? once : ceil_div(3 * slots, items);
  const auto chunks = [&](int64_t keys, int64_t most) {
    return static_cast<int>(
        std::clamp<int64_t>(std::min(wanted, most), 1, ceil_div(keys, int64_t{64})));
  };
  const bool pools = window_scores_pools_sm90a(p);
  const int row_chunks = chunks(p.seq_len, p.max_chunks);
  const int key_chunks = chunks(p.num_scored, wanted);
  const int half = pools && p.pool != Pool::kNone ? static_cast<int>(p.kernel_size / 2) : 0;
  return {
      .padded_window = FastDivisor(static_cast<uint32_t>(padded_window)),
      .q_per_kv = static_cast<int>(p.q_per_kv()),
      .group_heads = static_cast<int>(group_heads),
      .rows = static_cast<int>(rows),
      .row_groups = static_cast<int>(p.row_groups()),
      .items = static_cast<int>(items),
      .kept_stages = static_cast<int>(kKeptBytes / (items * row_chunks * stage_bytes)),
      .row_chunks = row_chunks,
      .key_chunks = key_chunks,
      .warpgroups_m = row_tiles > 2 ? 4 : static_cast<int>(row_tiles),
      .half = half,
      .pools = pools,
      .pool = half > 0 ? p.pool : Pool::kNone,
  };
}

// --- launch

template <typename Traits, typename Kernel>
void launch(Kernel kernel, int64_t blocks, const WindowScoresParams& p, const Plan& plan,
            const CUtensorMap& queries, const CUtensorMap& keys, cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Traits::kSharedBytes),
             kOp);
  Launch(static_cast<unsigned>(blocks), Traits::kThreads, Traits::kSharedBytes, stream)
      .early(true)(kOp, kernel, p, plan, queries, keys);
}

template <typename T, int kSteps>
void launch_passes(const WindowScoresParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p, RowTraits<T, kSteps>::Ring::kStageBytes);
  const auto keys = [&](int rows) {
    return row_map(kOp, p.dtype, p.k, p.head_dim, {p.seq_len, p.num_kv_heads, p.batch},
                   {p.k_row_stride, p.k_head_stride, p.k_batch_stride}, rows);
  };
  const CUtensorMap queries = tensor_map<5>(
      kOp, p.dtype, p.q, {p.head_dim, p.window, p.q_per_kv(), p.num_kv_heads, p.batch},
      {p.q_row_stride, p.q_head_stride, p.q_per_kv() * p.q_head_stride, p.q_batch_stride},
      {kSlabElements, static_cast<int>(p.padded_window()), plan.group_heads, 1, 1});
  if (!p.lse) {
    using Traits = RowTraits<T, kSteps>;
    launch<Traits>(row_sums_sm90a_kernel<Traits>, int64_t{plan.items} * plan.row_chunks, p, plan,
                   queries, keys(Traits::kKeys), stream);
  }
  const auto votes = [&](auto traits) {
    using Traits = decltype(traits);
    launch<Traits>(key_votes_sm90a_kernel<Traits>, int64_t{plan.items} * plan.key_chunks, p, plan,
                   queries, keys(Traits::kKeys), stream);
  };
  if constexpr (most_rows_of_group(16 * kSteps) > 128) {
    if (plan.rows > 128) return votes(VoteTraits<T, kSteps, 128, 2>{});
  }
  votes(VoteTraits<T, kSteps, 128, 1>{});  // below 128 rows memory is the bound: no other kernels
}

template <typename T>
void launch_head_dim(const WindowScoresParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) {
    launch_passes<T, 4>(p, stream);
  } else if (p.head_dim <= 96) {
    launch_passes<T, 6>(p, stream);
  } else if (p.head_dim <= 128) {
    launch_passes<T, 8>(p, stream);
  } else if (p.head_dim <= 192) {
    launch_passes<T, 12>(p, stream);
  } else {
    launch_passes<T, 16>(p, stream);
  }
}

}  // namespace

bool window_scores_fits_sm90a(const WindowScoresParams& p) {
  return p.dtype != DType::kFloat32 && p.window <= most_rows_of_group(p.head_dim) &&
         p.window_reduce != WindowReduce::kMax &&
         tma_takes<3>(p.k, {p.seq_len, p.num_kv_heads, p.batch},
                      {p.k_row_stride, p.k_head_stride, p.k_batch_stride}) &&
         tma_takes<3>(p.q, {p.window, p.num_q_heads, p.batch},
                      {p.q_row_stride, p.q_head_stride, p.q_batch_stride});
}

bool window_scores_pools_sm90a(const WindowScoresParams& p) {
  return p.out_heads() == p.num_kv_heads * p.row_groups() &&
         (p.pool == Pool::kNone || p.kernel_size / 2 <= kMaxHalf);
}

void window_votes_sm90a(const WindowScoresParams& p, void* stream) {
  if (p.dtype == DType::kFloat16) {
    launch_head_dim<__half>(p, static_cast<cudaStream_t>(stream));
  } else {
    launch_head_dim<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace kvc
