// Plain loops beside the CPU twins: inputs of every dtype, and what a comparison says.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "host/dtype.h"
#include "host/half.h"

namespace kvc::test {

// A file of checks: static const Checks checks([] { expect_near(...); ... });
struct Checks {
  explicit Checks(std::function<void()> run);
};

// Reports the first element that is further off than `tolerance`; NaN and infinities must agree.
void expect_near(const std::string& what, const std::vector<float>& got,
                 const std::vector<double>& want, double tolerance);
void expect_equal(const std::string& what, const std::vector<int32_t>& got,
                  const std::vector<int32_t>& want);

// The same numbers on every machine, in [-1, 1).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(0x9E3779B97F4A7C15u ^ (seed * 0xD1342543DE82EF95u)) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-23f - 1.0f; }

 private:
  uint64_t state_;
};

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  return std::is_same_v<T, f16> ? DType::kFloat16 : DType::kBFloat16;
}
template <typename T>
std::string name_of() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  return std::is_same_v<T, f16> ? "float16" : "bfloat16";
}

template <typename T>
std::vector<T> numbers(int64_t n, Random& random, float scale = 1.0f) {
  std::vector<T> all;
  all.reserve(n);
  for (int64_t i = 0; i < n; ++i) all.push_back(from_float<T>(scale * random.uniform()));
  return all;
}

template <typename F>
void for_every_dtype(F&& f) {
  f(float{});
  f(f16{});
  f(bf16{});
}

}  // namespace kvc::test
