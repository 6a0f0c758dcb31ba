#include "engine/event_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <iterator>
#include <system_error>
#include <utility>

namespace draftwerk {

EventQueue::EventQueue() : descriptor_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (descriptor_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

EventQueue::~EventQueue() { ::close(descriptor_); }

void EventQueue::publish(std::vector<Event>& batch) {
  if (batch.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    events_.insert(events_.end(), std::make_move_iterator(batch.begin()), std::make_move_iterator(batch.end()));
  }
  batch.clear();
  ready_.notify_one();
  signal();
}

std::vector<Event> EventQueue::take(std::chrono::duration<double> timeout) {
  std::unique_lock lock(mutex_);
  ready_.wait_for(lock, timeout, [this] { return !events_.empty() || closed_; });
  if (!closed_) {
    std::uint64_t count = 0;
    // Resets the descriptor; EAGAIN when it is not signalled is as good.
    [[maybe_unused]] const auto got = ::read(descriptor_, &count, sizeof count);
  }
  return std::exchange(events_, {});
}

void EventQueue::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  ready_.notify_all();
  signal();
}

void EventQueue::signal() const {
  const std::uint64_t one = 1;
  // Fails only when the counter is saturated, and then it is readable anyway.
  [[maybe_unused]] const auto put = ::write(descriptor_, &one, sizeof one);
}

}  // namespace draftwerk
