#include "generate/utf8_stream.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/rng.h"

namespace krait {
namespace {

const std::string kMixed = "aé日👍🏽e\u0301\U0010FFFFz";

std::string stream(std::string_view bytes, size_t step) {
  Utf8Stream utf8;
  std::string out;
  for (size_t at = 0; at < bytes.size(); at += step) out += utf8.push(bytes.substr(at, step));
  return out + utf8.flush();
}

TEST(Utf8Stream, SplitsAnywhereGiveTheSameText) {
  for (size_t step = 1; step <= kMixed.size(); ++step) EXPECT_EQ(stream(kMixed, step), kMixed);
  for (size_t at = 0; at <= kMixed.size(); ++at) {
    Utf8Stream utf8;
    const std::string first = utf8.push(std::string_view(kMixed).substr(0, at));
    EXPECT_EQ(valid_utf8_prefix(first), first.size()) << "half a character at " << at;
    EXPECT_EQ(first + utf8.push(std::string_view(kMixed).substr(at)), kMixed);
    EXPECT_EQ(utf8.flush(), "");
  }
}

TEST(Utf8Stream, HoldsBackOnlyWhatIsIncomplete) {
  Utf8Stream utf8;
  EXPECT_EQ(utf8.push("ab\xF0"), "ab");
  EXPECT_EQ(utf8.push("\x9F"), "");
  EXPECT_EQ(utf8.push("\x91"), "");
  EXPECT_EQ(utf8.push("\x8D!"), "👍!");
}

// One U+FFFD per maximal subpart: the table in the Unicode standard, chapter 3, and what Python's
// errors="replace" gives.
TEST(Utf8Stream, ReplacesWhatIsNoUtf8) {
  const std::string r(kReplacementCharacter);
  const std::pair<std::string, std::string> cases[] = {
      {"\xFF", r},
      {"a\x80z", "a" + r + "z"},
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", r + r + r + r + r + "A" + r + r + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", r + r + r + r + "A"},
      {"x\xF0\x9F\x91", "x" + r},
      {"\xE6\x97", r},
  };
  for (const auto& [bytes, text] : cases) {
    for (size_t step = 1; step <= bytes.size(); ++step) EXPECT_EQ(stream(bytes, step), text);
  }
}

TEST(Utf8Stream, RandomBytesGiveUtf8HoweverTheyAreSplit) {
  Rng rng(3);
  for (int round = 0; round < 300; ++round) {
    std::string bytes;
    for (int i = 0; i < 40; ++i)
      bytes += static_cast<char>(rng.below(2) ? rng.below(256) : 0xC0 + rng.below(64));
    const std::string whole = stream(bytes, bytes.size());
    EXPECT_EQ(valid_utf8_prefix(whole), whole.size());
    EXPECT_EQ(stream(bytes, 1), whole);
    EXPECT_EQ(stream(bytes, 3), whole);
  }
}

TEST(StopMatcher, FindsAStopStringAcrossPieces) {
  const std::string text = "one two STOP three";
  for (size_t step = 1; step <= text.size(); ++step) {
    StopMatcher stops({"nothing", "STOP"});
    std::string out;
    for (size_t at = 0; at < text.size(); at += step)
      out += stops.push(std::string_view(text).substr(at, step));
    EXPECT_EQ(out + stops.flush(), "one two ");
    EXPECT_EQ(stops.found(), 1u);
  }
}

TEST(StopMatcher, HoldsBackNoMoreThanItMust) {
  StopMatcher stops({"abac", "\n\n"});
  EXPECT_EQ(stops.push("xyz"), "xyz");
  EXPECT_EQ(stops.push("xab"), "x");
  EXPECT_EQ(stops.push("a"), "");
  EXPECT_EQ(stops.push("b"), "ab");  // "abab": only "ab" can still become "abac"
  EXPECT_EQ(stops.push("q\n"), "abq");
  EXPECT_EQ(stops.flush(), "\n");
  EXPECT_EQ(stops.found(), std::nullopt);
}

TEST(StopMatcher, OverlapsItself) {
  StopMatcher stops({"aab"});
  EXPECT_EQ(stops.push("aaa"), "a");
  EXPECT_EQ(stops.push("ab rest"), "a");
  EXPECT_EQ(stops.found(), 0u);
  EXPECT_EQ(stops.push("more"), "");
  EXPECT_EQ(stops.flush(), "");
}

TEST(StopMatcher, TheFirstToEndCountsAndOfThoseTheLongest) {
  StopMatcher stops({"d", "bcd", "cd", "abcde"});
  EXPECT_EQ(stops.push("abcdef"), "a");
  EXPECT_EQ(stops.found(), 1u);
}

TEST(StopMatcher, WithoutStopStringsPassesAll) {
  StopMatcher stops;
  EXPECT_EQ(stops.push("anything"), "anything");
  EXPECT_EQ(stops.flush(), "");
}

TEST(StopMatcher, RefusesAnEmptyString) {
  try {
    StopMatcher({"a", ""});
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "stop: empty stop string");
  }
}

}  // namespace
}  // namespace krait
