#include "ops/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "ops/logits_test.h"
#include "ops/op_test.h"
#include "ops/sample_plan.h"
#include "ops/sample_weight.h"

namespace krait::op_test {
namespace {

using namespace logits_test;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A batch, in memory that host and engine both reach. Row i is the sequence in slot rows - 1 - i;
// the last slot is the spare one.
class Rows {
 public:
  Rows(Context& ctx, int64_t rows, int64_t vocab, int64_t capacity)
      : ctx_(ctx),
        logits_(DType::f32, {rows, vocab}, memory()),
        slot_(DType::i32, {rows}, memory()),
        sequence_(DType::u8, {rows + 1, sizeof(SampledSequence)}, memory()),
        recent_(DType::i32, {rows + 1, capacity}, memory()),
        tokens_(DType::i32, {rows}, memory()),
        picked_(DType::i32, {rows, 2}, memory()) {
    for (int64_t i = 0; i < rows; ++i)
      slot_->ptr<int32_t>()[i] = static_cast<int32_t>(rows - 1 - i);
  }

  int64_t size() const { return tokens_->shape[0]; }
  std::span<float> logits(int64_t row) const {
    return {logits_->row<float>(row), static_cast<size_t>(logits_->shape[1])};
  }
  SampledSequence& sequence(int64_t row) const {
    return reinterpret_cast<SampledSequence*>(sequence_->ptr<uint8_t>())[size() - 1 - row];
  }
  std::span<int32_t> recent(int64_t row) const {
    return {recent_->row<int32_t>(size() - 1 - row), static_cast<size_t>(recent_->shape[1])};
  }
  int32_t& slot(int64_t row) const { return slot_->ptr<int32_t>()[row]; }
  int32_t& token(int64_t row) const { return tokens_->ptr<int32_t>()[row]; }
  int32_t picked_token(int64_t row) const { return picked_->ptr<int32_t>()[2 * row]; }
  Picked picked(int64_t row) const {
    return static_cast<Picked>(picked_->ptr<int32_t>()[2 * row + 1]);
  }
  void remember(int64_t row, std::span<const int32_t> tokens) {
    for (const int32_t token : tokens) {
      const int64_t number = sequence(row).tokens++;
      recent(row)[static_cast<size_t>(number % recent_->shape[1])] = token;
    }
  }
  // The rows from `first` on, as a batch.
  void run(int64_t first = 0) {
    const auto rows = [&](const Tensor& t) { return t.slice(0, first, size()); };
    sample_tokens(ctx_, {.logits = rows(logits_),
                         .slot = rows(slot_),
                         .spare_slot = static_cast<int32_t>(size()),
                         .sequence = sequence_,
                         .recent = recent_,
                         .tokens = rows(tokens_),
                         .picked = rows(picked_)});
    ctx_.engine().synchronize(ctx_);
  }
  void copy_from(const Rows& other) {
    for_each_tensor(other, [](const Tensor& to, const Tensor& from) {
      std::memcpy(to.data, from.data, to.bytes());
    });
  }
  bool same_as(const Rows& other) const {
    bool same = true;
    for_each_tensor(other, [&](const Tensor& a, const Tensor& b) {
      same = same && std::memcmp(a.data, b.data, a.bytes()) == 0;
    });
    return same;
  }

 private:
  Memory& memory() const { return ctx_.engine().transfer_memory(); }
  template <class F>
  void for_each_tensor(const Rows& other, F&& f) const {
    f(logits_, other.logits_);
    f(slot_, other.slot_);
    f(sequence_, other.sequence_);
    f(recent_, other.recent_);
    f(tokens_, other.tokens_);
    f(picked_, other.picked_);
  }

  Context& ctx_;
  OwnedTensor logits_, slot_, sequence_, recent_, tokens_, picked_;
};

// Rows of all kinds, a random choice of options in each.
void fill(Rows& rows, Rng& rng) {
  const auto chance = [&](double p) { return rng.uniform() < p; };
  for (int64_t row = 0; row < rows.size(); ++row) {
    const std::span<float> logits = rows.logits(row);
    const double spread = std::exp(rng.uniform(-2, 3)),
                 mean = chance(0.3) ? 1000 * rng.normal() : 0;
    const double step = chance(0.4) ? spread * std::exp(rng.uniform(-5, 2)) : 0;  // many equal ones
    const double masked = chance(0.3) ? rng.uniform() : 0;
    for (float& x : logits) {
      double value = spread * rng.normal();
      if (step > 0) value = step * std::round(value / step);
      x = chance(masked) ? -kInf : static_cast<float>(mean + value);
    }
    const auto place = [&] { return rng.below(logits.size()); };
    if (chance(0.03)) logits[place()] = kNan;
    if (chance(0.03)) logits[place()] = kInf;
    SamplingParams p;
    p.temperature = chance(0.2) ? 0.f : static_cast<float>(std::exp(rng.uniform(-3, 2)));
    constexpr int kTopK[] = {0, 1, 2, 40, 255, 256, 257, 700, 5000, 1000000};
    p.top_k = kTopK[rng.below(std::size(kTopK))];
    p.top_p = chance(0.3) ? 1.f : static_cast<float>(chance(0.1) ? 0 : std::sqrt(rng.uniform()));
    p.min_p = chance(0.4) ? 0.f : static_cast<float>(std::exp(rng.uniform(-9, 0)));
    p.repeat_penalty = chance(0.5) ? 1.f : static_cast<float>(rng.uniform(0.7, 1.5));
    p.repeat_last_n = chance(0.5) ? 64 : static_cast<int>(rng.below(300)) - 1;
    p.seed = rng.below(uint64_t{1} << 62);
    if (chance(0.3)) p.vocab_limit = static_cast<int32_t>(1 + rng.below(2 * logits.size()));
    SampledSequence& s = rows.sequence(row) = sampled_sequence(p, chance(0.1) ? 1 : 9);
    s.rng_position = rng.below(1000);
    if (chance(0.05)) s.remaining = 0;
    s.end_token_count = static_cast<int32_t>(rng.below(kMaxEndTokens + 1));
    for (int i = 0; i < s.end_token_count; ++i) s.end_tokens[i] = static_cast<int32_t>(place());
    std::vector<int32_t> recent(rng.below(500));
    for (int32_t& id : recent) id = static_cast<int32_t>(place()) - (chance(0.01) ? 5 : 0);
    rows.remember(row, recent);
    rows.token(row) = static_cast<int32_t>(place());
  }
}

struct Counts {
  int64_t rows = 0, vocab = 0, batches = 1;
};

void expect_what_the_reference_does(Context& ctx, std::initializer_list<Counts> shapes) {
  Context reference(reference_engine(), 1);
  Rng rng(7);
  for (const Counts& shape : shapes)
    for (int64_t batch = 0; batch < shape.batches; ++batch) {
      SCOPED_TRACE(testing::Message() << shape.rows << " x " << shape.vocab << ", " << batch);
      Rows expected(reference, shape.rows, shape.vocab, 200),
          actual(ctx, shape.rows, shape.vocab, 200);
      fill(expected, rng);
      actual.copy_from(expected);
      expected.run();
      actual.run();
      for (int64_t row = 0; row < shape.rows; ++row) {
        EXPECT_EQ(actual.picked(row), expected.picked(row)) << row;
        const SampledSequence& s = expected.sequence(row);
        EXPECT_EQ(actual.picked_token(row), expected.picked_token(row))
            << row << ": top_k " << s.top_k << " top_p " << s.top_p << " log_min_p " << s.log_min_p
            << " temperature " << s.temperature << " limit " << s.vocab_limit;
      }
      EXPECT_TRUE(actual.same_as(expected));
    }
}

TEST(SampleTokens, CpuMatchesReference) {
  Context ctx(cpu_engine(), 2);
  expect_what_the_reference_does(ctx, {{64, 1, 2},
                                       {64, 16, 20},
                                       {64, 515, 10},
                                       {64, 3000, 5},
                                       {32, 50280, 1},
                                       {16, 50281, 1},
                                       {8, 128256, 1}});
}

TEST(SampleTokensCuda, MatchesReference) {
  on_cuda([](Context& ctx) {
    expect_what_the_reference_does(
        ctx, {{64, 1, 2}, {64, 16, 20}, {64, 515, 20}, {64, 1028, 10}, {64, 3001, 10}});
  });
}

TEST(SampleTokensCuda, MatchesReferenceOfLargeVocabularies) {
  on_cuda([](Context& ctx) {
    expect_what_the_reference_does(ctx, {{64, 8192, 5},
                                         {128, 50280, 3},
                                         {32, 50281, 2},
                                         {32, 128256, 2},
                                         {2, kMaxSampledVocab, 1}});
  });
}

TEST(SamplePlan, FitsOnChip) {
  EXPECT_EQ(cuda::sample_shared_bytes(16), 8 * cuda::kSampleBins);
  EXPECT_EQ(cuda::sample_shared_bytes(kMaxSampledVocab), kMaxSampledVocab / 8);
  EXPECT_LE(cuda::sample_shared_bytes(kMaxSampledVocab), 80 << 10);  // of the 99 KB that all have
}

TEST(SamplingWeight, IsAPowerOfTwo) {
  const double one = std::exp2(kSamplingWeightBits);
  EXPECT_EQ(sampling_weight(0.0), uint64_t{1} << kSamplingWeightBits);
  EXPECT_EQ(sampling_weight(1.0), uint64_t{1} << (kSamplingWeightBits - 1));
  EXPECT_EQ(sampling_weight(kSamplingWeightBits + 0.5), 0u);
  EXPECT_EQ(sampling_weight(std::numeric_limits<double>::infinity()), 0u);
  Rng rng(1);
  for (int i = 0; i < 100000; ++i) {
    const double distance = rng.uniform(0, 20), exact = one * std::exp2(-distance);
    ASSERT_NEAR(static_cast<double>(sampling_weight(distance)), exact, 1 + exact * 0x1p-29)
        << distance;  // 1: what is cut off
  }
}

// One sequence on the CPU engine.
class Sampler {
 public:
  explicit Sampler(const SamplingParams& params)
      : sequence_(sampled_sequence(params, std::numeric_limits<int64_t>::max())) {}

  int32_t sample(std::span<float> logits, std::span<const int32_t> recent = {}) {
    Rows rows(ctx_, 1, static_cast<int64_t>(logits.size()), 64);
    rows.sequence(0) = sequence_;
    rows.remember(0, recent);
    std::copy(logits.begin(), logits.end(), rows.logits(0).begin());
    rows.run();
    std::copy(rows.logits(0).begin(), rows.logits(0).end(), logits.begin());
    check_picked(rows.picked_token(0), rows.picked(0));
    EXPECT_EQ(rows.token(0), rows.picked_token(0));
    sequence_.rng_position = rows.sequence(0).rng_position;
    return rows.token(0);
  }
  uint64_t rng_position() const { return sequence_.rng_position; }
  void seek_rng(uint64_t position) { sequence_.rng_position = position; }

 private:
  Context ctx_{cpu_engine(), 1};
  SampledSequence sequence_;
};

SamplingParams neutral() {
  SamplingParams p;
  p.temperature = 1;
  p.top_k = 0;
  p.top_p = 1;
  p.min_p = 0;
  return p;
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
  EXPECT_EQ(sampler.sample(logits), 1);
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
      ids.push_back(sampler.sample(copy));
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
      EXPECT_NE(message([&] { sampler.sample(logits); }).find("token " + std::to_string(at)),
                std::string::npos);
    }
  }
  std::vector<float> none = {-kInf, -kInf};
  EXPECT_NE(message([&] { sampler.sample(none); }).find("no token can be picked"),
            std::string::npos);
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

// A sequence ends at an end token, when none remain, or where nothing can be picked; its row then
// stands at the spare slot and rests.
void expect_rows_to_end(Context& ctx) {
  Rows rows(ctx, 4, 5, 3);
  for (int64_t row = 0; row < 4; ++row) {
    SamplingParams greedy;
    greedy.temperature = 0;
    rows.sequence(row) = sampled_sequence(greedy, row == 1 ? 1 : 7);
    rows.sequence(row).end_tokens[0] = 3;
    rows.sequence(row).end_tokens[1] = row == 0 ? 2 : 4;
    rows.sequence(row).end_token_count = 2;
    rows.remember(row, std::vector<int32_t>{1, 1, 1, 1});
    const std::vector<float> logits = {0, 0, 1, 0, row == 2 ? kNan : 0};
    std::copy(logits.begin(), logits.end(), rows.logits(row).begin());
  }
  rows.run();
  const std::vector<int32_t> slots = {4, 4, 4, 0};
  for (int64_t row = 0; row < 4; ++row) {
    EXPECT_EQ(rows.slot(row), slots[static_cast<size_t>(row)]) << row;
    EXPECT_EQ(rows.sequence(row).remaining, row == 3 ? 6 : 0) << row;
    EXPECT_EQ(rows.picked_token(row), row == 2 ? 4 : 2) << row;
    EXPECT_EQ(rows.picked(row), row == 2 ? Picked::not_a_number : Picked::token) << row;
  }
  EXPECT_EQ(rows.recent(3)[1], 2);  // number 4 of a ring of 3
  EXPECT_EQ(rows.sequence(3).tokens, 5);
  rows.logits(3)[0] = 9;
  rows.run();
  for (int64_t row = 0; row < 3; ++row) {
    EXPECT_EQ(rows.picked(row), Picked::at_rest) << row;
    EXPECT_EQ(rows.slot(row), 4) << row;
  }
  EXPECT_EQ(rows.token(0), 2);
  EXPECT_EQ(rows.token(3), 0);
  EXPECT_EQ(rows.recent(3)[2], 0);
  EXPECT_EQ(rows.sequence(3).remaining, 5);
}

TEST(SampleTokens, EndedRowsRest) {
  for (const Engine* engine : {&reference_engine(), &cpu_engine()}) {
    Context ctx(*engine, 2);
    expect_rows_to_end(ctx);
  }
}

TEST(SampleTokensCuda, EndedRowsRest) { on_cuda(expect_rows_to_end); }

}  // namespace
}  // namespace krait::op_test
