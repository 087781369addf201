// cosine_importance, of outputs and of updates.
#include "budget/cosine_importance.h"

#include "check.h"

namespace kvc::test {
namespace {

template <typename T>
void cosine_like_loops(int64_t batch, int64_t length, int64_t hidden, bool is_update) {
  Random random(hidden);
  const auto before = numbers<T>(batch * length * hidden, random);
  const auto after = numbers<T>(batch * length * hidden, random);
  std::vector<double> want;
  for (int64_t b = 0; b < batch; ++b) {
    double sum = 0.0;
    for (int64_t s = 0; s < length; ++s) {
      double product = 0.0, first = 0.0, second = 0.0;
      for (int64_t i = (b * length + s) * hidden; i < (b * length + s + 1) * hidden; ++i) {
        const float h = to_float(before[i]);
        const float a =
            is_update ? to_float(from_float<T>(h + to_float(after[i]))) : to_float(after[i]);
        product += static_cast<double>(h) * a;
        first += static_cast<double>(h) * h;
        second += static_cast<double>(a) * a;
      }
      sum += product / std::sqrt(first * second);
    }
    want.push_back(sum / static_cast<double>(length));
  }
  const int64_t tiles = (length + kCosineTile - 1) / kCosineTile;
  std::vector<float> partial(batch * tiles), out(batch, NAN);
  cosine_importance_cpu(CosineImportanceParams{
      .before = before.data(),
      .after = after.data(),
      .partial = partial.data(),
      .out = out.data(),
      .batch = batch,
      .seq_len = length,
      .hidden = hidden,
      .num_tiles = tiles,
      .before_batch_stride = length * hidden,
      .before_seq_stride = hidden,
      .after_batch_stride = length * hidden,
      .after_seq_stride = hidden,
      .dtype = dtype_of<T>(),
      .is_update = is_update,
  });
  expect_near("cosine_importance " + name_of<T>() + (is_update ? " of updates" : ""), out, want,
              1e-6);
}

const Checks checks([] {
  for_every_dtype([](auto tag) {
    using T = decltype(tag);
    for (const bool is_update : {false, true}) {
      cosine_like_loops<T>(2, 50, 100, is_update);
      cosine_like_loops<T>(1, 17, 4099, is_update);
    }
  });
});

}  // namespace
}  // namespace kvc::test
