#include "generate/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"

namespace krait {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

SamplingParams neutral() {
  SamplingParams p;
  p.temperature = 1;
  p.top_k = 0;
  p.top_p = 1;
  p.min_p = 0;
  return p;
}

std::vector<float> random_logits(size_t n, uint64_t seed, double spread = 3) {
  Rng rng(seed);
  std::vector<float> logits(n);
  for (float& x : logits) x = static_cast<float>(spread * rng.normal());
  return logits;
}

std::vector<double> softmax(std::span<const float> logits, double temperature = 1) {
  double total = 0;
  std::vector<double> p;
  for (const float x : logits) total += p.emplace_back(std::exp(x / temperature));
  for (double& x : p) x /= total;
  return p;
}

// Ids from most likely to least.
std::vector<int32_t> ranked(std::span<const float> logits) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  return ids;
}

std::vector<int> counts(const SamplingParams& params, std::span<const float> logits, int draws,
                        std::span<const int32_t> recent = {}) {
  Sampler sampler(params);
  std::vector<int> result(logits.size());
  for (int i = 0; i < draws; ++i) {
    std::vector<float> copy(logits.begin(), logits.end());
    ++result[static_cast<size_t>(sampler.sample(copy, recent))];
  }
  return result;
}

std::set<int32_t> drawn(const SamplingParams& params, std::span<const float> logits,
                        int draws = 4000) {
  std::set<int32_t> ids;
  const std::vector<int> n = counts(params, logits, draws);
  for (size_t i = 0; i < n.size(); ++i) {
    if (n[i] > 0) ids.insert(static_cast<int32_t>(i));
  }
  return ids;
}

double chi_square(std::span<const int> observed, std::span<const double> p, int draws) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double expected = p[i] * draws;
    if (p[i] == 0) {
      if (observed[i] != 0) return INFINITY;
      continue;
    }
    sum += (observed[i] - expected) * (observed[i] - expected) / expected;
  }
  return sum;
}

// 99.9 % quantile of chi-square with 7 degrees of freedom: 24.3. The seeds are fixed, so this
// cannot fail by chance.
TEST(Sampler, DrawsBySoftmaxAtATemperature) {
  const std::vector<float> logits = {0.5f, -1, 2, 0, 1, 1.5f, -0.5f, 0.25f};
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    SamplingParams params = neutral();
    params.temperature = temperature;
    params.seed = 11;
    const std::vector<int> n = counts(params, logits, 40000);
    EXPECT_LT(chi_square(n, softmax(logits, temperature), 40000), 24.3) << temperature;
    EXPECT_GT(chi_square(n, softmax(logits, temperature * 1.2), 40000), 24.3) << temperature;
  }
}

TEST(Sampler, GreedyTakesTheLowestIdOfEquals) {
  SamplingParams params;
  params.temperature = 0;
  Sampler sampler(params);
  std::vector<float> logits = {1, 3, 2, 3, -kInf};
  EXPECT_EQ(sampler.sample(logits, {}), 1);
  EXPECT_EQ(sampler.rng_position(), 0u);
}

TEST(Sampler, TopKIsExact) {
  const std::vector<float> logits = random_logits(500, 1, 0.3);
  const std::vector<int32_t> order = ranked(logits);
  for (const int k : {1, 2, 7, 40}) {
    SamplingParams params = neutral();
    params.top_k = k;
    EXPECT_EQ(drawn(params, logits), std::set<int32_t>(order.begin(), order.begin() + k)) << k;
  }
}

TEST(Sampler, TopKTakesLowerIdsOfEquals) {
  SamplingParams params = neutral();
  params.top_k = 3;
  const std::vector<float> logits = {1, 2, 1, 1, 1, 1, 1, 1, 1, 1};
  EXPECT_EQ(drawn(params, logits), (std::set<int32_t>{0, 1, 2}));
}

TEST(Sampler, TopPIsExact) {
  // 20 logits, and 500 that need more than one round of sorting.
  for (const size_t n : {20u, 500u}) {
    const std::vector<float> logits = random_logits(n, 2, 0.4);
    const std::vector<int32_t> order = ranked(logits);
    const std::vector<double> p = softmax(logits);
    for (const float top_p : {0.0f, 0.01f, 0.3f, 0.6f}) {
      size_t expected = 0;
      for (double sum = 0; expected == 0 || sum < top_p;)
        sum += p[static_cast<size_t>(order[expected++])];
      SamplingParams params = neutral();
      params.top_p = top_p;
      EXPECT_EQ(drawn(params, logits, 12000),
                std::set<int32_t>(order.begin(), order.begin() + static_cast<ptrdiff_t>(expected)))
          << n << " " << top_p;
    }
  }
}

TEST(Sampler, MinPIsExact) {
  const std::vector<float> logits = random_logits(60, 3, 1);
  const std::vector<double> p = softmax(logits);
  const double max = *std::max_element(p.begin(), p.end());
  for (const float min_p : {0.05f, 0.3f, 1.0f}) {
    std::set<int32_t> expected;
    for (size_t i = 0; i < p.size(); ++i) {
      if (p[i] >= min_p * max * (1 - 1e-9)) expected.insert(static_cast<int32_t>(i));
    }
    SamplingParams params = neutral();
    params.min_p = min_p;
    EXPECT_EQ(drawn(params, logits, 20000), expected) << min_p;
  }
}

// Filters work at temperature 1 and on what the one before left: of {.4, .3, .2, .1} top-k 3 leaves
// {.44, .33, .22}, of which top-p 0.75 keeps two; at temperature 1 that would be three without
// top-k.
TEST(Sampler, FiltersInOrder) {
  std::vector<float> logits;
  for (const double p : {0.1, 0.2, 0.3, 0.4}) logits.push_back(static_cast<float>(std::log(p)));
  SamplingParams params = neutral();
  params.temperature = 5;
  params.top_p = 0.75f;
  EXPECT_EQ(drawn(params, logits).size(), 3u);
  params.top_k = 3;
  EXPECT_EQ(drawn(params, logits), (std::set<int32_t>{2, 3}));
}

TEST(Sampler, PenalizesEachRecentTokenOnce) {
  SamplingParams params = neutral();
  params.repeat_penalty = 2;
  params.repeat_last_n = 3;
  Sampler sampler(params);
  std::vector<float> logits = {1, 2, -1, 4, 0};
  const std::vector<int32_t> recent = {0, 2, 3, 3,
                                       -5};  // 0 and the first are too long ago; -5 is no token
  sampler.sample(logits, recent);
  EXPECT_EQ(logits, (std::vector<float>{1, 2, -1, 2, 0}));
  params.repeat_last_n = -1;
  Sampler all(params);
  logits = {1, 2, -1, 4, 0};
  all.sample(logits, recent);
  EXPECT_EQ(logits, (std::vector<float>{0.5f, 2, -2, 2, 0}));
  params.repeat_last_n = 0;
  Sampler off(params);
  off.sample(logits, recent);
  EXPECT_EQ(logits, (std::vector<float>{0.5f, 2, -2, 2, 0}));
}

TEST(Sampler, PenaltyCountsForGreedy) {
  SamplingParams params;
  params.temperature = 0;
  params.repeat_penalty = 3;
  std::vector<float> logits = {2, 5, 1};
  EXPECT_EQ(Sampler(params).sample(logits, std::vector<int32_t>{1}), 0);
}

TEST(Sampler, SeedsRepeat) {
  const std::vector<float> logits = random_logits(1000, 4, 0.5);
  const auto run = [&](uint64_t seed, uint64_t position) {
    SamplingParams params;
    params.top_k = 0;
    params.min_p = 0;
    params.seed = seed;
    Sampler sampler(params);
    sampler.seek_rng(position);
    std::vector<int32_t> ids;
    for (int i = 0; i < 20; ++i) {
      std::vector<float> copy = logits;
      ids.push_back(sampler.sample(copy, {}));
    }
    ids.push_back(static_cast<int32_t>(sampler.rng_position()));
    return ids;
  };
  EXPECT_EQ(run(1, 0), run(1, 0));
  EXPECT_NE(run(1, 0), run(2, 0));
  const std::vector<int32_t> first = run(1, 0);
  const std::vector<int32_t> later = run(1, 2 * 10);  // a draw takes two numbers
  EXPECT_TRUE(std::equal(later.begin(), later.begin() + 10, first.begin() + 10));
}

TEST(Sampler, LeavesOutPaddingAndMaskedTokens) {
  SamplingParams params = neutral();
  params.vocab_limit = 3;
  EXPECT_EQ(drawn(params, std::vector<float>{0, -kInf, 0, 9, 9}), (std::set<int32_t>{0, 2}));
  params.temperature = 0;
  EXPECT_EQ(drawn(params, std::vector<float>{0, 1, 0, 9, 9}, 3), (std::set<int32_t>{1}));
}

template <class Call>
std::string message(Call&& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Sampler, RefusesLogitsThatAreNoNumbers) {
  Sampler sampler(neutral());
  for (const float bad : {kNan, kInf}) {
    for (size_t at = 0; at < 3; ++at) {
      std::vector<float> logits = {1, 2, 3};
      logits[at] = bad;
      EXPECT_NE(message([&] { sampler.sample(logits, {}); }).find("token " + std::to_string(at)),
                std::string::npos);
    }
  }
  std::vector<float> none = {-kInf, -kInf};
  EXPECT_NE(message([&] { sampler.sample(none, {}); }).find("no token can be picked"),
            std::string::npos);
  EXPECT_NE(message([&] { sampler.sample({}, {}); }).find("no logits"), std::string::npos);
}

TEST(Sampler, RefusesBadParametersByName) {
  const auto refused = [](const char* name, auto set) {
    SamplingParams params;
    set(params);
    const std::string text = message([&] { Sampler{params}; });
    EXPECT_TRUE(text.starts_with(std::string(name) + ": bad sampling parameter")) << text;
  };
  for (const float bad : {-0.1f, kNan, kInf}) {
    refused("temperature", [=](SamplingParams& p) { p.temperature = bad; });
    refused("top_p", [=](SamplingParams& p) { p.top_p = bad; });
    refused("min_p", [=](SamplingParams& p) { p.min_p = bad; });
    refused("repeat_penalty", [=](SamplingParams& p) { p.repeat_penalty = bad; });
  }
  refused("top_p", [](SamplingParams& p) { p.top_p = 1.01f; });
  refused("repeat_penalty", [](SamplingParams& p) { p.repeat_penalty = 0; });
  refused("repeat_last_n", [](SamplingParams& p) { p.repeat_last_n = -2; });
  refused("vocab_limit", [](SamplingParams& p) { p.vocab_limit = -1; });
  EXPECT_NO_THROW(SamplingParams{}.validate());
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
  EXPECT_NE(message([&] {
              token_logprob(std::vector<float>{1, 2}, 2);
            }).find("no such token"),
            std::string::npos);
}

}  // namespace
}  // namespace krait
