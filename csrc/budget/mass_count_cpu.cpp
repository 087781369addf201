// mass_count on the CPU: a thread a row; a pass a digit, of which the later ones look only at the
// entries of the bin where the wanted mass is reached.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "budget/mass_count.h"
#include "host/parallel.h"

namespace kvc {
namespace {

struct Bin {
  int64_t count, units;
};

int64_t mass_units(float mass) {
  return std::llrint(static_cast<double>(mass) * kMassUnits);
}

int64_t count_row(const float* mass, int64_t n, double share, std::vector<Bin>& bins) {
  uint32_t prefix = 0;
  int64_t count = 0, above = 0;
  double wanted = 0;
  for (int pass = 0; pass < kMassPasses; ++pass) {
    const MassDigit digit = mass_digit(pass);
    const int shift = digit.shift, top = shift + digit.bits;
    std::fill(bins.begin(), bins.end(), Bin{});
    for (int64_t i = 0; i < n; ++i) {
      const float x = mass_of(mass[i]);
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof(bits));
      if (bits >> top != prefix) continue;
      Bin& bin = bins[bits >> shift & ((1u << digit.bits) - 1)];
      ++bin.count;
      bin.units += mass_units(x);
    }
    if (pass == 0) {
      int64_t total = 0;
      for (const Bin& bin : bins) total += bin.units;
      wanted = share * static_cast<double>(total);
      if (wanted <= 0) return 1;
    }
    int at = (1 << digit.bits) - 1;
    for (; !mass_reaches(above + bins[at].units, wanted); --at) {
      above += bins[at].units;
      count += bins[at].count;
    }
    prefix = prefix << digit.bits | static_cast<uint32_t>(at);
    if (shift == 0) {
      float least;
      std::memcpy(&least, &prefix, sizeof(least));
      count += mass_ties(above, mass_units(least), bins[at].count, wanted);
    }
  }
  return count;
}

}  // namespace

void mass_count_cpu(const MassCountParams& p) {
  parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<Bin> bins(kMassBins);
    for (int64_t row = begin; row < end; ++row) {
      const float* mass = p.mass + row / p.heads * p.batch_stride + row % p.heads * p.head_stride;
      p.counts[row] = static_cast<int32_t>(count_row(mass, p.seq_len, p.share, bins));
    }
  });
}

}  // namespace kvc
