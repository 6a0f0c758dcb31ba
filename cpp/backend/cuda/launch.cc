#include "backend/cuda/launch.h"

#include <cstdint>

#include "backend/cuda/error.h"
#include "backend/round_up.h"

namespace draftwerk::cuda {

struct LaunchList::Entry {
  const void* kernel;
  unsigned grid[3];
  unsigned block[3];
  std::uint64_t shared_bytes;
  std::uint64_t argument_bytes;  ///< rounded up so that the next entry is aligned
};

namespace {

// Arguments hold pointers and vectors of four words at most.
constexpr std::size_t kAlignment = 16;

/// Lets a kernel's blocks share a multiprocessor with blocks of products, which want nearly all of its memory shared:
/// otherwise it would have to be empty before each of them, to be divided anew, and none could start early.
void prefer_shared_memory(const void* kernel) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "asking for a division of memory");
}

constexpr std::size_t rounded_up(std::size_t bytes) { return round_up(bytes, kAlignment); }

/// Whether a kernel may start before the one ahead of it has ended: it waits where it has to (device.cuh) only if it
/// was compiled for devices that can.
bool awaits_previous(const void* kernel) {
  constexpr int kLeastVersion = 90;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "asking for what a kernel was compiled for");
  return attributes.ptxVersion >= kLeastVersion;
}

}  // namespace

void LaunchList::append(const void* kernel, const LaunchShape& shape, const void* arguments, std::size_t bytes) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const Entry entry{kernel,
                    {shape.grid.x, shape.grid.y, shape.grid.z},
                    {shape.block.x, shape.block.y, shape.block.z},
                    shape.shared_bytes,
                    rounded_up(bytes)};
  const std::size_t at = bytes_.size();
  bytes_.resize(at + rounded_up(sizeof entry) + entry.argument_bytes);
  std::memcpy(bytes_.data() + at, &entry, sizeof entry);
  std::memcpy(bytes_.data() + at + rounded_up(sizeof entry), arguments, bytes);
  ++count_;
  ++recorded_;
}

void LaunchList::clear() {
  bytes_.clear();
  count_ = 0;
}

template <typename Visit>
void LaunchList::for_each(Visit&& visit) const {
  for (std::size_t at = 0; at < bytes_.size();) {
    Entry entry;
    std::memcpy(&entry, bytes_.data() + at, sizeof entry);
    at += rounded_up(sizeof entry);
    // The runtime only reads it, through a pointer that is not const.
    visit(entry, const_cast<std::byte*>(bytes_.data() + at));
    at += entry.argument_bytes;
  }
}

void LaunchList::run(cudaStream_t stream) const {
  for_each([stream](const Entry& entry, void* argument) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(entry.grid[0], entry.grid[1], entry.grid[2]);
    config.blockDim = dim3(entry.block[0], entry.block[1], entry.block[2]);
    config.dynamicSmemBytes = entry.shared_bytes;
    config.stream = stream;
    void* arguments[] = {argument};
    prefer_shared_memory(entry.kernel);  // here, as a list is launched so before there is a graph of it
    check(cudaLaunchKernelExC(&config, entry.kernel, arguments), "launching a kernel");
  });
}

GraphExec LaunchList::instantiate(bool early) const {
  Graph graph = Graph::create();
  cudaGraphNode_t last = nullptr;
  for_each([&](const Entry& entry, void* argument) {
    void* arguments[] = {argument};
    cudaGraphNodeParams node{};
    node.type = cudaGraphNodeTypeKernel;
    node.kernel.func = const_cast<void*>(entry.kernel);
    node.kernel.gridDim = dim3(entry.grid[0], entry.grid[1], entry.grid[2]);
    node.kernel.blockDim = dim3(entry.block[0], entry.block[1], entry.block[2]);
    node.kernel.sharedMemBytes = static_cast<unsigned>(entry.shared_bytes);
    node.kernel.kernelParams = arguments;
    cudaGraphEdgeData edge{};
    if (early && awaits_previous(entry.kernel)) {
      edge.type = cudaGraphDependencyTypeProgrammatic;
      edge.from_port = cudaGraphKernelNodePortProgrammatic;
    }
    const std::size_t before = last == nullptr ? 0 : 1;
    cudaGraphNode_t added = nullptr;
    check(cudaGraphAddNode(&added, graph.get(), &last, before == 0 ? nullptr : &edge, before, &node),
          "adding to a graph");
    last = added;
  });
  return GraphExec::of(graph);
}

}  // namespace draftwerk::cuda
