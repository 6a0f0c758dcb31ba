#include "backend/cuda/graph_cache.h"

#include <span>

#include "backend/cuda/error.h"

namespace draftwerk::cuda {

void GraphCache::run(const LaunchList& launches, cudaStream_t stream) {
  if (launches.empty()) return;
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
      graph = launches.instantiate();
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
