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
  /// Enqueues moves.
  void run(std::span<const KvLayer> layers, std::span<const KvMove> moves, KvArena arena, cudaStream_t stream);
  /// The device is done with all that was enqueued.
  void done() { enqueued_ = false; }

 private:
  MoveView stage(std::span<const KvLayer> layers, std::span<const KvMove> moves, KvArena arena, cudaStream_t stream);

  bool enqueued_ = false;
  MirroredMemory memory_;
  LaunchList launches_;
};

}  // namespace draftwerk::cuda
