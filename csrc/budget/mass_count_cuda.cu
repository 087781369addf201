// mass_count on CUDA: one launch, a block a row.
//
// A pass a digit (11, 10 and 10 bits): every entry adds itself to the count and to the sum of its
// bin, in shared memory; sums are 64-bit integers, added as two halves with the carry of the lower
// one, so they are the same every run. A scan of the bins from the highest down finds the one in
// which the wanted mass is reached; only its entries are looked at in the next pass. Zeros, of
// which a causal map has many, are skipped: no share above 0 needs them. Bound: 4 bytes an entry
// from memory once and from L2 twice; a block a row keeps as many multiprocessors busy as there
// are rows.
#include "budget/mass_count.h"
#include "device/check.cuh"
#include "device/reduce.cuh"

namespace kvc {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kOwn = kMassBins / kThreads;  // neighbouring bins of a thread, from the highest down
constexpr int kUnroll = 4;
static_assert(kWarps == kWarp);

struct Sum {
  int64_t units;
  uint32_t count;
};

struct Found {
  Sum above;  // of all bins above the one that is looked for
  uint32_t prefix, count;
};

struct Shared {
  uint32_t counts[kMassBins], low[kMassBins], high[kMassBins];
  Sum warps[kWarps];
  Found found;
};

__device__ __forceinline__ int64_t mass_units(float mass) {
  return __double2ll_rn(static_cast<double>(mass) * kMassUnits);
}

__device__ __forceinline__ void add(Shared& shared, uint32_t bin, int64_t units) {
  const auto low = static_cast<uint32_t>(units);
  const bool carry = atomicAdd(&shared.low[bin], low) > ~low;
  const uint32_t high = static_cast<uint32_t>(units >> 32) + carry;
  if (high != 0) atomicAdd(&shared.high[bin], high);
  atomicAdd(&shared.counts[bin], 1u);
}

// Adds the entries that begin with `prefix` to the bins of their next digit.
__device__ __forceinline__ void count_digit(Shared& shared, const float* mass, int64_t n,
                                            const MassDigit& digit, uint32_t prefix) {
  const int shift = digit.shift, top = shift + digit.bits;
  const uint32_t mask = (1u << digit.bits) - 1;
  for (int64_t first = threadIdx.x; first < n; first += kUnroll * kThreads) {
    float x[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t i = first + j * kThreads;
      x[j] = i < n ? mass_of(mass[i]) : 0;
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const uint32_t bits = __float_as_uint(x[j]);
      if (bits != 0 && bits >> top == prefix) add(shared, bits >> shift & mask, mass_units(x[j]));
    }
  }
}

__device__ __forceinline__ Sum warp_through(Sum x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t units = __shfl_up_sync(0xffffffffu, x.units, offset);
    const uint32_t count = __shfl_up_sync(0xffffffffu, x.count, offset);
    if (lane >= offset) x.units += units, x.count += count;
  }
  return x;
}

__global__ void __launch_bounds__(kThreads)
    mass_count_kernel(const __grid_constant__ MassCountParams p) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x;
  const float* mass = p.mass + row / p.heads * p.batch_stride + row % p.heads * p.head_stride;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Found found{};
  double wanted = 0;
  for (int pass = 0; pass < kMassPasses; ++pass) {
    const MassDigit digit = mass_digit(pass);
    for (int i = threadIdx.x; i < kMassBins; i += kThreads) {
      shared.counts[i] = shared.low[i] = shared.high[i] = 0;
    }
    __syncthreads();
    count_digit(shared, mass, p.seq_len, digit, found.prefix);
    __syncthreads();

    // what lies in this thread's bins, and above them
    const int highest = (1 << digit.bits) - 1 - static_cast<int>(threadIdx.x) * kOwn;
    Sum own[kOwn] = {}, through{};
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int bin = highest - j;
      if (bin >= 0) {
        own[j].units =
            static_cast<int64_t>(static_cast<uint64_t>(shared.high[bin]) << 32 | shared.low[bin]);
        own[j].count = shared.counts[bin];
      }
      through.units += own[j].units;
      through.count += own[j].count;
    }
    through = warp_through(through);
    if (lane == kWarp - 1) shared.warps[warp] = through;
    __syncthreads();
    const Sum warps = warp_through(shared.warps[lane]);
    const int64_t total = __shfl_sync(0xffffffffu, warps.units, kWarp - 1);
    Sum before{__shfl_sync(0xffffffffu, warps.units, (warp + kWarp - 1) % kWarp),
               __shfl_sync(0xffffffffu, warps.count, (warp + kWarp - 1) % kWarp)};
    if (warp == 0) before = {};
    before.units += found.above.units + through.units;
    before.count += found.above.count + through.count;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) before.units -= own[j].units, before.count -= own[j].count;
    if (pass == 0) {
      wanted = p.share * static_cast<double>(total);
      if (wanted <= 0) {  // all threads alike
        if (threadIdx.x == 0) p.counts[row] = 1;
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t after = before.units + own[j].units;
      if (!mass_reaches(before.units, wanted) && mass_reaches(after, wanted)) {
        shared.found = {before, found.prefix << digit.bits | static_cast<uint32_t>(highest - j),
                        own[j].count};
      }
      before = {after, before.count + own[j].count};
    }
    __syncthreads();
    found = shared.found;
  }
  if (threadIdx.x == 0) {
    const int64_t units = mass_units(__uint_as_float(found.prefix));
    p.counts[row] = static_cast<int32_t>(found.above.count +
                                         mass_ties(found.above.units, units, found.count, wanted));
  }
}

}  // namespace

void mass_count_cuda(const MassCountParams& params, void* stream) {
  mass_count_kernel<<<static_cast<unsigned>(params.batch * params.heads), kThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(params);
  launch_check("mass_count");
}

}  // namespace kvc
