// window_scores on Hopper: passes 1 and 2 with wgmma, keys by TMA through a ring of stages.
//
// The query heads of a kv head are cut into row groups of at most 256 rows, whole heads, each
// window padded to a multiple of 8: r = head in group * padded window + i. A block owns a row group
// and every chunks-th stage of its keys. One extra warp asks for them: where memory is the bound,
// the thread that asks waits.
//   pass 1  rows on the M side, from registers: a warpgroup owns 64 rows, all read the same keys.
//           A thread sums exp2(x - reference) over its share of the columns. The reference is the
//           first maximum it met: a float carries sums of 2^64 as exactly as sums of 1, so it moves
//           only on overflow, and the loop computes no maxima.
//   pass 2  keys on the M side: a warpgroup owns 64 keys, and multiplies them with all rows of the
//           group, which stay in shared memory. P = exp2(x - log2 of the row's sum); a key's vote
//           adds up inside a thread, two shuffles join the quad. Products alternate between two
//           sets of sums, so that the tensor cores work on the next while exponentials of the last
//           run.
// Bound: tensor cores and exponentials, 1024 clocks each for 64 keys x 256 rows x 128; below 128
// rows the keys' bytes. Orders of addition follow from sizes and the SM count.
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
#include "score/window_scores_sm90a.h"

namespace kvc {
namespace {

constexpr const char* kOp = "window_scores";
constexpr float kInf = __builtin_huge_valf();
constexpr float kLowest = -1.7e38f;  // "no logit yet": finite, so that differences are never NaN
constexpr int kAhead = 2;  // stages asked for before queries and sums: a full ring delays these

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// How the work is cut; all of it follows from sizes and the SM count.
struct Plan {
  FastDivisor padded_window;
  int group_heads;             // query heads of a row group
  int rows;                    // group_heads * padded window
  int row_groups;              // of a kv head
  int items;                   // batch * num_kv_heads * row_groups
  int row_chunks, key_chunks;  // blocks that share the keys of an item, in passes 1 and 2
  int warpgroups_m;            // pass 1: warpgroups side by side over rows, the others over stages
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
    if (p.seq_start) start = min(max(p.seq_start[b], 0), seq_len);
  }

  // Last key that a row sees, -1 if it is padding.
  __device__ __forceinline__ int limit(int r) const {
    const int g = plan.padded_window.quotient(r);
    const int i = r - g * static_cast<int>(plan.padded_window.divisor);
    const int64_t position = p.first_query + i;
    if (r >= plan.rows || group * plan.group_heads + g >= p.q_per_kv()) return -1;
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
  // Index of a real row among all rows [batch, num_q_heads, window].
  __device__ __forceinline__ int64_t row_index(int r) const {
    const int g = plan.padded_window.quotient(r);
    const int i = r - g * static_cast<int>(plan.padded_window.divisor);
    return (b * p.num_q_heads + h * p.q_per_kv() + group * plan.group_heads + g) * p.window + i;
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
  __device__ __forceinline__ void fill(const CUtensorMap* map, int n, int row, int h, int b) const {
    const int s = n % kStages;
    mbarrier_wait(&barriers.empty[s], n / kStages % 2 ^ 1);
    mbarrier_expect_bytes(&barriers.full[s], kStageBytes);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      tma_load_rows(stages + s * kStageBytes + slab * kSlabBytes, map, &barriers.full[s],
                    slab * kSlabElements, row, h, b);
    }
  }
  __device__ __forceinline__ unsigned char* stage(int n) const {
    return stages + n % kStages * kStageBytes;
  }
  __device__ __forceinline__ void wait(int n) const {
    mbarrier_wait(&barriers.full[n % kStages], n / kStages % 2);
  }
  __device__ __forceinline__ void release(int n) const {  // one lane a warp
    mbarrier_arrive(&barriers.empty[n % kStages]);
  }
};

// --- pass 1

template <typename T_, int kSteps_>
struct RowTraits {
  using T = T_;
  static constexpr int kSteps = kSteps_;  // of 16 elements of head_dim
  static constexpr int kSlabs = (kSteps + 3) / 4;
  static constexpr int kKeys = 128;  // of a stage and product
  static constexpr int kWarpgroups = 4;
  static constexpr int kConsumers = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarp;
  using Ring = KeyRing<4, kKeys, kSlabs>;
  static constexpr int kQueryBytes = kSlabs * kRowGroup * kSlabRowBytes;
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

  template <int kHalf, int kCount>
  __device__ __forceinline__ void raise(const float (&x)[kCount], float scale) {
    float top = -kInf;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i / 2 % 2 == kHalf) top = fmaxf(top, x[i]);
    }
    top *= scale;
    if (top > most) {
      sum *= exp2_approx(most - top);
      most = top;
    }
  }
  template <int kHalf, int kCount>
  __device__ __forceinline__ float part(const float (&x)[kCount], float scale) const {
    float all[2] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i / 2 % 2 == kHalf) all[i % 2] += exp2_approx(fmaf(x[i], scale, -most));
    }
    return all[0] + all[1];
  }
  template <int kHalf, int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], float scale) {
    constexpr float kMuch = 18446744073709551616.0f;  // 2^64
    if (most == kLowest) raise<kHalf>(x, scale);
    float more = part<kHalf>(x, scale);
    if (!(more < kMuch)) {  // NaN comes here too, and stays
      raise<kHalf>(x, scale);
      more = part<kHalf>(x, scale);
    }
    sum += more;
  }
  __device__ __forceinline__ void merge(float other_most, float other_sum) {
    const float top = fmaxf(most, other_most);
    sum = sum * exp2_approx(most - top) + other_sum * exp2_approx(other_most - top);
    most = top;
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
  const RowGroup rows(p, plan, blockIdx.x / plan.row_chunks);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const int warpgroup = warp / 4;
  const int sharers = Traits::kWarpgroups / plan.warpgroups_m;  // over stages

  // Of the stages that any row sees every chunks-th: neighbours are read at about the same time.
  const int first = rows.start / Traits::kKeys + chunk;
  const int end = (rows.greatest_limit() + Traits::kKeys) / Traits::kKeys;
  const int count = ceil_div(max(end - first, 0), plan.row_chunks);
  const auto key_of = [&](int n) { return (first + n * plan.row_chunks) * Traits::kKeys; };

  const bool asks = threadIdx.x == Traits::kConsumers;
  if (asks) {
    mbarrier_init(&shared.queries, 1);
    ring.init(4 * plan.warpgroups_m);
  }
  __syncthreads();
  launch_dependents();
  const bool is_asking = warp == 4 * Traits::kWarpgroups;
  if (is_asking) {
    if (asks) {
      rows.ask_queries<Traits::kSlabs>(queries, kRowGroup, &query_map, &shared.queries);
      for (int n = 0; n < min(count, kAhead); ++n)
        ring.fill(&key_map, n, key_of(n), rows.h, rows.b);
    }
    __syncwarp();
  } else {
    mbarrier_wait(&shared.queries, 0);
    rows.clear_padding<Traits::kSlabs>(queries, kRowGroup, 64 * plan.warpgroups_m,
                                       Traits::kConsumers);
    async_proxy_fence();
  }
  __syncthreads();  // the queries are ready
  if (is_asking) {
    if (asks) {
      for (int n = kAhead; n < count; ++n) ring.fill(&key_map, n, key_of(n), rows.h, rows.b);
    }
    return;
  }

  const int row0 = warpgroup % plan.warpgroups_m * 64, share = warpgroup / plan.warpgroups_m;
  int limits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    limits[half] = rows.limit(row0 + warp % 4 * 16 + 8 * half + lane / 4);
  const int least = rows.least_limit();

  RowSum sums[2];
  const uint64_t own_rows = wgmma_slab(queries + row0 * kSlabRowBytes);
  // Each warpgroup takes every sharers-th stage; one with none left works on what the ring holds
  // and drops it, so that all run the same loop.
  for (int i = 0; i < count; i += sharers) {
    const int n = i + share;
    float x[Traits::kKeys / 2];
    if (n < count) ring.wait(n);
    const uint64_t stage = wgmma_slab(ring.stage(n));
    hold(x);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      Wgmma<T, Traits::kKeys>::ss(
          x, own_rows + (step / 4 * kRowGroup * kSlabRowBytes >> 4) + step % 4 * kWgmmaStep,
          stage + (step / 4 * Ring::kSlabBytes >> 4) + step % 4 * kWgmmaStep, step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(x);
    if (n >= count) continue;
    if (lane == 0) ring.release(n);
    const int key0 = key_of(n);
    if (key0 < rows.start || key0 + Traits::kKeys - 1 > least) {
#pragma unroll
      for (int i = 0; i < Traits::kKeys / 2; ++i) {
        const int key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key < rows.start || key > limits[i / 2 % 2]) x[i] = -kInf;
      }
    }
    sums[0].template add<0>(x, p.scale_log2);
    sums[1].template add<1>(x, p.scale_log2);
    __syncwarp();
  }

  // Merge over the four lanes of a row, then over the warpgroups that shared the stages.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      const float most = __shfl_xor_sync(0xffffffffu, sums[half].most, offset);
      const float other = __shfl_xor_sync(0xffffffffu, sums[half].sum, offset);
      sums[half].merge(most, other);
    }
    if (lane % 4 == 0) {
      shared.parts[warpgroup][warp % 4 * 16 + 8 * half + lane / 4] =
          make_float2(sums[half].most, sums[half].sum);
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
  static constexpr int kThreads = kConsumers + kWarp;
  using Ring = KeyRing<8, kKeys, kSlabs>;
  static constexpr int kQueryBytes = kSlabs * kRows * kSlabRowBytes;
  struct Shared {
    typename Ring::Barriers barriers;
    Mbarrier queries;
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
// -inf for padding, which makes its P zero.
__device__ __forceinline__ float minus_log2_sum(const WindowScoresParams& p, const RowGroup& rows,
                                                int chunks, int r) {
  if (rows.limit(r) < 0) return -kInf;
  const int64_t row = rows.row_index(r);
  if (p.lse) {
    const int64_t i = row % p.window, h = row / p.window % p.num_q_heads;
    return -p.lse[rows.b * p.lse_batch_stride + h * p.lse_head_stride + i] *
           static_cast<float>(kLog2e);
  }
  const float2* stats = reinterpret_cast<const float2*>(p.row_stats) + row;
  const int64_t num_rows = p.num_rows();
  float most = kLowest, sum = 0;
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) most = fmaxf(most, stats[c * num_rows].x);
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) {
    const float2 part = stats[c * num_rows];
    sum += part.y * exp2_approx(part.x - most);
  }
  return -(most + log2f(sum));
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
  const RowGroup rows(p, plan, blockIdx.x / plan.key_chunks);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const int warpgroup = warp / 4;
  const int num_scored = static_cast<int>(p.num_scored);

  // Every chunks-th tile that has a key to be scored. Newest first: pass 1 left them in L2.
  const int end = ceil_div(num_scored, Traits::kKeys) - chunk;
  const int count = ceil_div(max(end - rows.start / Traits::kKeys, 0), plan.key_chunks);
  const auto key_of = [&](int n) { return (end - 1 - n * plan.key_chunks) * Traits::kKeys; };

  const bool asks = threadIdx.x == Traits::kConsumers;
  if (asks) {
    mbarrier_init(&shared.queries, 1);
    ring.init(4);
  }
  __syncthreads();
  const bool is_asking = warp == 4 * Traits::kWarpgroups;
  if (is_asking) {
    if (asks) {
      rows.ask_queries<Traits::kSlabs>(queries, Traits::kRows, &query_map, &shared.queries);
      for (int n = 0; n < min(count, kAhead); ++n)
        ring.fill(&key_map, n, key_of(n), rows.h, rows.b);
    }
    __syncwarp();
  } else {
    launch_wait();  // for the sums of pass 1
    for (int r = threadIdx.x; r < Traits::kRows; r += Traits::kConsumers) {
      shared.minus_sums[stat_at(r)] = minus_log2_sum(p, rows, plan.row_chunks, r);
      shared.limits[stat_at(r)] = rows.limit(r);
    }
    mbarrier_wait(&shared.queries, 0);
    rows.clear_padding<Traits::kSlabs>(queries, Traits::kRows, Traits::kRows, Traits::kConsumers);
    async_proxy_fence();
  }
  __syncthreads();  // queries and row statistics are ready
  if (is_asking) {
    if (asks) {
      for (int n = kAhead; n < count; ++n) ring.fill(&key_map, n, key_of(n), rows.h, rows.b);
    }
    return;
  }

  float factor = 1;
  if (p.window_reduce == WindowReduce::kMean) {
    const int64_t real = min(max(p.first_query + p.window - rows.start, int64_t{1}), p.window);
    factor = 1.0f / static_cast<float>(real);
  }
  if (!p.votes_per_q_head() && p.group_reduce == GroupReduce::kMean) {
    factor /= static_cast<float>(p.q_per_kv());
  }
  float* votes =
      p.votes + ((rows.b * p.num_kv_heads + rows.h) * plan.row_groups + rows.group) * p.seq_len;
  const float* weights =
      p.weights ? p.weights + rows.b * p.weights_batch_stride + rows.h * p.weights_head_stride
                : nullptr;
  const int least = rows.least_limit();
  const uint64_t query_slab = wgmma_slab(queries);

  // Each warpgroup takes every kWarpgroups-th tile, kParts products each; one with none left works
  // on what the ring holds and drops it, so that all run the same loop.
  const auto issue = [&](float (&x)[Traits::kCols / 2], int n, int part) {
    const uint64_t tile = wgmma_slab(ring.stage(n));
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
  float sums[2][2] = {};
  const auto add = [&](const float (&x)[Traits::kCols / 2], int n, int part) {
    const int key0 = key_of(n);
    const float4* stats =
        reinterpret_cast<const float4*>(shared.minus_sums + part * Traits::kCols) + lane % 4;
    if (key0 < rows.start || key0 + Traits::kKeys - 1 > least) {
      const int4* limits =
          reinterpret_cast<const int4*>(shared.limits + part * Traits::kCols) + lane % 4;
#pragma unroll
      for (int c = 0; c < Traits::kCols / 16; ++c) {
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
      for (int c = 0; c < Traits::kCols / 16; ++c) {
        const float4 stat = stats[4 * c];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2, j = i / 4 * 2 + i % 2;
          const float minus = j == 0 ? stat.x : j == 1 ? stat.y : j == 2 ? stat.z : stat.w;
          sums[half][j % 2] += exp2_approx(fmaf(x[8 * c + i], p.scale_log2, minus));
        }
      }
    }
    if (part + 1 < Traits::kParts) return;
    // All rows are in.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float vote = sums[half][0] + sums[half][1];
      sums[half][0] = sums[half][1] = 0;
      vote += __shfl_xor_sync(0xffffffffu, vote, 1);
      vote += __shfl_xor_sync(0xffffffffu, vote, 2);
      const int key = key0 + warp % 4 * 16 + 8 * half + lane / 4;
      if (lane % 4 == 0 && n < count && key < num_scored) {
        vote *= factor;
        votes[key] = weights ? vote * weights[key] : vote;
      }
    }
  };

  for (int i = 0; i < count; i += Traits::kWarpgroups) {
    const int n = i + warpgroup;
    if (n < count) ring.wait(n);
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part) {
      float x[Traits::kCols / 2];
      issue(x, n, part);
      wgmma_wait<0>();
      hold(x);
      if (part + 1 == Traits::kParts && lane == 0 && n < count) ring.release(n);
      add(x, n, part);
    }
  }
}

// --- policy

Plan make_plan(const WindowScoresParams& p) {
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
  return {
      .padded_window = FastDivisor(static_cast<uint32_t>(padded_window)),
      .group_heads = static_cast<int>(group_heads),
      .rows = static_cast<int>(rows),
      .row_groups = static_cast<int>(p.row_groups()),
      .items = static_cast<int>(items),
      .row_chunks = chunks(p.seq_len, p.max_chunks),
      .key_chunks = chunks(p.num_scored, wanted),
      .warpgroups_m = row_tiles > 2 ? 4 : static_cast<int>(row_tiles),
  };
}

// --- launch

template <typename Traits, typename Kernel>
void launch(Kernel kernel, int64_t blocks, bool early, const WindowScoresParams& p,
            const Plan& plan, const CUtensorMap& queries, const CUtensorMap& keys,
            cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  Traits::kSharedBytes),
             kOp);
  Launch(static_cast<unsigned>(blocks), Traits::kThreads, Traits::kSharedBytes, stream)
      .early(early)(kOp, kernel, p, plan, queries, keys);
}

template <typename T, int kSteps>
void launch_passes(const WindowScoresParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p);
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
    launch<Traits>(row_sums_sm90a_kernel<Traits>, int64_t{plan.items} * plan.row_chunks, false, p,
                   plan, queries, keys(Traits::kKeys), stream);
  }
  const auto votes = [&](auto traits) {
    using Traits = decltype(traits);
    launch<Traits>(key_votes_sm90a_kernel<Traits>, int64_t{plan.items} * plan.key_chunks, !p.lse, p,
                   plan, queries, keys(Traits::kKeys), stream);
  };
  if (plan.rows <= 128) {  // below 128 rows memory is the bound: no kernel of their own
    votes(VoteTraits<T, kSteps, 128, 1>{});
  } else {
    votes(VoteTraits<T, kSteps, 128, 2>{});
  }
}

template <typename T>
void launch_head_dim(const WindowScoresParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) {
    launch_passes<T, 4>(p, stream);
  } else if (p.head_dim <= 96) {
    launch_passes<T, 6>(p, stream);
  } else {
    launch_passes<T, 8>(p, stream);
  }
}

}  // namespace

bool window_scores_fits_sm90a(const WindowScoresParams& p) {
  return p.dtype != DType::kFloat32 && p.head_dim <= 128 && p.window <= kRowGroup &&
         p.window_reduce != WindowReduce::kMax &&
         tma_takes<3>(p.k, {p.seq_len, p.num_kv_heads, p.batch},
                      {p.k_row_stride, p.k_head_stride, p.k_batch_stride}) &&
         tma_takes<3>(p.q, {p.window, p.num_q_heads, p.batch},
                      {p.q_row_stride, p.q_head_stride, p.q_batch_stride});
}

void window_votes_sm90a(const WindowScoresParams& p, void* stream) {
  if (p.dtype == DType::kFloat16) {
    launch_head_dim<__half>(p, static_cast<cudaStream_t>(stream));
  } else {
    launch_head_dim<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace kvc
