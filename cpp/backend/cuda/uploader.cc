#include "backend/cuda/uploader.h"

#include <algorithm>
#include <cstring>

namespace draftwerk::cuda {

Uploader::Uploader(int threads) : workers_(threads), stream_(Stream::create()) {
  for (Buffer& buffer : buffers_) {
    buffer.memory = PinnedMemory::of(kBytes);
    buffer.sent = Event::create();
  }
}

Uploader::~Uploader() { static_cast<void>(cudaStreamSynchronize(stream_.get())); }

std::byte* Uploader::next() {
  // An event that was never recorded has nothing to wait for.
  check(cudaEventSynchronize(buffers_[turn_].sent.get()), "copying weights to the device");
  return static_cast<std::byte*>(buffers_[turn_].memory.get());
}

void Uploader::send(void* to, std::size_t bytes) {
  const Buffer& buffer = buffers_[turn_];
  check(cudaMemcpyAsync(to, buffer.memory.get(), bytes, cudaMemcpyHostToDevice, stream_.get()),
        "copying weights to the device");
  check(cudaEventRecord(buffer.sent.get(), stream_.get()), "copying weights to the device");
  turn_ = 1 - turn_;
}

void Uploader::send(void* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kBytes) {
    const std::size_t part = std::min(kBytes, bytes - at);
    std::memcpy(next(), from + at, part);
    send(static_cast<std::byte*>(to) + at, part);
  }
}

void Uploader::clear(void* to, std::size_t bytes) {
  check(cudaMemsetAsync(to, 0, bytes, stream_.get()), "clearing device memory");
}

}  // namespace draftwerk::cuda
