#include "host/parallel.h"

namespace kvc {
namespace {

void serial(int64_t begin, int64_t end, int64_t /*grain*/, const RangeFunction& f) {
  if (begin < end) f(begin, end);
}

ParallelFor implementation = serial;

}  // namespace

void set_parallel_for(ParallelFor f) {
  implementation = f;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, const RangeFunction& f) {
  if (begin < end) implementation(begin, end, grain, f);
}

}  // namespace kvc
