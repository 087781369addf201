// Statistics of the columns of an attention map: what an entry adds to its column. A new one is a
// few lines here, its code in ColumnStatistic and visit_statistic, and its name in Python.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace kvc {

enum class ColumnStatistic : int32_t {
  kSum,
  kSumOfSquares,
  kMax,
  kMean,  // the sum, divided by the number of rows that see the column
  kKeyChange,
  kJointChange,
  kCrossChange,
};
constexpr int64_t kNumStatistics = 7;

// An entry of the map: row i, column j.
struct MapEntry {
  float p;              // row weight * P[i, j]
  float logit;          // softmax_scale * <q_i, k_j>
  float along;          // <o_i, v_j>
  float output_square;  // |o_i|^2
  float value_square;   // |v_j|^2
};

// Entries are terms that add up.
struct Added {
  static constexpr float join(float sum, float term) { return sum + term; }
};

struct SumOfRows : Added {
  static constexpr bool kOutputAware = false;  // reads p alone
  static constexpr float term(const MapEntry& e) { return e.p; }
};

struct SumOfSquares : Added {
  static constexpr bool kOutputAware = false;
  static constexpr float term(const MapEntry& e) { return e.p * e.p; }
};

struct MaxOfRows {  // NaN wins
  static constexpr bool kOutputAware = false;
  static constexpr float term(const MapEntry& e) { return e.p; }
  static constexpr float join(float most, float term) {
    return term > most || term != term ? term : most;
  }
};

// OBCache: squared first-order changes of the output o_i = sum over j of P[i, j] v_j.

struct KeyChange : Added {  // k_j -> 0: |P s (v_j - o_i)|^2
  static constexpr bool kOutputAware = true;
  static constexpr float term(const MapEntry& e) {
    const float change = e.p * e.logit;
    return change * change * (e.value_square + e.output_square - 2 * e.along);
  }
};

struct CrossChange : Added {  // twice the product of both changes: 2 P^2 s <v_j, v_j - o_i>
  static constexpr bool kOutputAware = true;
  static constexpr float term(const MapEntry& e) {
    return 2 * (e.p * e.p) * e.logit * (e.value_square - e.along);
  }
};

struct JointChange : Added {  // k_j and v_j -> 0: |P (v_j + s (v_j - o_i))|^2
  static constexpr bool kOutputAware = true;
  static constexpr float term(const MapEntry& e) {
    return e.p * e.p * e.value_square + KeyChange::term(e) + CrossChange::term(e);
  }
};

// Calls f with the statistic's type.
template <typename F>
decltype(auto) visit_statistic(ColumnStatistic statistic, F&& f) {
  switch (statistic) {
    case ColumnStatistic::kSum:
    case ColumnStatistic::kMean:
      return f(SumOfRows{});
    case ColumnStatistic::kSumOfSquares:
      return f(SumOfSquares{});
    case ColumnStatistic::kMax:
      return f(MaxOfRows{});
    case ColumnStatistic::kKeyChange:
      return f(KeyChange{});
    case ColumnStatistic::kJointChange:
      return f(JointChange{});
    case ColumnStatistic::kCrossChange:
      return f(CrossChange{});
  }
  throw std::invalid_argument("column_sums: no kernel for statistic code " +
                              std::to_string(static_cast<int>(statistic)));
}

}  // namespace kvc
