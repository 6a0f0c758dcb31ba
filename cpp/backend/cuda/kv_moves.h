// Brings moves of keys and values (Backend::move_kv) to the device and runs them.
#pragma once

#include <cuda_runtime.h>

#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/kv.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/memory.h"

namespace draftwerk::cuda {

class KvMoves {
 public:
  /// Enqueues the moves of one layer. Those of the next layer are mostly the same: then nothing is copied again.
  void run(const KvLayer& kv, std::span<const KvMove> moves, KvArena arena, cudaStream_t stream);
  /// Moves from now on are others, and the device is done with the last ones.
  void forget() { latest_.clear(); }

 private:
  void stage(std::span<const KvMove> moves, KvArena arena, cudaStream_t stream);

  std::vector<KvMove> latest_;  ///< what view_ is of; empty: nothing
  MoveView view_{};
  MirroredMemory memory_;
  LaunchList launches_;
};

}  // namespace draftwerk::cuda
