#include "backend/cuda/graph_cache.h"

#include <cstdlib>
#include <span>
#include <stdexcept>

#include "backend/cuda/error.h"

namespace draftwerk::cuda {

LaunchMode launch_mode() {
  const char* wish = std::getenv("DRAFTWERK_CUDA_LAUNCHES");
  const std::string_view mode = wish == nullptr ? "" : wish;
  if (mode.empty()) return LaunchMode::early;
  for (const LaunchMode known : {LaunchMode::early, LaunchMode::ordered, LaunchMode::single}) {
    if (mode == launch_mode_name(known)) return known;
  }
  throw std::runtime_error("DRAFTWERK_CUDA_LAUNCHES=" + std::string(mode) + ": expected early, ordered or single");
}

std::string_view launch_mode_name(LaunchMode mode) {
  switch (mode) {
    case LaunchMode::early:
      return "early";
    case LaunchMode::ordered:
      return "ordered";
    case LaunchMode::single:
      return "single";
  }
  return "";
}

void GraphCache::run(const LaunchList& launches, cudaStream_t stream) {
  if (launches.empty()) return;
  if (mode_ == LaunchMode::single) return launches.run(stream);
  const std::span<const std::byte> bytes = launches.bytes();
  const std::string_view key(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) {
    if (entries_.size() == capacity_) {
      graphs_ -= entries_.back().graph.get() != nullptr ? 1 : 0;
      by_key_.erase(entries_.back().key);
      entries_.pop_back();
    }
    entries_.push_front({std::string(key), {}});
    by_key_.emplace(entries_.front().key, entries_.begin());
    return launches.run(stream);
  }
  entries_.splice(entries_.begin(), entries_, found->second);
  GraphExec& graph = entries_.front().graph;
  try {
    return launch(graph, launches, stream);
  } catch (const CudaError& error) {
    // Which is slower, and no worse; there may be memory the next time.
    if (error.code() == cudaErrorMemoryAllocation) return launches.run(stream);
    if (mode_ != LaunchMode::early) throw;
  }
  // Early starts are what graphs may be refused for: a driver that does not take them computes all the same.
  mode_ = LaunchMode::ordered;
  graphs_ -= graph.get() != nullptr ? 1 : 0;
  graph = GraphExec();
  try {
    launch(graph, launches, stream);
  } catch (...) {
    mode_ = LaunchMode::early;  // which was not the reason
    throw;
  }
}

void GraphCache::launch(GraphExec& graph, const LaunchList& launches, cudaStream_t stream) {
  if (graph.get() == nullptr) {
    graph = launches.instantiate(mode_ == LaunchMode::early);
    ++graphs_;
  }
  check(cudaGraphLaunch(graph.get(), stream), "launching a step");  // for the first time, it may need memory as well
}

void GraphCache::clear() {
  by_key_.clear();
  entries_.clear();
  graphs_ = 0;
}

}  // namespace draftwerk::cuda
