// Division by a number that is known before a kernel starts: a product and a shift.
#pragma once

#include <cstdint>

namespace kvc {

// n / divisor for 0 <= n < 2^31; divisor from 1 to 2^31.
struct FastDivisor {
  uint32_t divisor = 1, multiplier = uint32_t{1} << 31, shift = 31;

  constexpr FastDivisor() = default;
  constexpr explicit FastDivisor(uint32_t d) : divisor(d) {
    uint32_t log2 = 0;
    while ((uint64_t{1} << log2) < d) ++log2;
    shift = 31 + log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d);
  }
  constexpr uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

}  // namespace kvc
