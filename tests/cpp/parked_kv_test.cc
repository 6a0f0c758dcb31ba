#include "engine/parked_kv.h"

#include <gtest/gtest.h>

namespace draftwerk {
namespace {

constexpr std::size_t kPage = 4096;
constexpr KvShape kShape{{kPage, kPage}, 32};

class ParkedKvTest : public ::testing::Test {
 protected:
  /// K/V of as many positions as there are tokens.
  SequenceKv computed(const std::vector<TokenId>& tokens) {
    SequenceKv sequence = kv_.open("", tokens, static_cast<std::int64_t>(tokens.size()));
    EXPECT_TRUE(kv_.reserve(sequence, static_cast<std::int64_t>(tokens.size())));
    kv_.commit(sequence, tokens);
    return sequence;
  }
  void park(KvOwner owner, const std::vector<TokenId>& tokens) {
    SequenceKv sequence = computed(tokens);
    parked_.park(owner, "", tokens, sequence);
    EXPECT_FALSE(sequence.is_open());
  }
  /// Positions that `owner` takes over for a prompt of these tokens; -1: none.
  std::int64_t take(KvOwner owner, const std::vector<TokenId>& tokens, std::string_view salt = "") {
    SequenceKv sequence = parked_.take(owner, salt, tokens);
    const std::int64_t positions = sequence.is_open() ? sequence.positions() : -1;
    kv_.close(sequence);
    return positions;
  }

  KvCache kv_{kShape, 64 * kPage, true};
  ParkedKv parked_{kv_};
};

TEST_F(ParkedKvTest, GivesBackToItsOwnerOnceWhatThePromptBeginsWith) {
  const std::vector<TokenId> tokens(20, 5);
  const std::vector<TokenId> longer(21, 5);
  park(1, tokens);
  EXPECT_EQ(take(2, longer), -1);
  EXPECT_EQ(take(1, longer), 20);
  EXPECT_EQ(take(1, longer), -1);
  park(1, tokens);
  EXPECT_EQ(take(1, tokens), -1) << "a row has to be left to compute";
  EXPECT_EQ(take(1, longer), -1) << "and then it was closed";
  park(1, tokens);
  EXPECT_EQ(take(1, longer, "salt"), -1);
  park(1, tokens);
  std::vector<TokenId> other = longer;
  other[19] = 6;
  EXPECT_EQ(take(1, other), -1);
  EXPECT_EQ(kv_.use().sequences, 0);
}

TEST_F(ParkedKvTest, GivesUpTheLeastRecentlyParkedAsFarAsItHelps) {
  const std::vector<TokenId> longer(21, 5);
  for (const KvOwner owner : {1, 2, 3}) park(owner, std::vector<TokenId>(20, owner == 3 ? 5 : 6));
  park(1, std::vector<TokenId>(19, 5));  // in place of what it had
  EXPECT_EQ(kv_.use().sequences, 3);
  SequenceKv running = kv_.open("", {}, 0);
  EXPECT_TRUE(parked_.reserve(running, 10));
  EXPECT_EQ(kv_.use().sequences, 4) << "there was room";
  EXPECT_TRUE(parked_.reserve(running, 28 * kPageSize));
  EXPECT_EQ(kv_.use().sequences, 3);
  EXPECT_EQ(take(2, std::vector<TokenId>(21, 6)), -1);
  EXPECT_EQ(take(3, longer), 20);
  EXPECT_EQ(take(1, longer), 19);
  park(4, longer);
  EXPECT_FALSE(parked_.reserve(running, 33 * kPageSize));
  EXPECT_EQ(kv_.use().sequences, 1);
  kv_.close(running);
}

TEST_F(ParkedKvTest, ClosedConversationsHaveNothingParked) {
  parked_.open_conversation(1);
  parked_.open_conversation(2);
  park(1, std::vector<TokenId>(20, 5));
  parked_.close_conversation(1);
  EXPECT_FALSE(parked_.is_open(1));
  EXPECT_TRUE(parked_.is_open(2));
  EXPECT_EQ(parked_.conversations(), 1);
  EXPECT_EQ(kv_.use().sequences, 0);
  park(2, std::vector<TokenId>(20, 5));
  parked_.clear();
  EXPECT_EQ(parked_.conversations(), 0);
  EXPECT_EQ(kv_.use().sequences, 0);
}

TEST_F(ParkedKvTest, NothingComputedIsNothingParked) {
  SequenceKv empty = kv_.open("", {}, 0);
  parked_.park(1, "", {}, empty);
  EXPECT_FALSE(empty.is_open());
  EXPECT_EQ(kv_.use().sequences, 0);
}

TEST_F(ParkedKvTest, CountsPagesThatNobodyElseHolds) {
  std::vector<TokenId> tokens(100);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<TokenId>(i);
  SequenceKv running = computed(std::vector<TokenId>(tokens.begin(), tokens.begin() + 40));
  park(1, tokens);
  // Positions 0 to 31 are shared with the running one, in both tables; of the sliding ones, 0 to 63 have slid out.
  EXPECT_EQ(parked_.bytes(), (5 + 3) * kPage);
  park(2, std::vector<TokenId>(10, 7));
  EXPECT_EQ(parked_.bytes(), (5 + 3 + 2) * kPage);
  EXPECT_EQ(take(1, std::vector<TokenId>(10, 7)), -1);
  EXPECT_EQ(parked_.bytes(), 2 * kPage);
  parked_.clear();
  EXPECT_EQ(parked_.bytes(), 0U);
  kv_.close(running);
}

}  // namespace
}  // namespace draftwerk
