// Memory of the CPU backend: zeroed mappings, and an arena of huge pages that weights are carved from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "backend/backend.h"

namespace draftwerk::cpu {

/// Zeroed anonymous memory, aligned to 4096 bytes; pages that are never touched cost nothing.
class MappedMemory final : public Buffer {
 public:
  /// `bytes` may be 0. Throws std::bad_alloc if the system refuses.
  explicit MappedMemory(std::size_t bytes);
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;
  MappedMemory(MappedMemory&&) = delete;
  MappedMemory& operator=(MappedMemory&&) = delete;
  ~MappedMemory() override;
  [[nodiscard]] void* data() const override { return data_; }
  [[nodiscard]] std::size_t bytes() const override { return bytes_; }

  /// Gives the pages that lie wholly in [first, last) back to the system; they are zero from then on.
  void discard(std::byte* first, std::byte* last);

  /// Its first `bytes` start at a multiple of 2 MB and the system is asked for huge pages: a step streams every
  /// weight, and with 4 KB pages the walks of the page table show.
  static std::shared_ptr<MappedMemory> huge(std::size_t bytes);

 private:
  MappedMemory(std::size_t bytes, std::size_t alignment);
  void* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// A piece of memory that keeps the mapping it lies in alive.
struct MemorySlice {
  std::shared_ptr<MappedMemory> mapping;
  std::byte* data = nullptr;
  /// Gives what lies in [first, last) of it back, which nobody reads any more, if nothing else is in the mapping.
  void discard(std::byte* first, std::byte* last) const {
    if (mapping.use_count() == 1) mapping->discard(first, last);
  }
};

/// Hands out slices for weights. Small ones share mappings, because many weights are well below the 2 MB of a huge
/// page; large ones get a mapping of their own. A mapping goes back when the last slice in it does.
class WeightArena {
 public:
  /// Zeroed, aligned to 64 bytes. Throws std::bad_alloc.
  MemorySlice take(std::size_t bytes);

 private:
  std::shared_ptr<MappedMemory> chunk_;
  std::size_t used_ = 0;
};

/// An array in mapped memory: untouched parts cost nothing.
template <typename T>
class ScratchArray {
 public:
  void resize(std::int64_t elements) { memory_.emplace(static_cast<std::size_t>(elements) * sizeof(T)); }
  [[nodiscard]] T* data() const { return static_cast<T*>(memory_->data()); }
  T& operator[](std::int64_t i) const { return data()[i]; }

 private:
  std::optional<MappedMemory> memory_;
};

}  // namespace draftwerk::cpu
