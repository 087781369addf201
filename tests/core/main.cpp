// kvcompress_core_test: runs every check, says which failed, and ends with 1 if one did.
#include <cstdio>

#include "check.h"

namespace kvc::test {
namespace {

std::vector<std::function<void()>>& all() {
  static std::vector<std::function<void()>> checks;
  return checks;
}

int made = 0, failed = 0;

void count(const std::string& what, bool is_right, const std::string& how) {
  ++made;
  if (is_right) return;
  ++failed;
  std::printf("FAILED %s: %s\n", what.c_str(), how.c_str());
}

template <typename Got, typename Want, typename Same>
void compare(const std::string& what, const std::vector<Got>& got, const std::vector<Want>& want,
             Same&& is_same) {
  if (got.size() != want.size()) return count(what, false, "another size");
  for (size_t i = 0; i < got.size(); ++i) {
    if (!is_same(got[i], want[i])) {
      return count(what, false,
                   "got " + std::to_string(got[i]) + ", must be " + std::to_string(want[i]) +
                       " at " + std::to_string(i));
    }
  }
  count(what, true, "");
}

}  // namespace

Checks::Checks(std::function<void()> run) {
  all().push_back(std::move(run));
}

void expect_near(const std::string& what, const std::vector<float>& got,
                 const std::vector<double>& want, double tolerance) {
  compare(what, got, want, [=](double a, double b) {
    if (std::isnan(b)) return std::isnan(a);
    return a == b || std::fabs(a - b) <= tolerance;  // infinities: a == b
  });
}

void expect_equal(const std::string& what, const std::vector<int32_t>& got,
                  const std::vector<int32_t>& want) {
  compare(what, got, want, [](int32_t a, int32_t b) { return a == b; });
}

}  // namespace kvc::test

int main() {
  using namespace kvc::test;
  for (const auto& run : all()) run();
  std::printf("%d of %d checks passed\n", made - failed, made);
  return failed > 0 || made == 0 ? 1 : 0;
}
