// kvcompress_bench: the ops of the torch-free core, on the CPU and on the GPU, cold and warm.
//
//   kvcompress_bench --benchmark_filter='topk/.*/cold/cuda' --benchmark_out=topk.json
//
// Times are manual: CUDA events on the GPU, a steady clock on the CPU. KVC_THREADS sets the threads
// of the CPU twins (default: all).
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#include "host/parallel.h"
#include "machine.h"

#ifdef KVC_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace kvc::bench {
namespace {

int64_t num_threads() {
  const char* set = std::getenv("KVC_THREADS");
  return std::max<int64_t>(set ? std::atoll(set) : std::thread::hardware_concurrency(), 1);
}

// As many ranges as threads; a thread is started for each but the first.
void on_threads(int64_t begin, int64_t end, int64_t grain, const RangeFunction& f) {
  const int64_t most = std::max<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1);
  const int64_t parts = std::min(num_threads(), most);
  const auto edge = [&](int64_t part) { return begin + (end - begin) * part / parts; };
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) {
    others.emplace_back([&, part] { f(edge(part), edge(part + 1)); });
  }
  f(begin, edge(1));
  for (std::thread& other : others) other.join();
}

class Cpu : public Machine {
 public:
  std::string name() const override { return "cpu"; }
  std::shared_ptr<void> allocate(int64_t bytes) override {
    return {::operator new(bytes, std::align_val_t(64)),
            [](void* p) { ::operator delete(p, std::align_val_t(64)); }};
  }
  void upload(void* to, const void* from, int64_t bytes) override { std::memcpy(to, from, bytes); }
  int64_t cache_bytes() const override { return int64_t{64} << 20; }
  void flush() override {
    if (other_.empty()) other_.resize(3 * cache_bytes() / 8, 1);
    uint64_t sum = 0;
    for (const uint64_t x : other_) sum += x;
    benchmark::DoNotOptimize(sum);
  }
  void* stream() override { return nullptr; }
  bool is_cuda() const override { return false; }
  double seconds(const std::function<void()>& run) override {
    const auto begin = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

 private:
  std::vector<uint64_t> other_;
};

#ifdef KVC_WITH_CUDA
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

class Cuda : public Machine {
 public:
  Cuda() {
    check(cudaStreamCreate(&stream_));
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&stop_));
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0));
    cache_ = bytes;
    check(cudaMalloc(&other_, 3 * cache_));
  }
  std::string name() const override { return "cuda"; }
  std::shared_ptr<void> allocate(int64_t bytes) override {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes));
    check(cudaMemset(p, 0, bytes));
    return {p, [](void* q) { cudaFree(q); }};
  }
  void upload(void* to, const void* from, int64_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
  }
  int64_t cache_bytes() const override { return cache_; }
  void flush() override { check(cudaMemsetAsync(other_, 0, 3 * cache_, stream_)); }
  void* stream() override { return stream_; }
  bool is_cuda() const override { return true; }
  std::function<void()> prepared(const std::function<void()>& run) override {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed));
    run();
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&exec, graph, 0));
    check(cudaGraphDestroy(graph));
    const std::shared_ptr<CUgraphExec_st> owned(exec,
                                                [](cudaGraphExec_t e) { cudaGraphExecDestroy(e); });
    return [this, owned] { check(cudaGraphLaunch(owned.get(), stream_)); };
  }
  double seconds(const std::function<void()>& run) override {
    check(cudaEventRecord(start_, stream_));
    run();
    check(cudaEventRecord(stop_, stream_));
    check(cudaEventSynchronize(stop_));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start_, stop_));
    return 1e-3 * ms;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  int64_t cache_ = 0;
  void* other_ = nullptr;
};
#endif

std::vector<std::function<void(Machine&)>>& files() {
  static std::vector<std::function<void(Machine&)>> all;
  return all;
}

}  // namespace

uint16_t* Machine::bfloat16(int64_t n) {
  if (numbers_.empty()) {
    Random random;
    numbers_.resize((size_t{1} << 23) + 977);
    for (uint16_t& one : numbers_) one = random.bfloat16();
  }
  uint16_t* to = room<uint16_t>(n);
  for (int64_t done = 0; done < n;) {
    const auto part =
        std::min<int64_t>(n - done, static_cast<int64_t>(numbers_.size() - next_number_));
    upload(to + done, numbers_.data() + next_number_,
           part * static_cast<int64_t>(sizeof(uint16_t)));
    done += part;
    next_number_ = (next_number_ + static_cast<size_t>(part)) % numbers_.size();
  }
  return to;
}

Cases::Cases(std::function<void(Machine&)> add) {
  files().push_back(std::move(add));
}

void add_case(const std::string& op, const std::string& shape, Machine& machine, int64_t set_bytes,
              std::function<Work(Machine&, int64_t)> setup) {
  for (const bool cold : {true, false}) {
    const std::string name =
        op + "/" + shape + "/" + (cold ? "cold" : "warm") + "/" + machine.name();
    auto run = [&machine, set_bytes, setup, cold](benchmark::State& state) {
      const int64_t fill = 2 * machine.cache_bytes() / std::max<int64_t>(set_bytes, 1) + 1;
      const Work work = setup(machine, cold ? std::clamp<int64_t>(fill, 2, 16) : 1);
      const int64_t launches = std::max<int64_t>(work.sets.size(), cold ? 1 : 8);
      const std::function<void()> queue = [&] {
        for (int64_t i = 0; i < launches; ++i) work.sets[i % work.sets.size()]();
      };
      queue();  // what is set up at the first launch is set up before the capture
      const std::function<void()> round = machine.prepared(queue);
      for (auto _ : state) {
        if (cold) machine.flush();
        state.SetIterationTime(machine.seconds(round) / static_cast<double>(launches));
      }
      using benchmark::Counter;
      const auto rate = Counter::kIsIterationInvariantRate;
      if (work.bytes > 0) state.counters["bytes/s"] = Counter(work.bytes, rate);
      if (work.flop > 0) state.counters["FLOP/s"] = Counter(work.flop, rate);
      machine.clear();
    };
    benchmark::RegisterBenchmark(name.c_str(), run)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->Iterations(machine.is_cuda() ? 50 : 20);  // inputs are made but once
  }
}

}  // namespace kvc::bench

int main(int argc, char** argv) {
  using namespace kvc::bench;
  kvc::set_parallel_for(on_threads);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  Cpu cpu;
  std::vector<Machine*> machines{&cpu};
#ifdef KVC_WITH_CUDA
  int devices = 0;
  std::unique_ptr<Cuda> cuda;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) {
    cuda = std::make_unique<Cuda>();
    machines.push_back(cuda.get());
  }
#endif
  for (Machine* machine : machines) {
    for (const auto& add : files()) add(*machine);
  }
  benchmark::RunSpecifiedBenchmarks();
}
