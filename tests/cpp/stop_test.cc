#include "engine/stop.h"

#include <gtest/gtest.h>

#include <random>

namespace draftwerk {
namespace {

TEST(TokenBytesTest, GivesEachTokensBytesAndNothingBeyond) {
  const TokenBytes bytes({0, 2, 2, 5}, "abcde");
  EXPECT_EQ(bytes[0], "ab");
  EXPECT_EQ(bytes[1], "");
  EXPECT_EQ(bytes[2], "cde");
  EXPECT_EQ(bytes[3], "");
  EXPECT_EQ(bytes[-1], "");
  EXPECT_TRUE(TokenBytes().empty());
}

TEST(TokenBytesTest, RefusesOffsetsThatDoNotFit) {
  EXPECT_THROW(TokenBytes({}, ""), std::invalid_argument);
  EXPECT_THROW(TokenBytes({0, 6}, "abcde"), std::invalid_argument);
  EXPECT_THROW(TokenBytes({1, 5}, "abcde"), std::invalid_argument);
  EXPECT_THROW(TokenBytes({0, 4, 2, 5}, "abcde"), std::invalid_argument);
}

TEST(StopStringMatcherTest, FindsAStringAcrossTokens) {
  StopStringMatcher matcher({"stop"});
  EXPECT_EQ(matcher.push("do not s", true), std::nullopt);
  EXPECT_EQ(matcher.push("", true), std::nullopt);
  EXPECT_EQ(matcher.push("to", true), std::nullopt);
  EXPECT_EQ(matcher.push("p now", true), 7);
}

TEST(StopStringMatcherTest, NotArmedMatchesDoNotCountLater) {
  StopStringMatcher matcher({"ab"});
  EXPECT_EQ(matcher.push("ab", false), std::nullopt);
  EXPECT_EQ(matcher.push("x", true), std::nullopt);
  EXPECT_EQ(matcher.push("ab", true), 3);
}

TEST(StopStringMatcherTest, EarliestStartWinsAmongThoseCompletedTogether) {
  StopStringMatcher matcher({"d", "bcd"});
  EXPECT_EQ(matcher.push("abc", true), std::nullopt);
  EXPECT_EQ(matcher.push("d", true), 1);
}

TEST(StopStringMatcherTest, AgreesWithASearchOfTheWholeText) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::string> strings;
    for (unsigned i = 0; i < 1 + random() % 3; ++i) {
      std::string s;
      for (unsigned n = 0; n < 1 + random() % 4; ++n) s.push_back(static_cast<char>('a' + random() % 2));
      strings.push_back(s);
    }
    StopStringMatcher matcher(strings);
    std::string text;
    for (int step = 0; step < 12; ++step) {
      std::string bytes;
      for (unsigned n = 0; n < random() % 4; ++n) bytes.push_back(static_cast<char>('a' + random() % 2));
      text += bytes;
      std::size_t first = std::string::npos;
      for (const auto& s : strings) first = std::min(first, text.find(s));
      const auto found = matcher.push(bytes, true);
      if (first == std::string::npos) {
        EXPECT_EQ(found, std::nullopt);
      } else {
        ASSERT_EQ(found, static_cast<std::int64_t>(first));
        break;
      }
    }
  }
}

}  // namespace
}  // namespace draftwerk
