// What a step costs: seconds by its number of rows, learned while the engine runs.
#pragma once

#include <array>
#include <cstdint>

namespace draftwerk {

/// A typical value of the last few samples: their median, or the least of them while there are fewer than three (what
/// disturbs a measurement of time makes it longer). One wild sample hardly moves it.
class RecentMedian {
 public:
  void add(double sample);
  void clear() { count_ = 0; }
  [[nodiscard]] int count() const { return count_; }
  /// Of the samples so far; count() > 0.
  [[nodiscard]] double value() const;

 private:
  static constexpr int kSamples = 15;
  std::array<double, kSamples> samples_{};
  int count_ = 0;
  int next_ = 0;
};

/// Seconds of a step by its number of rows, learned from steps. Every count up to 64 is measured by itself, larger
/// ones in eighths of an octave. Estimates never fall with the number of rows; between measured counts they follow an
/// assumed curve, and beyond the largest one go on about as steeply as was measured. Machines have slow and fast
/// spells, longer than it takes to measure one count of rows and shorter than it takes to measure them all: the pace of
/// the last few steps is a factor of all estimates, and what is remembered of each count is free of it. What was not
/// measured for 512 steps is forgotten. Takes 20 kB.
class StepCostTable {
 public:
  StepCostTable();

  /// A step of `rows` >= 1 rows took `seconds` > 0.
  void observe(int rows, double seconds);
  /// Estimated seconds; before any observation, in units of a step with one row.
  [[nodiscard]] double cost(int rows) const;
  /// Whether `rows`, or a count close to it, was measured not long ago.
  [[nodiscard]] bool measured(int rows) const;
  /// Whether it was measured often enough not to be a fluke.
  [[nodiscard]] bool reliable(int rows) const;
  /// Latest measurements that its estimate rests on.
  [[nodiscard]] int samples(int rows) const { return nodes_[node_of(rows)].samples.count(); }
  /// Steps observed since it was measured; meaningful if it was.
  [[nodiscard]] std::int64_t age(int rows) const;
  /// Standard error of cost(rows), as a share of it: from how much samples scatter and how many it rests on.
  [[nodiscard]] double error(int rows) const;
  /// The largest number of rows that is measured, 0 if none is.
  [[nodiscard]] int largest() const { return largest_; }

 private:
  static constexpr int kNodes = 64 + 7 * 8;

  struct Node {
    RecentMedian samples;
    double typical = 0.0;  ///< samples.value()
    std::int64_t last_step = 0;
    bool doubted = false;  ///< the last sample did not count
  };

  struct Contradiction {
    int node = -1;
    double old = 0.0;  ///< its typical sample before
    double sample = 0.0;
  };

  void settle_contradiction(int at, double ratio);
  void follow(double ratio);
  [[nodiscard]] bool known(const Node& node) const;
  static int node_of(int rows);
  static int rows_of(int node);
  void rebuild();

  std::array<Node, kNodes> nodes_;
  std::array<double, 3> ratios_ = {1.0, 1.0, 1.0};  ///< of the last steps: seconds to what was expected
  int next_ratio_ = 0;
  double pace_ = 1.0;  ///< what follows is free of it
  std::array<double, kNodes> estimate_{};
  std::array<float, kNodes> support_{};  ///< samples that the estimate rests on
  Contradiction contradiction_;          ///< of the last step
  double scatter_ = 0.02;                ///< of samples around the estimate, relative, on average
  double tail_slope_ = 1.0;              ///< per unit of the assumed curve beyond the last node
  std::int64_t step_ = 0;
  int largest_ = 0;
};

}  // namespace draftwerk
