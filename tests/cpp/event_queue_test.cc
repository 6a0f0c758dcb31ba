#include "engine/event_queue.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <thread>

namespace draftwerk {
namespace {

std::vector<Event> batch_of(std::initializer_list<RequestId> ids) {
  std::vector<Event> batch;
  for (const RequestId id : ids) batch.emplace_back().request_id = id;
  return batch;
}

bool readable(int descriptor) {
  pollfd poll_descriptor{descriptor, POLLIN, 0};
  return ::poll(&poll_descriptor, 1, 0) == 1;
}

TEST(EventQueueTest, HandsOutEverythingInOrderOnce) {
  EventQueue queue;
  auto batch = batch_of({1, 2});
  queue.publish(batch);
  EXPECT_TRUE(batch.empty());
  batch = batch_of({3});
  queue.publish(batch);
  const auto events = queue.take(std::chrono::seconds(0));
  ASSERT_EQ(events.size(), 3U);
  EXPECT_EQ(events[0].request_id, 1);
  EXPECT_EQ(events[2].request_id, 3);
  EXPECT_TRUE(queue.take(std::chrono::seconds(0)).empty());
}

TEST(EventQueueTest, DescriptorIsReadableWhileEventsWait) {
  EventQueue queue;
  EXPECT_FALSE(readable(queue.descriptor()));
  auto batch = batch_of({});
  queue.publish(batch);
  EXPECT_FALSE(readable(queue.descriptor()));
  batch = batch_of({1});
  queue.publish(batch);
  EXPECT_TRUE(readable(queue.descriptor()));
  queue.take(std::chrono::seconds(0));
  EXPECT_FALSE(readable(queue.descriptor()));
}

TEST(EventQueueTest, TakeWaitsForAPublishAndForClose) {
  EventQueue queue;
  std::thread writer([&] {
    auto batch = batch_of({5});
    queue.publish(batch);
  });
  std::vector<Event> events;
  while (events.empty()) events = queue.take(std::chrono::seconds(10));
  writer.join();
  EXPECT_EQ(events[0].request_id, 5);
  std::thread closer([&] { queue.close(); });
  EXPECT_TRUE(queue.take(std::chrono::seconds(60)).empty());
  closer.join();
  EXPECT_TRUE(readable(queue.descriptor()));
}

}  // namespace
}  // namespace draftwerk
