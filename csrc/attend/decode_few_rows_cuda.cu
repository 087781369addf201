// Decode attention for up to 16 packed query rows of 16-bit elements, head_dim up to 128: the usual
// step.
//
// Block = one worker of kWarps warps; its part of the line is cut into steps of 16 keys, which its
// warps take in turn. K and V go straight from memory to the registers that the tensor cores read,
// 16 bytes a lane and load, and no lane waits for another until the store ends:
//   keys x rows:    A = K. The order of head_dim inside a product is free, as long as Q has the
//   same: lane
//                   l reads units l % 4, l % 4 + 4, ... of keys l / 4 and l / 4 + 8, as they are.
//   head_dim x rows: A = V^T. Lane l reads unit l / 4 of keys 2 (l % 4), the next, and these + 8;
//   one byte
//                   permutation makes pairs of keys. Rows of A are then head_dim 8 (l / 4) + 2 i
//                   and the next: each lane ends with 8 neighbouring elements of the output of two
//                   query rows.
// The registers of K are filled with the next step's keys as soon as the logits are there, those of
// V after the output: 8 KB a warp are under way at all times, across the borders of stores.
//
// At the end of a store the warps' sums meet in shared memory and one partial result leaves for
// scratch, or the result itself where the worker has all tiles of the store. Bound: K and V once.
// No atomics: the same bits every run. With one row of the batch a worker has two to five steps a
// warp, so what stands in front of the first loads counts: parameters are planned on the host,
// arithmetic is 32-bit, and what needs no memory is done while the launch in front ends.
#include <algorithm>
#include <type_traits>

#include "attend/decode_attention.h"
#include "attend/decode_kernels.cuh"
#include "device/cache.cuh"
#include "device/dispatch.cuh"
#include "device/limits.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"

namespace kvc {
namespace {

template <typename T, int kDim_, int kBlocks_, bool kIsFull_>
struct Few {
  using Element = T;
  static constexpr int kDim = kDim_;
  static constexpr bool kIsFull = kIsFull_;  // head_dim is kDim, not less
  static constexpr int kBlocks = kBlocks_;   // of 8 query rows
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kKeys = static_cast<int>(kStepKeys);
  static constexpr int kRows = 8 * kBlocks;
  static constexpr int kKeyUnits = kDim / 32;    // 16-byte units of a key that a lane holds
  static constexpr int kValueUnits = kDim / 64;  // of a value
  static constexpr int kRowFloats = kDim + 4;    // of a row's sums in shared memory
  // Short rows keep fewer bytes under way: two blocks a multiprocessor then.
  static constexpr int kResident = kDim == 64 && kBlocks == 1 ? 2 : 1;
  // Three quarters of a multiprocessor's, so that a block of the merge may wait beside.
  static constexpr int kRegisters = kResident == 2 ? 128 : kBlocks == 1 ? 192 : 255;
  // exp2 starts this far above 1, so that half precision does not lose small probabilities.
  static constexpr float kHeadroom = std::is_same_v<T, __half> ? 12.0f : 0.0f;
  static_assert(kDim % 64 == 0 && kWarps % 4 == 0);
};

// Past L1: nobody reads it twice.
__device__ __forceinline__ void load_unit(uint32_t (&to)[4], const void* from) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}

__device__ __forceinline__ uint32_t low_halves(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, 0x7632);
}

// Bytes from one row of K or V to the next; decode_few_rows_fits sees to it that 32 bits do.
__device__ __forceinline__ uint32_t row_bytes(int64_t row_stride) {
  return static_cast<uint32_t>(row_stride) * 2;
}

// The steps of a worker, one after the other, as one of its warps takes them.
struct Steps {
  const char *k, *v;
  uint32_t store, length;
  uint32_t step, first, end;  // of this store; the worker's are [first, end)
  uint32_t left;              // in later stores
};

// The part of steps.store that begins with step `first`; the store is not empty.
template <typename X>
__device__ __forceinline__ void open_store(const DecodeAttentionParams& p, Steps& at,
                                           uint32_t first, int warp) {
  at.length = length_of(p, at.store);
  const uint32_t count = min(at.left, (at.length + X::kKeys - 1) / X::kKeys - first);
  if (p.row_start != nullptr) {
    const int64_t row = p.row_start[at.store];
    at.k = static_cast<const char*>(p.k) + row * row_bytes(p.k_row_stride);
    at.v = static_cast<const char*>(p.v) + row * row_bytes(p.v_row_stride);
  } else {
    const uint32_t b = p.row_of_batch(at.store);
    const uint32_t h = at.store - b * static_cast<uint32_t>(p.num_kv_heads);
    at.k = static_cast<const char*>(p.k) + (b * p.k_batch_stride + h * p.k_head_stride) * 2;
    at.v = static_cast<const char*>(p.v) + (b * p.v_batch_stride + h * p.v_head_stride) * 2;
  }
  at.first = first;
  at.step = first + warp;
  at.end = first + count;
  at.left -= count;
}
template <typename X>
__device__ __forceinline__ bool next_store(const DecodeAttentionParams& p, Steps& at, int warp) {
  if (at.left == 0) return false;
  do ++at.store;
  while (length_of(p, at.store) == 0);
  open_store<X>(p, at, 0, warp);
  return true;
}

template <typename X>
struct Warp {
  using T = typename X::Element;
  uint32_t q[X::kBlocks][X::kKeyUnits][4];
  uint32_t keys[2][X::kKeyUnits][4];
  uint32_t values[4][X::kValueUnits][4];
  float out[X::kValueUnits][4][X::kBlocks][4];  // [.][i]: head_dim 8 (l / 4) + 2 i and the next
  float most[X::kBlocks][2], sum[X::kBlocks][2];
  uint32_t behind[X::kBlocks][2];  // new tokens behind the row's own, which it does not see
  // Of a lane, in bytes; behind head_dim: a valid one.
  uint32_t key_unit[X::kKeyUnits], value_unit[X::kValueUnits];

  __device__ __forceinline__ void place(const DecodeAttentionParams& p, int lane) {
    const int last = (static_cast<int>(p.head_dim) - 8) * 2;
#pragma unroll
    for (int i = 0; i < X::kKeyUnits; ++i) {
      key_unit[i] = (lane % 4 + 4 * i) * 16;
      if (!X::kIsFull) key_unit[i] = min(static_cast<int>(key_unit[i]), last);
    }
#pragma unroll
    for (int i = 0; i < X::kValueUnits; ++i) {
      value_unit[i] = (lane / 4 + 8 * i) * 16;
      if (!X::kIsFull) value_unit[i] = min(static_cast<int>(value_unit[i]), last);
    }
#pragma unroll
    for (int i = 0; i < X::kBlocks * 2; ++i) {
      const uint32_t r = i / 2 * 8 + lane % 4 * 2 + i % 2;
      const uint32_t queries = static_cast<uint32_t>(p.num_queries);
      behind[i / 2][i % 2] = queries - 1 - (r - p.by_queries.quotient(r) * queries);
    }
  }

  // Rows behind the entries are read as the last entry: it is there, and what comes of it is
  // dropped.
  __device__ __forceinline__ void load_keys(const DecodeAttentionParams& p, const Steps& at,
                                            int lane) {
    const uint32_t first = at.step * X::kKeys + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = min(first + 8 * half, at.length - 1);
      const char* from = at.k + static_cast<uint64_t>(row) * row_bytes(p.k_row_stride);
#pragma unroll
      for (int i = 0; i < X::kKeyUnits; ++i) load_unit(keys[half][i], from + key_unit[i]);
    }
  }
  __device__ __forceinline__ void load_values(const DecodeAttentionParams& p, const Steps& at,
                                              int lane) {
    const uint32_t first = at.step * X::kKeys + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = min(first + i % 2 + i / 2 * 8, at.length - 1);
      const char* from = at.v + static_cast<uint64_t>(row) * row_bytes(p.v_row_stride);
#pragma unroll
      for (int unit = 0; unit < X::kValueUnits; ++unit) {
        load_unit(values[i][unit], from + value_unit[unit]);
      }
    }
  }

  // The query rows of a store; where there are fewer than kRows, the last one again.
  __device__ __forceinline__ void load_queries(const DecodeAttentionParams& p, uint32_t store,
                                               int rows, int lane) {
#pragma unroll
    for (int block = 0; block < X::kBlocks; ++block) {
      const int r = min(block * 8 + lane / 4, rows - 1);
      const char* row = static_cast<const char*>(p.q) + p.q_offset(store, r) * 2;
#pragma unroll
      for (int i = 0; i < X::kKeyUnits; ++i) load_unit(q[block][i], row + key_unit[i]);
    }
  }
  // Of a store, once its query rows are under way.
  __device__ __forceinline__ void start(const DecodeAttentionParams& p, int lane) {
#pragma unroll
    for (int i = 0; i < X::kBlocks * 2; ++i) {
      most[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0;
    }
#pragma unroll
    for (int i = 0; i < X::kValueUnits * 16 * X::kBlocks; ++i) {
      out[i / (16 * X::kBlocks)][i / (4 * X::kBlocks) % 4][i / 4 % X::kBlocks][i % 4] = 0;
    }
    if constexpr (!X::kIsFull) {  // behind head_dim keys are read twice
#pragma unroll
      for (int i = 0; i < X::kKeyUnits; ++i) {
        if ((lane % 4 + 4 * i) * 8 < p.head_dim) continue;
#pragma unroll
        for (int j = 0; j < X::kBlocks * 4; ++j) q[j / 4][i][j % 4] = 0;
      }
    }
  }

  // x[block] = <k, q>: lane l holds keys l / 4 (first two) and l / 4 + 8 of rows 2 (l % 4) and the
  // next.
  __device__ __forceinline__ void logits(float (&x)[X::kBlocks][4]) const {
    float odd[X::kBlocks][4];
#pragma unroll
    for (int i = 0; i < X::kBlocks * 4; ++i) x[i / 4][i % 4] = odd[i / 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < X::kKeyUnits; ++i) {
      const uint32_t low[4] = {keys[0][i][0], keys[1][i][0], keys[0][i][1], keys[1][i][1]};
      const uint32_t high[4] = {keys[0][i][2], keys[1][i][2], keys[0][i][3], keys[1][i][3]};
#pragma unroll
      for (int block = 0; block < X::kBlocks; ++block) {
        multiply_add<T>(x[block], low, q[block][i][0], q[block][i][1]);
        multiply_add<T>(odd[block], high, q[block][i][2], q[block][i][3]);
      }
    }
#pragma unroll
    for (int i = 0; i < X::kBlocks * 4; ++i) x[i / 4][i % 4] += odd[i / 4][i % 4];
  }

  // Logits become exp2(x - max + headroom), and the sums of before shrink to the new max.
  __device__ __forceinline__ void softmax(const DecodeAttentionParams& p, float (&x)[X::kBlocks][4],
                                          const Steps& at, uint32_t step, int rows, int lane) {
    const uint32_t key = step * X::kKeys + lane / 4;
    if (p.logits != nullptr) return_logits(p, x, at, key, rows, lane);
    float now[X::kBlocks][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < X::kBlocks * 2; ++i) {
      const int block = i / 2, column = i % 2;
      float& early = x[block][column];
      float& late = x[block][2 + column];
      const uint32_t seen = key + behind[block][column];
      early = seen < at.length ? early * p.scale_log2 : -INFINITY;
      late = seen + 8 < at.length ? late * p.scale_log2 : -INFINITY;
      float highest = fmaxf(early, late);
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
      }
      now[block][column] = fmaxf(most[block][column], highest);
      grown |= now[block][column] > most[block][column];
    }
    if (p.step_logits != nullptr) leave_logits(p, x, at.store, step, rows, lane);
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int i = 0; i < X::kBlocks * 2; ++i) {
        const int block = i / 2, column = i % 2;
        const float factor = decay(most[block][column], now[block][column]);
        most[block][column] = now[block][column];
        sum[block][column] *= factor;
#pragma unroll
        for (int j = 0; j < X::kValueUnits * 4; ++j) {
          out[j / 4][j % 4][block][column] *= factor;
          out[j / 4][j % 4][block][2 + column] *= factor;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < X::kBlocks * 4; ++i) {
      const float highest = most[i / 4][i % 2];
      const float shift = highest == -INFINITY ? 0.0f : highest - X::kHeadroom;
      x[i / 4][i % 4] = exp2_approx(x[i / 4][i % 4] - shift);
      sum[i / 4][i % 2] += x[i / 4][i % 4];
    }
  }

  __device__ __forceinline__ void return_logits(const DecodeAttentionParams& p,
                                                const float (&x)[X::kBlocks][4], const Steps& at,
                                                uint32_t key, int rows, int lane) const {
#pragma unroll
    for (int i = 0; i < X::kBlocks * 4; ++i) {
      const int r = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const uint32_t j = key + i % 4 / 2 * 8;
      if (r < rows && j + behind[i / 4][i % 2] < at.length) {
        p.logits[p.out_row(at.store, r) * p.width + j] = x[i / 4][i % 4] * p.softmax_scale;
      }
    }
  }

  // Logits in base 2 for the merge to look at; see step_logit, of which this is the start of a
  // step.
  __device__ __forceinline__ void leave_logits(const DecodeAttentionParams& p,
                                               const float (&x)[X::kBlocks][4], uint32_t store,
                                               uint32_t step, int rows, int lane) const {
    const uint32_t steps = (static_cast<uint32_t>(p.width) + X::kKeys - 1) / X::kKeys;
    const uint32_t pairs = (rows + 1) / 2;
    float4* to = reinterpret_cast<float4*>(p.step_logits) +
                 static_cast<uint64_t>((store * steps + step) * pairs) * 8 + lane / 4;
#pragma unroll
    for (int block = 0; block < X::kBlocks; ++block) {
      const uint32_t pair = block * 4 + lane % 4;
      if (pair >= pairs) continue;
      store_kept(to + pair * 8, make_float4(x[block][0], x[block][1], x[block][2], x[block][3]));
    }
  }

  // out += v^T p. p enters as the sum of two numbers of T: rounding to one would cost half the
  // accuracy of the result, and the tensor cores wait for memory anyway.
  __device__ __forceinline__ void add_values(const float (&p)[X::kBlocks][4]) {
    uint32_t high[X::kBlocks][2], low[X::kBlocks][2];
#pragma unroll
    for (int block = 0; block < X::kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const SplitPair pair = split<T>(p[block][2 * half], p[block][2 * half + 1]);
        high[block][half] = transpose_matrix(pair.high);
        low[block][half] = transpose_matrix(pair.low);
      }
    }
#pragma unroll
    for (int unit = 0; unit < X::kValueUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a[4] = {low_halves(values[0][unit][i], values[1][unit][i]),
                               high_halves(values[0][unit][i], values[1][unit][i]),
                               low_halves(values[2][unit][i], values[3][unit][i]),
                               high_halves(values[2][unit][i], values[3][unit][i])};
#pragma unroll
        for (int block = 0; block < X::kBlocks; ++block) {
          multiply_add<T>(out[unit][i][block], a, high[block][0], high[block][1]);
          multiply_add<T>(out[unit][i][block], a, low[block][0], low[block][1]);
        }
      }
    }
  }
};

// The whole block: the sums of its warps become a partial result, or the result where all tiles of
// the store are the worker's. sums holds kRowFloats for each warp and row.
template <typename X>
__device__ __forceinline__ void flush(const DecodeAttentionParams& p, Warp<X>& warp_state,
                                      float* sums, const Steps& at, int rows, int warp, int lane) {
  using T = typename X::Element;
  __shared__ __align__(16) float most_of[X::kRows][X::kWarps], sum_of[X::kRows][X::kWarps];
  const auto read = [](const float (&from)[X::kWarps], float (&to)[X::kWarps]) {
#pragma unroll
    for (int w = 0; w < X::kWarps; w += 4) {
      *reinterpret_cast<float4*>(to + w) = *reinterpret_cast<const float4*>(from + w);
    }
  };
  const auto largest = [](const float (&of)[X::kWarps]) {
    float x = of[0];
#pragma unroll
    for (int w = 1; w < X::kWarps; ++w) x = fmaxf(x, of[w]);
    return x;
  };
#pragma unroll
  for (int i = 0; i < X::kBlocks * 2; ++i) {
    float& sum = warp_state.sum[i / 2][i % 2];
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    warp_state.most[i / 2][i % 2] -= X::kHeadroom;
    if (lane < 4) {
      most_of[i / 2 * 8 + lane * 2 + i % 2][warp] = warp_state.most[i / 2][i % 2];
      sum_of[i / 2 * 8 + lane * 2 + i % 2][warp] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < X::kBlocks * 2; ++i) {
    const int block = i / 2, column = i % 2, r = block * 8 + lane % 4 * 2 + column;
    if (r >= rows) continue;
    float most[X::kWarps];
    read(most_of[r], most);
    const float factor = decay(warp_state.most[block][column], largest(most));
    float* to = sums + (warp * rows + r) * X::kRowFloats + lane / 4 * 8;
#pragma unroll
    for (int unit = 0; unit < X::kValueUnits; ++unit) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const auto& a = warp_state.out[unit][j][block];
        const auto& b = warp_state.out[unit][j + 1][block];
        *reinterpret_cast<float4*>(to + unit * 64 + j * 2) = make_float4(
            a[column] * factor, a[2 + column] * factor, b[column] * factor, b[2 + column] * factor);
      }
    }
  }
  __syncthreads();
  const uint32_t tiles = (at.length + X::kKeys - 1) / X::kKeys;
  const bool is_whole = at.first == 0 && at.end == tiles;
  const int64_t first = attend_slot(blockIdx.x, at.store) * p.slice();
  for (int i = threadIdx.x; i < rows * (X::kDim / 4); i += X::kThreads) {
    const int r = i / (X::kDim / 4), d = i % (X::kDim / 4) * 4;
    if (!X::kIsFull && d >= p.head_dim) continue;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < X::kWarps; ++w) {
      const float4 part =
          *reinterpret_cast<const float4*>(sums + (w * rows + r) * X::kRowFloats + d);
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
    const bool is_first = d == 0;
    if (is_whole || is_first) {
      float most[X::kWarps], sum_by_warp[X::kWarps], sum = 0;
      read(most_of[r], most);
      read(sum_of[r], sum_by_warp);
      const float highest = largest(most);
#pragma unroll
      for (int w = 0; w < X::kWarps; ++w) sum += sum_by_warp[w] * decay(most[w], highest);
      if (is_first) {
        reinterpret_cast<float2*>(p.partial_stats)[first + r] = make_float2(highest, sum);
      }
      if (is_whole) {
        const int64_t out_row = p.out_row(at.store, r);
        if (is_first) p.lse[out_row] = natural_lse(highest, sum);
        T* out = static_cast<T*>(p.out) + out_row * p.head_dim + d;
        *reinterpret_cast<uint2*>(out) =
            make_uint2(pack<T>(normalised(total.x, sum), normalised(total.y, sum)),
                       pack<T>(normalised(total.z, sum), normalised(total.w, sum)));
        continue;
      }
    }
    *reinterpret_cast<float4*>(p.partial_out + (first + r) * p.head_dim + d) = total;
  }
  if (threadIdx.x == 0) leave_owner(p, at.store, at.first, at.end, tiles, is_whole);
}

template <typename X>
__global__ void __maxnreg__(X::kRegisters)
    decode_few_rows_kernel(const __grid_constant__ DecodeAttentionParams p) {
  extern __shared__ __align__(16) float sums[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rows = p.rows;
  // What depends on parameters alone is done while the launch before ends.
  fetch_params(p);
  if (p.lengths.data != nullptr) launch_wait();
  PartStart part;
  if (!find_part<X::kKeys, X::kWarps>(p, part)) return;

  Steps ahead{.store = part.store, .left = part.count};  // what is under way
  open_store<X>(p, ahead, part.at, warp);
  if (p.lengths.data == nullptr) launch_wait();
  launch_dependents();
  Steps block = ahead;  // the store that all warps are in
  while (ahead.step >= ahead.end && next_store<X>(p, ahead, warp)) {
  }
  Warp<X> state;
  state.place(p, lane);
  if (ahead.step < ahead.end) {
    state.load_keys(p, ahead, lane);
    state.load_values(p, ahead, lane);
  }
  state.load_queries(p, block.store, rows, lane);
  while (true) {
    state.start(p, lane);
    while (ahead.step < ahead.end && ahead.store == block.store) {
      float x[X::kBlocks][4];
      state.logits(x);
      const uint32_t step = ahead.step;
      ahead.step += X::kWarps;
      while (ahead.step >= ahead.end && next_store<X>(p, ahead, warp)) {
      }
      const bool is_there = ahead.step < ahead.end;
      if (is_there) state.load_keys(p, ahead, lane);
      state.softmax(p, x, block, step, rows, lane);
      state.add_values(x);
      if (is_there) state.load_values(p, ahead, lane);
    }
    const Steps done = block;
    const bool has_next = next_store<X>(p, block, warp);
    if (has_next) state.load_queries(p, block.store, rows, lane);
    flush<X>(p, state, sums, done, rows, warp, lane);
    if (!has_next) return;
    __syncthreads();  // sums and stats may be written again
  }
}

template <typename X>
int64_t launch(DecodeAttentionParams p, cudaStream_t stream) {
  const int shared_bytes = static_cast<int>(X::kWarps * p.rows * X::kRowFloats * sizeof(float));
  const int64_t workers =
      std::min<int64_t>(p.max_workers, X::kResident * device_limits().multiprocessors);
  if (workers == 0) return 0;
  p.parts = AttendPlan(p.num_rows(), workers);
  Launch(static_cast<unsigned>(workers), X::kThreads, shared_bytes, stream)
      .early(device_limits().major >= 9)("decode_attention", decode_few_rows_kernel<X>, p);
  return workers;
}

template <typename T, int kDim, bool kIsFull>
int64_t launch_rows(const DecodeAttentionParams& p, cudaStream_t stream) {
  return p.rows <= 8 ? launch<Few<T, kDim, 1, kIsFull>>(p, stream)
                     : launch<Few<T, kDim, 2, kIsFull>>(p, stream);
}

template <typename T>
int64_t launch_size(const DecodeAttentionParams& p, cudaStream_t stream) {
  if (p.head_dim == 128) return launch_rows<T, 128, true>(p, stream);
  if (p.head_dim == 64) return launch_rows<T, 64, true>(p, stream);
  return p.head_dim > 64 ? launch_rows<T, 128, false>(p, stream)
                         : launch_rows<T, 64, false>(p, stream);
}

}  // namespace

bool decode_few_rows_fits(const DecodeAttentionParams& p) {
  const auto address = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const int64_t strides = p.q_batch_stride | p.q_head_stride | p.q_row_stride | p.k_batch_stride |
                          p.k_head_stride | p.k_row_stride | p.v_batch_stride | p.v_head_stride |
                          p.v_row_stride;
  constexpr int64_t kMost = int64_t{1} << 31;  // what the kernel counts in 32 bits
  return p.dtype != DType::kFloat32 && p.head_dim <= 128 && p.rows <= 16 && address(p.q) &&
         address(p.k) && address(p.v) && strides % 8 == 0 && p.width < kMost - 64 &&
         p.k_row_stride < kMost && p.v_row_stride < kMost;
}

int64_t decode_few_rows_cuda(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) return launch_size<__half>(params, stream);
  return launch_size<__nv_bfloat16>(params, stream);
}

}  // namespace kvc
