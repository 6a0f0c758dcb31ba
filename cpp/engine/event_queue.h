// Events on their way from the engine thread to whoever serves the callers: one batch and one wake-up per step.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "engine/request.h"

namespace draftwerk {

class EventQueue {
 public:
  /// Throws std::system_error if the kernel gives no event descriptor.
  EventQueue();
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;
  EventQueue(EventQueue&&) = delete;
  EventQueue& operator=(EventQueue&&) = delete;
  ~EventQueue();

  /// Moves `batch` into the queue and wakes the reader; leaves `batch` empty. Nothing happens for an empty batch.
  void publish(std::vector<Event>& batch);
  /// Everything published since the last call; waits up to `timeout` if there is nothing. Empty on timeout, and after
  /// close() once what was published before has been taken.
  std::vector<Event> take(std::chrono::duration<double> timeout);
  /// Wakes the reader for good.
  void close();
  /// A descriptor that is readable while events are waiting and after close(), for event loops; owned by the queue.
  [[nodiscard]] int descriptor() const { return descriptor_; }

 private:
  void signal() const;

  std::mutex mutex_;
  std::condition_variable ready_;
  std::vector<Event> events_;
  bool closed_ = false;
  int descriptor_ = -1;
};

}  // namespace draftwerk
