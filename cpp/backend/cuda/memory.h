// Memory that grows with what it is asked to hold. What was in it is lost then, and it lies elsewhere: launches that
// were recorded with its address must not run any more.
#pragma once

#include <bit>
#include <cstddef>
#include <utility>

#include "backend/cuda/handles.h"
#include "backend/cuda/launch.h"

namespace draftwerk::cuda {

/// On the device.
class GrowingMemory {
 public:
  /// Makes room for `bytes`. Returns whether it had to grow.
  bool reserve(std::size_t bytes) {
    if (bytes <= bytes_) return false;
    bytes_ = 0;
    memory_ = DeviceMemory();  // the old one first
    memory_ = DeviceMemory::of(bytes);
    bytes_ = bytes;
    return true;
  }
  [[nodiscard]] void* get() const { return memory_.get(); }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  DeviceMemory memory_;
  std::size_t bytes_ = 0;
};

/// On the device, and as much pinned memory on the host, between which it is copied.
class MirroredMemory {
 public:
  /// Makes room for `bytes`.
  void reserve(std::size_t bytes) {
    if (bytes <= device_.bytes()) return;
    PinnedMemory host = PinnedMemory::of(bytes);  // first: if there is none, everything stays as it was
    device_.reserve(bytes);
    host_ = std::move(host);
  }
  /// The same for sizes that grow with what is asked: to a power of two, so that it seldom happens.
  void reserve_more(std::size_t bytes) {
    if (bytes > device_.bytes()) reserve(std::bit_ceil(bytes));
  }
  [[nodiscard]] std::byte* host() const { return static_cast<std::byte*>(host_.get()); }
  [[nodiscard]] std::byte* device() const { return static_cast<std::byte*>(device_.get()); }
  [[nodiscard]] Copy to_device(std::size_t bytes) const { return {device(), host(), bytes}; }
  [[nodiscard]] Copy to_host(std::size_t bytes) const { return {host(), device(), bytes}; }

 private:
  PinnedMemory host_;
  GrowingMemory device_;
};

}  // namespace draftwerk::cuda
