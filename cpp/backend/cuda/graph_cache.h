// Runs what was recorded as a graph, and keeps the graphs: a step of the same launches as an earlier one is one call.
#pragma once

#include <atomic>
#include <cstddef>
#include <list>
#include <string>
#include <string_view>
#include <unordered_map>

#include "backend/cuda/launch.h"

namespace draftwerk::cuda {

/// How the kernels of a list follow each other.
enum class LaunchMode {
  early,    ///< in a graph, each beginning before the one ahead has ended, where the device can
  ordered,  ///< in a graph, one after the other
  single,   ///< one by one, without a graph
};

/// What the environment says in DRAFTWERK_CUDA_LAUNCHES, or `early`. All compute the same; which of them fail says what
/// a fault is of. std::runtime_error if it says something else.
LaunchMode launch_mode();
/// As the environment says it.
std::string_view launch_mode_name(LaunchMode mode);

/// The graphs of the launch lists that were run last.
class GraphCache {
 public:
  /// Keeps at most so many.
  explicit GraphCache(std::size_t capacity, LaunchMode mode = LaunchMode::early) : capacity_(capacity), mode_(mode) {}

  /// Runs a list, none of whose graphs may be under way in another stream. A list that is seen for the first time is
  /// launched kernel by kernel: many are never seen again, and instantiating a graph takes longer than it saves.
  /// From a graph of early starts on that the device refuses, launches are `ordered`.
  void run(const LaunchList& launches, cudaStream_t stream);
  /// Forgets all graphs, as their arguments point to memory that is gone.
  void clear();
  [[nodiscard]] std::size_t graphs() const { return graphs_; }
  /// What there is now; any thread may ask.
  [[nodiscard]] LaunchMode mode() const { return mode_; }

 private:
  struct Entry {
    std::string key;  ///< the bytes of the list
    GraphExec graph;  ///< none until the list was seen twice
  };
  using Entries = std::list<Entry>;

  /// Makes a graph of a list if there is none, and launches it.
  void launch(GraphExec& graph, const LaunchList& launches, cudaStream_t stream);

  std::size_t capacity_;
  std::atomic<LaunchMode> mode_;
  std::size_t graphs_ = 0;
  Entries entries_;  ///< the latest first
  std::unordered_map<std::string_view, Entries::iterator> by_key_;
};

}  // namespace draftwerk::cuda
