// topk of short rows: the keys of a row stay in the registers of one warp, four rows a block, or of
// the warps of a block. The j-th key of a thread is the one of entry kWarp * j + lane
// of its warp's stretch: a ballot over the j-th keys is a word of neighbouring entries.
// 1. Radix selection, eight bits a pass: open keys count themselves in a histogram in shared memory
//    by integer atomics, the same counts every run, then a warp finds the digit of the wanted key.
//    A histogram a pass, so none is cleared in between. It ends when all that is open is kept, or
//    at the last bit.
// 2. Ballots give each kept entry its slot; ties go to the smallest positions.
// Bound: 4 bytes a score read once, 4 bytes a kept entry written once; where rows are many, about
// 40 instructions a score. No scratch.
#include "device/launch.cuh"
#include "device/limits.cuh"
#include "select/slice_bits.cuh"
#include "select/topk_short.h"
#include "select/topk_task.cuh"

namespace kvc {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kPasses = 32 / kDigitBits;

template <int kThreads_, int kKeys_>
struct Traits {
  static constexpr int kThreads = kThreads_;  // of a row: threadIdx.x
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = kWarps == 1 ? 4 : 1;  // of a block: threadIdx.y
  static constexpr int kKeys = kKeys_;               // of a thread
  static constexpr int kWarpKeys = kWarp * kKeys;
};

struct Digit {
  uint32_t value, count;  // keys that have it
  uint32_t above;         // keys that have a higher one
};

// Of a row.
template <typename T>
struct Shared {
  union {
    alignas(16) uint32_t counts[kPasses][kDigits];
    uint16_t staged[T::kWarps][T::kWarpKeys];  // positions on their way out
  };
  Digit digit;
  uint32_t warp_above[T::kWarps], warp_tied[T::kWarps];
};

template <typename T>
__device__ __forceinline__ void row_sync() {
  if constexpr (T::kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The digit of the rank-th largest key. A warp.
__device__ __forceinline__ Digit pick_digit(const uint32_t* counts, uint32_t rank) {
  constexpr int kOwn = kDigits / kWarp;
  // lane l takes the l-th highest digits
  const uint32_t lowest = kDigits - (threadIdx.x % kWarp + 1) * kOwn;
  uint32_t own[kOwn], sum = 0;
#pragma unroll
  for (int j = 0; j < kOwn; j += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(counts + lowest + j);
    own[j] = four.x, own[j + 1] = four.y, own[j + 2] = four.z, own[j + 3] = four.w;
    sum += four.x + four.y + four.z + four.w;
  }
  const uint32_t through = warp_inclusive_sum(sum);
  Digit digit{.value = lowest + kOwn - 1, .count = own[kOwn - 1], .above = through - sum};
  const bool has_it = digit.above < rank && rank <= through;
#pragma unroll
  for (int j = kOwn - 1; j > 0; --j) {
    if (digit.value == lowest + j && digit.above + own[j] < rank) {
      digit = {.value = lowest + j - 1, .count = own[j - 1], .above = digit.above + own[j]};
    }
  }
  const int owner = __ffs(__ballot_sync(kAll, has_it)) - 1;
  return {.value = __shfl_sync(kAll, digit.value, owner),
          .count = __shfl_sync(kAll, digit.count, owner),
          .above = __shfl_sync(kAll, digit.above, owner)};
}

// The same for all warps of the row.
template <typename T>
__device__ __forceinline__ Digit find_digit(Shared<T>& shared, const uint32_t* counts,
                                            uint32_t rank) {
  if constexpr (T::kWarps == 1) return pick_digit(counts, rank);
  if (threadIdx.x < kWarp) {
    const Digit digit = pick_digit(counts, rank);
    if (threadIdx.x == 0) shared.digit = digit;
  }
  __syncthreads();
  return shared.digit;
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads* T::kRows, 1024 / (T::kThreads * T::kRows))
    topk_short_kernel(const __grid_constant__ TopkParams p) {
  __shared__ Shared<T> shared_of[T::kRows];
  Shared<T>& shared = shared_of[threadIdx.y];
  for (int i = threadIdx.x; i < kPasses * kDigits / 4; i += T::kThreads) {
    reinterpret_cast<uint4*>(shared.counts)[i] = uint4{};
  }
  launch_wait();
  launch_dependents();

  // who am I, and what is there to choose
  const auto rows = static_cast<uint32_t>(p.batch * p.heads);
  const uint32_t row_id = blockIdx.x * T::kRows + threadIdx.y;
  const bool is_row = row_id < rows;
  const Task task = find_task<T>(shared.warp_above, p, min(row_id, rows - 1), is_row);
  if (!is_row) return;
  task.write_forced<T>(0, 1);
  if (!task.has_choice()) return;

  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t first = warp * T::kWarpKeys + lane;
  const float* at = task.scores + task.begin + first;
  float scores[T::kKeys];
  uint32_t keys[T::kKeys];
#pragma unroll
  for (int j = 0; j < T::kKeys; ++j) {
    scores[j] = first + j * kWarp < task.free ? __ldg(at + j * kWarp) : 0;
  }
#pragma unroll
  for (int j = 0; j < T::kKeys; ++j) {
    keys[j] = first + j * kWarp < task.free ? key_of(scores[j]) : kTopkPadding;
  }

  // 1. the wanted-th largest key: the rank-th largest of [low, high]; padding lies below it
  uint32_t low = 0, rank = task.wanted;
  int shift = 32 - kDigitBits;
  row_sync<T>();
#pragma unroll 1
  for (uint32_t* counts = shared.counts[0];; counts += kDigits, shift -= kDigitBits) {
#pragma unroll
    for (int j = 0; j < T::kKeys; ++j) {
      const uint32_t digit = (keys[j] - low) >> shift;  // wraps for keys below
      if (digit < kDigits) atomicAdd(counts + digit, 1u);
    }
    row_sync<T>();
    const Digit digit = find_digit(shared, counts, rank);
    low += digit.value << shift;
    rank -= digit.above;
    if (digit.count == rank || shift == 0) break;
  }

  // 2. positions: lane l takes the word of its warp's l-th 32 entries
  const uint32_t high = low + ((1u << shift) - 1);
  uint2 bits{}, before{};  // above the open keys, and they themselves
#pragma unroll
  for (int j = 0; j < T::kKeys; ++j) {
    const uint32_t above = __ballot_sync(kAll, keys[j] > high);
    const uint32_t reached = __ballot_sync(kAll, keys[j] >= low);
    if (lane == j) bits = {above, reached & ~above};
  }
  if constexpr (T::kWarps > 1) {
    const uint32_t above = __reduce_add_sync(kAll, __popc(bits.x));
    const uint32_t tied = __reduce_add_sync(kAll, __popc(bits.y));
    if (lane == 0) {
      shared.warp_above[warp] = above;
      shared.warp_tied[warp] = tied;
    }
    __syncthreads();
    before.x = __reduce_add_sync(kAll, lane < warp ? shared.warp_above[lane] : 0);
    before.y = __reduce_add_sync(kAll, lane < warp ? shared.warp_tied[lane] : 0);
  }
  __syncwarp();
  int32_t* out = task.out + task.sink + before.x + min(before.y, rank);
  write_group(shared.staged[warp], bits, rank, before.y, task.begin + warp * T::kWarpKeys, out);
}

template <int kThreads, int kKeys>
void launch(const TopkParams& p, cudaStream_t stream) {
  using T = Traits<kThreads, kKeys>;
  const auto blocks = static_cast<unsigned>((p.batch * p.heads + T::kRows - 1) / T::kRows);
  Launch(blocks, dim3(T::kThreads, T::kRows), 0, stream)
      .early(device_limits().major >= 9)("topk", topk_short_kernel<T>, p);
}

// Few keys a thread are the fastest as long as all threads are resident at once: 8 x 1024, 32 or 8
// keys a thread, 6.5 and 4.2 us, 264 x 4096 9.2 and 8.0; many where rows follow each other: 8192 x
// 1024 30.9 and 40.9, 528 x 4096 11.3 and 13.9.
bool are_few(const TopkParams& p) {
  return p.batch * p.heads * p.seq_len <= int64_t{8} * 1024 * device_limits().multiprocessors;
}

}  // namespace

// Of 16384 entries 8 rows take 9.1 us, with two reads in a cluster 8.8.
bool topk_short_pays(const TopkParams& p) {
  return p.seq_len <= 8192;
}

void topk_short(const TopkParams& p, cudaStream_t stream) {
  const int64_t size = p.seq_len;
  if (size <= 256) return launch<32, 8>(p, stream);
  if (are_few(p)) {
    if (size <= 512) return launch<64, 8>(p, stream);
    if (size <= 1024) return launch<128, 8>(p, stream);
    if (size <= 2048) return launch<256, 8>(p, stream);
    if (size <= 4096) return launch<512, 8>(p, stream);
    return launch<1024, 8>(p, stream);
  }
  if (size <= 512) return launch<32, 16>(p, stream);
  if (size <= 1024) return launch<32, 32>(p, stream);
  if (size <= 2048) return launch<128, 16>(p, stream);
  if (size <= 4096) return launch<128, 32>(p, stream);
  launch<256, 32>(p, stream);
}

}  // namespace kvc
