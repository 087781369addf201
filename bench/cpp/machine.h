// Where a case runs, and how it is timed there. Both machines time a round, every set of inputs
// once; on CUDA it is captured into a graph first, so that no launch waits for the host.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace kvc::bench {

class Machine {
 public:
  virtual ~Machine() = default;
  virtual std::string name() const = 0;
  virtual std::shared_ptr<void> allocate(int64_t bytes) = 0;
  virtual void upload(void* to, const void* from, int64_t bytes) = 0;
  virtual int64_t cache_bytes() const = 0;
  virtual void flush() = 0;  // fills the last-level cache with lines that no case reads
  virtual void* stream() = 0;
  virtual bool is_cuda() const = 0;
  virtual std::function<void()> prepared(const std::function<void()>& run) { return run; }
  virtual double seconds(const std::function<void()>& run) = 0;

  // n elements, the same on every machine, what `element` says.
  template <typename T, typename F>
  T* make(int64_t n, F&& element) {
    std::vector<T> values(n);
    for (int64_t i = 0; i < n; ++i) values[i] = element(i);
    T* to = room<T>(n);
    upload(to, values.data(), n * static_cast<int64_t>(sizeof(T)));
    return to;
  }
  // n bfloat16 numbers in [-1, 1), other ones every time, out of 2^23 and a bit that are made once:
  // making all of them would take longer than anything that is measured.
  uint16_t* bfloat16(int64_t n);
  template <typename T>
  T* room(int64_t n) {
    owned_.push_back(allocate(n * static_cast<int64_t>(sizeof(T))));
    return static_cast<T*>(owned_.back().get());
  }
  void clear() { owned_.clear(); }

 private:
  std::vector<std::shared_ptr<void>> owned_;
  std::vector<uint16_t> numbers_;
  size_t next_number_ = 0;
};

// A generator that is fast enough to fill caches of hundreds of megabytes.
class Random {
 public:
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-23f - 1.0f; }
  uint16_t bfloat16() {
    const float x = uniform();
    return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16);
  }

 private:
  uint64_t state_ = 0x9E3779B97F4A7C15u;
};

// What a case brings: a launch for each set of inputs, and what one launch moves and computes.
struct Work {
  std::vector<std::function<void()>> sets;
  double bytes = 0, flop = 0;
};

// Registers "<op>/<shape>/<cold or warm>/<machine>". `setup` is called when the case is run, with
// the number of sets to make.
void add_case(const std::string& op, const std::string& shape, Machine& machine, int64_t set_bytes,
              std::function<Work(Machine&, int64_t)> setup);

// A file of cases: static const Cases cases([](Machine& machine) { add_case(...); ... });
struct Cases {
  explicit Cases(std::function<void(Machine&)> add);
};

// Launches an op with its Params where the machine is.
#ifdef KVC_WITH_CUDA
#define KVC_BENCH_LAUNCH(op, params, machine) \
  ((machine).is_cuda() ? op##_cuda(params, (machine).stream()) : op##_cpu(params))
#else
#define KVC_BENCH_LAUNCH(op, params, machine) op##_cpu(params)
#endif

// The attention layer of tests/cases.py: Llama 3.1 8B.
constexpr int64_t kQueryHeads = 32, kHeads = 8, kHeadDim = 128;

}  // namespace kvc::bench
