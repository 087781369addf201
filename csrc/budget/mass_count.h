// mass_count: how many of the largest entries of a row hold a share of its sum.
//
//   counts[b, h] = the least k >= 1 with  S_k >= share * S_n,  S_k the sum of the k largest of
//                  mass[b, h, :]
//
// Sums are 64-bit integers in units of 2^-40, so that every device and every order of summation
// gives the same. What is no positive finite number counts as 0. Found by radix selection on
// histograms that hold the sum of each bin beside its count.
#pragma once

#include <cfloat>
#include <cstdint>

namespace kvc {

struct MassCountParams {
  const float* mass;  // [batch, heads, seq_len], last dimension contiguous
  int32_t* counts;    // [batch, heads] contiguous
  int64_t batch, heads, seq_len;
  int64_t batch_stride, head_stride;  // of mass, in elements
  double share;
};

// Digits of the bits of a float that is not negative (their order is its order), from the top.
struct MassDigit {
  int shift, bits;
};
constexpr int kMassPasses = 3;
constexpr int kMassBins = 1 << 11;
constexpr MassDigit mass_digit(int pass) {
  return pass == 0 ? MassDigit{20, 11} : MassDigit{pass == 1 ? 10 : 0, 10};
}

constexpr double kMassUnits = 0x1p40;  // of a mass of 1; rounded to the nearest, halves to even

constexpr float mass_of(float x) {
  return x > 0 && x <= FLT_MAX ? x : 0;
}

constexpr bool mass_reaches(int64_t units, double wanted) {
  return static_cast<double>(units) >= wanted;
}

// The least m in [1, count] for which `above` and m entries of `units` each reach what is wanted.
constexpr int64_t mass_ties(int64_t above, int64_t units, int64_t count, double wanted) {
  int64_t low = 1, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (mass_reaches(above + middle * units, wanted)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

void mass_count_cpu(const MassCountParams& params);
void mass_count_cuda(const MassCountParams& params, void* stream);

}  // namespace kvc
