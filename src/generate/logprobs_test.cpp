#include "generate/logprobs.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "ops/logits_test.h"

namespace krait {
namespace {

using namespace logits_test;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

template <class Call>
std::string message(Call&& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Logprobs, AreLogSoftmax) {
  std::vector<float> logits = random_logits(100, 6);
  for (float& x : logits) x += 1000;  // exp() of it overflows
  std::vector<float> shifted = logits;
  for (float& x : shifted) x -= 1000;
  const std::vector<double> p = softmax(shifted);
  const std::vector<int32_t> order = ranked(logits);
  const auto top = top_logprobs(logits, 1000);
  ASSERT_EQ(top.size(), 100u);
  for (size_t i = 0; i < top.size(); ++i) {
    EXPECT_EQ(top[i].first, order[i]);
    const double expected = std::log(p[static_cast<size_t>(order[i])]);
    EXPECT_NEAR(top[i].second, expected, 1e-9);
    EXPECT_NEAR(token_logprob(logits, order[i]), expected, 1e-9);
  }
  EXPECT_EQ(top_logprobs(logits, 3).size(), 3u);
  EXPECT_TRUE(top_logprobs(logits, 0).empty());
}

TEST(Logprobs, OrderEqualsById) {
  const auto top = top_logprobs(std::vector<float>{1, 2, 2, 1, -kInf}, 5);
  std::vector<int32_t> ids;
  for (const auto& [id, logprob] : top) ids.push_back(id);
  EXPECT_EQ(ids, (std::vector<int32_t>{1, 2, 0, 3, 4}));
  EXPECT_EQ(top.back().second, -std::numeric_limits<double>::infinity());
}

TEST(Logprobs, RefuseBadInput) {
  const std::vector<float> logits = {1, kNan};
  EXPECT_NE(message([&] { top_logprobs(logits, 1); }).find("token 1"), std::string::npos);
  EXPECT_NE(message([&] { top_logprobs({}, 1); }).find("no logits"), std::string::npos);
  EXPECT_NE(message([&] {
              token_logprob(std::vector<float>{1, 2}, 2);
            }).find("no such token"),
            std::string::npos);
}

}  // namespace
}  // namespace krait
