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
// scratch. Bound: K and V once. No atomics: the same bits every run.
#include <algorithm>
#include <type_traits>

#include "attend/decode_attention.h"
#include "attend/decode_kernels.cuh"
#include "device/dispatch.cuh"
#include "device/limits.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"

namespace kvc {
namespace {

template <typename T, int kDim_, int kBlocks_>
struct Few {
  using Element = T;
  static constexpr int kDim = kDim_;
  static constexpr int kBlocks = kBlocks_;  // of 8 query rows
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kKeys = static_cast<int>(kStepKeys);
  static constexpr int kRows = 8 * kBlocks;
  static constexpr int kKeyUnits = kDim / 32;    // 16-byte units of a key that a lane holds
  static constexpr int kValueUnits = kDim / 64;  // of a value
  static constexpr int kRowFloats = kDim + 4;    // of a row's sums in shared memory
  // Short rows keep fewer bytes under way: two blocks a multiprocessor then.
  static constexpr int kResident = kDim == 64 && kBlocks == 1 ? 2 : 1;
  // exp2 starts this far above 1, so that half precision does not lose small probabilities.
  static constexpr float kHeadroom = std::is_same_v<T, __half> ? 12.0f : 0.0f;
  static_assert(kDim % 64 == 0);
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

template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  const T a = from_float<T>(x), b = from_float<T>(y);
  return reinterpret_cast<const uint16_t&>(a) |
         static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(b)) << 16;
}
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// The steps of a worker, one after the other, as one of its warps takes them.
template <typename X>
struct Steps {
  using T = typename X::Element;
  const T *k, *v;
  int64_t store, length;
  uint32_t step, end, left;  // in this store; of the worker in later stores

  // The part of the next store that has one.
  __device__ __forceinline__ void open(const DecodeAttentionParams& p, uint32_t first, int warp) {
    length = p.length(store);
    const uint32_t tiles = static_cast<uint32_t>((length + X::kKeys - 1) / X::kKeys);
    const uint32_t count = min(left, tiles - first);
    k = static_cast<const T*>(p.k) + p.k_offset(store);
    v = static_cast<const T*>(p.v) + p.v_offset(store);
    step = first + warp;
    end = first + count;
    left -= count;
  }
  __device__ __forceinline__ bool next_store(const DecodeAttentionParams& p, int warp) {
    if (left == 0) return false;
    do ++store;
    while (p.length(store) == 0);
    open(p, 0, warp);
    return true;
  }
  // To this warp's next step, in this store or a later one.
  __device__ __forceinline__ void advance(const DecodeAttentionParams& p, int warp) {
    step += X::kWarps;
    while (step >= end && next_store(p, warp)) {
    }
  }
  __device__ __forceinline__ bool is_there() const { return step < end; }
  // Of this step, counted from its first.
  __device__ __forceinline__ int last_key() const {
    return static_cast<int>(min(length - static_cast<int64_t>(step) * X::kKeys,
                                static_cast<int64_t>(X::kKeys))) -
           1;
  }
};

template <typename X>
struct Warp {
  using T = typename X::Element;
  uint32_t q[X::kBlocks][X::kKeyUnits][4];
  uint32_t keys[2][X::kKeyUnits][4];
  uint32_t values[4][X::kValueUnits][4];
  float out[X::kValueUnits][4][X::kBlocks][4];  // [.][i]: head_dim 8 (l / 4) + 2 i and the next
  float most[X::kBlocks][2], sum[X::kBlocks][2];
  int key_unit[X::kKeyUnits],
      value_unit[X::kValueUnits];  // in elements; behind head_dim: a valid one

  __device__ __forceinline__ void place_units(int head_dim, int lane) {
#pragma unroll
    for (int i = 0; i < X::kKeyUnits; ++i) {
      key_unit[i] = min((lane % 4 + 4 * i) * 8, head_dim - 8);
    }
#pragma unroll
    for (int i = 0; i < X::kValueUnits; ++i) {
      value_unit[i] = min((lane / 4 + 8 * i) * 8, head_dim - 8);
    }
  }

  // Rows behind the entries are read as the last entry: it is there, and what comes of it is
  // dropped.
  __device__ __forceinline__ void load_keys(const DecodeAttentionParams& p, const Steps<X>& at,
                                            int lane) {
    const T* first = at.k + static_cast<int64_t>(at.step) * X::kKeys * p.k_row_stride;
    const int last = at.last_key();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* row = first + min(lane / 4 + 8 * half, last) * p.k_row_stride;
#pragma unroll
      for (int i = 0; i < X::kKeyUnits; ++i) load_unit(keys[half][i], row + key_unit[i]);
    }
  }
  __device__ __forceinline__ void load_values(const DecodeAttentionParams& p, const Steps<X>& at,
                                              int lane) {
    const T* first = at.v + static_cast<int64_t>(at.step) * X::kKeys * p.v_row_stride;
    const int last = at.last_key();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* row = first + min(lane % 4 * 2 + i % 2 + i / 2 * 8, last) * p.v_row_stride;
#pragma unroll
      for (int unit = 0; unit < X::kValueUnits; ++unit) {
        load_unit(values[i][unit], row + value_unit[unit]);
      }
    }
  }

  __device__ __forceinline__ void start(const DecodeAttentionParams& p, int64_t store, int rows,
                                        int lane) {
    const int head_dim = static_cast<int>(p.head_dim);
#pragma unroll
    for (int block = 0; block < X::kBlocks; ++block) {
      const int r = block * 8 + lane / 4;
      const T* row = static_cast<const T*>(p.q) + p.q_offset(store, min(r, rows - 1));
#pragma unroll
      for (int i = 0; i < X::kKeyUnits; ++i) {
        load_unit(q[block][i], row + key_unit[i]);
        if (r >= rows || (lane % 4 + 4 * i) * 8 >= head_dim) {
#pragma unroll
          for (int j = 0; j < 4; ++j) q[block][i][j] = 0;
        }
      }
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        most[block][column] = -INFINITY;
        sum[block][column] = 0;
      }
#pragma unroll
      for (int i = 0; i < X::kValueUnits * 16; ++i) out[i / 16][i / 4 % 4][block][i % 4] = 0;
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
                                          int64_t store, int64_t first, int64_t length, int rows,
                                          int lane) {
    float now[X::kBlocks][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < X::kBlocks * 2; ++i) {
      const int block = i / 2, column = i % 2;
      const int r = block * 8 + lane % 4 * 2 + column;
      const int behind = static_cast<int>(p.num_queries) - 1 - r % static_cast<int>(p.num_queries);
      float highest = -INFINITY;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t key = first + lane / 4 + half * 8;
        float& value = x[block][2 * half + column];
        const bool seen = key + behind < length;
        if (p.logits != nullptr && seen && r < rows) {
          p.logits[p.out_row(store, r) * p.width + key] = value * p.softmax_scale;
        }
        value = seen ? value * p.scale_log2 : -INFINITY;
        highest = fmaxf(highest, value);
      }
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
      }
      now[block][column] = fmaxf(most[block][column], highest);
      grown |= now[block][column] > most[block][column];
    }
    if (p.step_logits != nullptr) leave_logits(p, x, store, first, rows, lane);
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

  // Logits in base 2 for the merge to look at; see step_logit.
  __device__ __forceinline__ void leave_logits(const DecodeAttentionParams& p,
                                               const float (&x)[X::kBlocks][4], int64_t store,
                                               int64_t first, int rows, int lane) const {
    float* to = p.step_logits + step_logit(p, store, first, 0) + lane / 4 * 4;
#pragma unroll
    for (int block = 0; block < X::kBlocks; ++block) {
      const int pair = block * 4 + lane % 4;
      if (2 * pair >= rows) continue;
      *reinterpret_cast<float4*>(to + pair * 2 * X::kKeys) =
          make_float4(x[block][0], x[block][1], x[block][2], x[block][3]);
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
        const float x = p[block][2 * half], y = p[block][2 * half + 1];
        high[block][half] = transpose_matrix(pack<T>(x, y));
        low[block][half] = transpose_matrix(pack<T>(x - rounded<T>(x), y - rounded<T>(y)));
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

// The whole block: the sums of its warps become the partial result in `slot`. sums holds kRowFloats
// for each warp and row.
template <typename X>
__device__ __forceinline__ void flush(const DecodeAttentionParams& p, Warp<X>& warp_state,
                                      float* sums, int64_t slot, int rows, int warp, int lane) {
  __shared__ float2 stats[X::kWarps][X::kRows];
#pragma unroll
  for (int i = 0; i < X::kBlocks * 2; ++i) {
    float& sum = warp_state.sum[i / 2][i % 2];
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    warp_state.most[i / 2][i % 2] -= X::kHeadroom;
    if (lane < 4) {
      stats[warp][i / 2 * 8 + lane * 2 + i % 2] = make_float2(warp_state.most[i / 2][i % 2], sum);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < X::kBlocks * 2; ++i) {
    const int block = i / 2, column = i % 2, r = block * 8 + lane % 4 * 2 + column;
    if (r >= rows) continue;
    float highest = stats[0][r].x;
#pragma unroll
    for (int w = 1; w < X::kWarps; ++w) highest = fmaxf(highest, stats[w][r].x);
    const float factor = decay(warp_state.most[block][column], highest);
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
  const int64_t first = slot * p.slice();
  for (int i = threadIdx.x; i < rows * (X::kDim / 4); i += X::kThreads) {
    const int r = i / (X::kDim / 4), d = i % (X::kDim / 4) * 4;
    if (d >= p.head_dim) continue;
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
    *reinterpret_cast<float4*>(p.partial_out + (first + r) * p.head_dim + d) = total;
  }
  for (int r = threadIdx.x; r < rows; r += X::kThreads) {
    float highest = stats[0][r].x, sum = 0;
#pragma unroll
    for (int w = 1; w < X::kWarps; ++w) highest = fmaxf(highest, stats[w][r].x);
#pragma unroll
    for (int w = 0; w < X::kWarps; ++w) sum += stats[w][r].y * decay(stats[w][r].x, highest);
    reinterpret_cast<float2*>(p.partial_stats)[first + r] = make_float2(highest, sum);
  }
  __syncthreads();  // sums and stats may be written again
}

template <typename X>
__global__ void __launch_bounds__(X::kThreads, X::kResident)
    decode_few_rows_kernel(const __grid_constant__ DecodeAttentionParams p) {
  launch_wait();
  launch_dependents();
  extern __shared__ __align__(16) float sums[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rows = static_cast<int>(p.packed_rows());
  PartStart part;
  if (!find_part<X::kKeys, X::kThreads>(p, part)) return;

  Steps<X> ahead;  // whose keys and values are under way
  ahead.store = part.store;
  ahead.left = part.count;
  ahead.open(p, part.at, warp);
  Steps<X> block = ahead;  // the store that all warps are in
  while (!ahead.is_there() && ahead.next_store(p, warp)) {
  }
  Warp<X> state;
  state.place_units(static_cast<int>(p.head_dim), lane);
  state.start(p, block.store, rows, lane);
  if (ahead.is_there()) {
    state.load_keys(p, ahead, lane);
    state.load_values(p, ahead, lane);
  }
  while (true) {
    while (ahead.is_there() && ahead.store == block.store) {
      float x[X::kBlocks][4];
      state.logits(x);
      const int64_t step = ahead.step;
      ahead.advance(p, warp);
      if (ahead.is_there()) state.load_keys(p, ahead, lane);
      state.softmax(p, x, block.store, step * X::kKeys, block.length, rows, lane);
      state.add_values(x);
      if (ahead.is_there()) state.load_values(p, ahead, lane);
    }
    flush<X>(p, state, sums, attend_slot(blockIdx.x, block.store), rows, warp, lane);
    if (!block.next_store(p, warp)) return;
    state.start(p, block.store, rows, lane);
  }
}

template <typename X>
int64_t launch(const DecodeAttentionParams& p, cudaStream_t stream) {
  const int shared_bytes =
      static_cast<int>(X::kWarps * p.packed_rows() * X::kRowFloats * sizeof(float));
  const int64_t workers =
      std::min<int64_t>(p.max_workers, X::kResident * device_limits().multiprocessors);
  if (workers == 0) return 0;
  const auto kernel = decode_few_rows_kernel<X>;
  cuda_check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "decode_attention");
  Launch(static_cast<unsigned>(workers), X::kThreads, shared_bytes, stream)
      .early(device_limits().major >= 9)("decode_attention", kernel, p);
  return workers;
}

template <typename T>
int64_t launch_size(const DecodeAttentionParams& p, cudaStream_t stream) {
  const bool is_short = p.head_dim <= 64, is_one = p.packed_rows() <= 8;
  if (is_short) {
    return is_one ? launch<Few<T, 64, 1>>(p, stream) : launch<Few<T, 64, 2>>(p, stream);
  }
  return is_one ? launch<Few<T, 128, 1>>(p, stream) : launch<Few<T, 128, 2>>(p, stream);
}

}  // namespace

bool decode_few_rows_fits(const DecodeAttentionParams& p) {
  const auto address = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const int64_t strides = p.q_batch_stride | p.q_head_stride | p.q_row_stride | p.k_batch_stride |
                          p.k_head_stride | p.k_row_stride | p.v_batch_stride | p.v_head_stride |
                          p.v_row_stride;
  return p.dtype != DType::kFloat32 && p.head_dim <= 128 && p.packed_rows() <= 16 && address(p.q) &&
         address(p.k) && address(p.v) && strides % 8 == 0;
}

int64_t decode_few_rows_cuda(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) return launch_size<__half>(params, stream);
  return launch_size<__nv_bfloat16>(params, stream);
}

}  // namespace kvc
