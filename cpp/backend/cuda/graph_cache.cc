#include "backend/cuda/graph_cache.h"

#include <cstdlib>
#include <span>
#include <stdexcept>

#include "backend/cuda/error.h"

namespace draftwerk::cuda {

LaunchMode launch_mode() {
  const char* wish = std::getenv("DRAFTWERK_CUDA_LAUNCHES");
  const std::string_view mode = wish == nullptr ? "" : wish;
  if (mode.empty() || mode == "early") return LaunchMode::early;
  if (mode == "ordered") return LaunchMode::ordered;
  if (mode == "single") return LaunchMode::single;
  throw std::runtime_error("DRAFTWERK_CUDA_LAUNCHES=" + std::string(mode) + ": expected early, ordered or single");
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
  if (graph.get() == nullptr) {
    try {
      graph = launches.instantiate(mode_ == LaunchMode::early);
    } catch (const CudaError& error) {
      if (error.code() != cudaErrorMemoryAllocation) throw;
      return launches.run(stream);  // which is slower, and no worse; there may be memory the next time
    }
    ++graphs_;
  }
  check(cudaGraphLaunch(graph.get(), stream), "launching a step");
}

void GraphCache::clear() {
  by_key_.clear();
  entries_.clear();
  graphs_ = 0;
}

}  // namespace draftwerk::cuda
