#include "drafting/step_cost.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace draftwerk {
namespace {

constexpr int kExactRows = 64;
constexpr int kNodesPerOctave = 8;
/// Steps after which a measurement no longer stands for the present, and is forgotten: contexts grew, the machine got
/// busy or idle.
constexpr std::int64_t kStaleSteps = 512;
/// Age at which a measurement weighs half as much as a new one that contradicts it.
constexpr double kHalfWeightSteps = 128.0;

/// A first sample so many times as long as expected is a disturbance until the next one says the same.
constexpr double kDoubtful = 2.5;
/// How far the pace follows in a step, and at most; and how slow and fast a spell can be. What goes beyond is not the
/// machine's pace, but another cost of so many rows.
constexpr double kPaceShare = 0.3;
constexpr double kLargestChange = 0.15;
constexpr double kSlowestPace = 1.5;
/// How a sample's distance from the estimate moves the average distance, and the most that it counts for.
constexpr double kScatterPace = 0.05;
constexpr double kLargestScatter = 0.25;
/// A measurement is old after so many steps. A sample that is so far from it, as a share, contradicts it, and a step
/// that is no further than the latter from what was expected says that the machine's pace is what it was.
constexpr std::int64_t kOldSteps = 8;
constexpr double kContradiction = 0.12;
constexpr double kAsExpected = 0.06;
/// Standard error of a median of n samples of a normal distribution whose mean absolute deviation is 1, times sqrt(n).
constexpr double kMedianError = 1.57;

/// Assumed cost in units of one row: decode reads every weight once per step, so few more rows are nearly free;
/// with many the arithmetic catches up.
double assumed_cost(double rows) {
  constexpr double kFreeRows = 8.0;
  constexpr double kFreeSlope = 0.03;
  constexpr double kSlope = 0.1;
  return 1.0 + kFreeSlope * (std::min(rows, kFreeRows) - 1.0) + kSlope * std::max(rows - kFreeRows, 0.0);
}

}  // namespace

// --- RecentMedian -------------------------------------------------------------------------------------------------

void RecentMedian::add(double sample) {
  if (count_ == 0) next_ = 0;
  samples_[next_] = sample;
  next_ = (next_ + 1) % kSamples;
  count_ = std::min(count_ + 1, kSamples);
}

double RecentMedian::value() const {
  std::array<double, kSamples> sorted = samples_;
  const auto end = sorted.begin() + count_;
  if (count_ < 3) return *std::min_element(sorted.begin(), end);
  const auto middle = sorted.begin() + count_ / 2;
  std::nth_element(sorted.begin(), middle, end);
  return *middle;
}

// --- StepCostTable ------------------------------------------------------------------------------------------------

StepCostTable::StepCostTable() { rebuild(); }

int StepCostTable::node_of(int rows) {
  if (rows <= kExactRows) return std::max(rows, 1) - 1;
  const int octave = std::bit_width(static_cast<unsigned>(rows)) - std::bit_width(static_cast<unsigned>(kExactRows));
  const int width = (kExactRows / kNodesPerOctave) << octave;
  const int eighth = (rows - (kExactRows << octave) + width / 2) / width;
  return std::min(kExactRows - 1 + kNodesPerOctave * octave + eighth, kNodes - 1);
}

int StepCostTable::rows_of(int node) {
  if (node < kExactRows) return node + 1;
  const int past = node - (kExactRows - 1);
  const int octave = past / kNodesPerOctave;
  return (kExactRows << octave) + (past % kNodesPerOctave) * ((kExactRows / kNodesPerOctave) << octave);
}

void StepCostTable::observe(int rows, double seconds) {
  if (rows < 1 || !std::isfinite(seconds) || seconds <= 0.0) return;
  ++step_;
  const int at = node_of(rows);
  Node& node = nodes_[at];
  if (step_ - node.last_step > kStaleSteps) node.samples.clear();
  const double ratio = seconds / cost(rows);
  settle_contradiction(at, ratio);
  if (node.samples.count() > 2) follow(ratio);
  const double sample = seconds / pace_ * assumed_cost(rows_of(at)) / assumed_cost(rows);
  if (node.samples.count() == 0 && !node.doubted && largest_ > 0 && sample > kDoubtful * estimate_[at]) {
    node.doubted = true;
    return;
  }
  node.doubted = false;
  if (node.samples.count() > 2) {
    const double off = std::min(std::abs(sample / node.typical - 1.0), kLargestScatter);
    scatter_ += (off - scatter_) * kScatterPace;
  }
  if (node.samples.count() > 1 && step_ - node.last_step > kOldSteps &&
      std::abs(sample / node.typical - 1.0) > kContradiction) {
    contradiction_ = {at, node.typical, sample};
  }
  node.samples.add(sample);
  node.typical = node.samples.value();
  node.last_step = step_;
  rebuild();
}

/// A sample that contradicted an old measurement may have shown the machine's pace, which is that of all counts. If the
/// next step, of another count, takes as long as expected, it has not: then it is the old measurement that is wrong, of
/// which a spell made what it is, and the lesser of both is believed, as what disturbs makes times longer.
void StepCostTable::settle_contradiction(int at, double ratio) {
  const Contradiction last = std::exchange(contradiction_, {});
  if (last.node < 0 || last.node == at || std::abs(ratio - 1.0) > kAsExpected) return;
  Node& node = nodes_[last.node];
  node.samples.clear();
  node.samples.add(last.old);
  node.samples.add(last.sample);
  node.typical = node.samples.value();
}

/// A count that is well known took so many times as long as expected. What counts is the middle one of the last three
/// steps: one wild sample is no spell.
void StepCostTable::follow(double ratio) {
  ratios_[next_ratio_] = ratio;
  next_ratio_ = (next_ratio_ + 1) % static_cast<int>(ratios_.size());
  std::array<double, 3> sorted = ratios_;
  std::sort(sorted.begin(), sorted.end());
  pace_ *= 1.0 + std::clamp(kPaceShare * (sorted[1] - 1.0), -kLargestChange, kLargestChange);
  pace_ = std::clamp(pace_, 1.0 / kSlowestPace, kSlowestPace);
}

/// Isotonic regression over the measured nodes (pool adjacent violators), then the nodes between and beside them.
void StepCostTable::rebuild() {
  struct Pool {
    double cost;
    double weight;
    float samples;
    int first;
    int last;
  };
  std::array<Pool, kNodes> pools;
  std::array<int, kNodes> measured;
  int pool_count = 0;
  int measured_count = 0;
  for (int node = 0; node < kNodes; ++node) {
    const Node& here = nodes_[node];
    if (!known(here)) continue;
    const double weight = here.samples.count() / (1.0 + static_cast<double>(step_ - here.last_step) / kHalfWeightSteps);
    Pool pool{here.typical, weight, static_cast<float>(here.samples.count()), measured_count, measured_count};
    measured[measured_count++] = node;
    while (pool_count > 0 && pools[pool_count - 1].cost >= pool.cost) {
      const Pool& before = pools[--pool_count];
      const double total = before.weight + pool.weight;
      pool = {(before.cost * before.weight + pool.cost * pool.weight) / total, total, before.samples + pool.samples,
              before.first, pool.last};
    }
    pools[pool_count++] = pool;
  }
  if (measured_count == 0) {
    for (int node = 0; node < kNodes; ++node) {
      estimate_[node] = assumed_cost(rows_of(node));
    }
    return;
  }
  largest_ = rows_of(measured[measured_count - 1]);
  const auto assumed = [](int node) { return assumed_cost(rows_of(node)); };
  const auto node_at = [&](int index) { return measured[index]; };
  for (int p = 0; p < pool_count; ++p) {
    const Pool& pool = pools[p];
    for (int i = pool.first; i <= pool.last; ++i) {
      estimate_[node_at(i)] = pool.cost;
      support_[node_at(i)] = pool.samples;
    }
  }
  const auto estimate = [&](int node) -> double& { return estimate_[node]; };

  const int lowest = node_at(0);
  for (int node = 0; node < lowest; ++node) {
    estimate(node) = estimate(lowest) * assumed(node) / assumed(lowest);
    support_[node] = support_[lowest];
  }
  for (int i = 0; i + 1 < measured_count; ++i) {
    const int a = node_at(i);
    const int b = node_at(i + 1);
    for (int node = a + 1; node < b; ++node) {
      const double part = (assumed(node) - assumed(a)) / (assumed(b) - assumed(a));
      estimate(node) = estimate(a) + part * (estimate(b) - estimate(a));
      support_[node] = std::min(support_[a], support_[b]);
    }
  }
  // Beyond the largest: as steep as what was measured over its last quarter or more; where that is flatter than the
  // assumed curve scaled to the largest, halfway between the two.
  const int highest = node_at(measured_count - 1);
  tail_slope_ = estimate(highest) / assumed(highest);
  if (measured_count > 1) {
    int reference = lowest;
    for (int i = 0; i < measured_count && rows_of(node_at(i)) * 4 <= rows_of(highest) * 3; ++i) reference = node_at(i);
    const double slope = (estimate(highest) - estimate(reference)) / (assumed(highest) - assumed(reference));
    tail_slope_ = slope < tail_slope_ ? (slope + tail_slope_) / 2 : slope;
  }
  for (int node = highest + 1; node < kNodes; ++node) {
    estimate(node) = estimate(highest) + tail_slope_ * (assumed(node) - assumed(highest));
    support_[node] = support_[highest];
  }
}

double StepCostTable::cost(int rows) const {
  const auto estimate = [&](int node) { return estimate_[node]; };
  const int nearest = node_of(rows);
  const int at = rows_of(nearest);
  if (rows <= at && (rows == at || nearest == 0)) return pace_ * estimate(nearest);
  if (nearest == kNodes - 1 && rows > at) {
    return pace_ * (estimate(nearest) + tail_slope_ * (assumed_cost(rows) - assumed_cost(at)));
  }
  const int below = rows < at ? nearest - 1 : nearest;
  const double part = static_cast<double>(rows - rows_of(below)) / (rows_of(below + 1) - rows_of(below));
  return pace_ * (estimate(below) + part * (estimate(below + 1) - estimate(below)));
}

bool StepCostTable::known(const Node& node) const {
  return node.samples.count() > 0 && step_ - node.last_step <= kStaleSteps;
}

bool StepCostTable::measured(int rows) const { return known(nodes_[node_of(rows)]); }

bool StepCostTable::reliable(int rows) const { return measured(rows) && samples(rows) > 2; }

double StepCostTable::error(int rows) const {
  return scatter_ * kMedianError / std::sqrt(std::max(static_cast<double>(support_[node_of(rows)]), 1.0));
}

std::int64_t StepCostTable::age(int rows) const { return step_ - nodes_[node_of(rows)].last_step; }

}  // namespace draftwerk
