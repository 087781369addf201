// The thread pool of the CPU twins. The core runs serially; the torch side binds it to torch's own
// pool when the library loads, C++ tests and microbenchmarks may bind another.
#pragma once

#include <cstdint>
#include <functional>

namespace kvc {

using RangeFunction = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, const RangeFunction& f);

void set_parallel_for(ParallelFor implementation);

// Splits [begin, end) into ranges of at least `grain` and runs f on them. How the range is split
// must never change a result. f must not throw: argument checks come before.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const RangeFunction& f);

}  // namespace kvc
