#include "generate/generator.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "generate/scorer.h"
#include "generate/utf8.h"
#include "ops/deferred_engine.h"
#include "ops/op_test.h"
#include "tests/count_allocations.h"
#include "tests/tiny_model.h"

namespace krait {
namespace {

using op_test::close;

std::vector<int32_t> some_tokens(size_t count, uint64_t seed = 3) {
  Rng rng(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& t : tokens) t = static_cast<int32_t>(1 + rng.below(255));
  return tokens;
}

std::vector<double> doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }

class GeneratorTest : public testing::Test {
 protected:
  Context ctx{cpu_engine(), 2};
  Model model = make_random_model(tiny_config(), DType::f32, 1);
  Tokenizer tokenizer = Tokenizer::bytes();

  Generator fed(const std::vector<int32_t>& tokens) {
    Generator generator(ctx, model.weights, tokenizer);
    generator.feed(tokens);
    return generator;
  }

  // Logits after each of the tokens, computed at once and without a state.
  std::vector<std::vector<double>> logits_at_once(std::vector<int32_t> tokens) {
    const int64_t count = static_cast<int64_t>(tokens.size());
    std::vector<int32_t> seq_start = {0, static_cast<int32_t>(count)};
    const OwnedTensor hidden(DType::f32, {count, model.config().d_model});
    const OwnedTensor out(DType::f32, {count, model.config().vocab_size});
    forward(ctx, model.weights,
            {.tokens = Tensor(tokens.data(), DType::i32, {count}),
             .seq_start = Tensor(seq_start.data(), DType::i32, {2}),
             .slot = {}},
            nullptr, hidden);
    logits(ctx, model.weights, hidden, out);
    std::vector<std::vector<double>> rows;
    for (int64_t i = 0; i < count; ++i) rows.push_back(op_test::to_double(out->slice(0, i, i + 1)));
    return rows;
  }

  static GenerateOptions greedy(int64_t count) {
    GenerateOptions options;
    options.max_tokens = count;
    options.sampling.temperature = 0;
    options.ignore_eos = true;
    return options;
  }
};

TEST_F(GeneratorTest, APromptInAnyPiecesGivesTheSameLogits) {
  const std::vector<int32_t> tokens = some_tokens(1300);
  const std::vector<double> expected = logits_at_once(tokens).back();
  EXPECT_TRUE(close(doubles(fed(tokens).next_logits()), expected, 1e-5));
  for (const size_t piece : {1u, 100u, 511u, 512u, 513u}) {
    Generator generator(ctx, model.weights, tokenizer);
    for (size_t at = 0; at < tokens.size(); at += piece)
      generator.feed(std::span(tokens).subspan(at, std::min(piece, tokens.size() - at)));
    EXPECT_TRUE(close(doubles(generator.next_logits()), expected, 1e-5)) << piece;
  }
}

TEST_F(GeneratorTest, GreedyTextIsTheMostLikelyTokenAtEachPlace) {
  const std::vector<int32_t> prompt = some_tokens(20);
  const std::vector<Sample> samples = fed(prompt).generate(greedy(60));
  ASSERT_EQ(samples[0].tokens.size(), 60u);
  EXPECT_EQ(samples[0].finish_reason, FinishReason::length);
  std::vector<int32_t> tokens = prompt;
  tokens.insert(tokens.end(), samples[0].tokens.begin(), samples[0].tokens.end());
  const std::vector<std::vector<double>> rows = logits_at_once(tokens);
  for (size_t i = 0; i < 60; ++i) {
    const std::vector<double>& row = rows[prompt.size() + i - 1];
    EXPECT_EQ(std::max_element(row.begin(), row.end()) - row.begin(), samples[0].tokens[i]) << i;
  }
  std::sort(tokens.begin() + 20, tokens.end());
  EXPECT_GT(std::unique(tokens.begin() + 20, tokens.end()) - tokens.begin(), 25)
      << "the text is too monotonous to prove anything";
}

TEST_F(GeneratorTest, SamplesAreWhatEachSeedGivesAlone) {
  ctx.batch_invariant = true;
  const std::vector<int32_t> prompt = some_tokens(600);
  GenerateOptions options;
  options.max_tokens = 30;
  options.ignore_eos = true;
  options.samples = 3;
  options.sampling.seed = 5;
  const std::vector<Sample> together = fed(prompt).generate(options);
  ASSERT_EQ(together.size(), 3u);
  EXPECT_NE(together[0].tokens, together[1].tokens);
  options.samples = 1;
  for (const Sample& sample : together) {
    EXPECT_EQ(fed(prompt).generate(options)[0].tokens, sample.tokens);
    ++options.sampling.seed;
  }
}

TEST_F(GeneratorTest, EndsBeforeAStopString) {
  const std::vector<int32_t> prompt = some_tokens(20);
  const std::string text = fed(prompt).generate(greedy(60))[0].text;
  GenerateOptions options = greedy(60);
  options.stop = {"never written", text.substr(20, 4)};
  std::string streamed;
  const std::vector<Sample> samples =
      fed(prompt).generate(options, [&](int64_t, std::string_view some) {
        streamed += some;
        return true;
      });
  EXPECT_EQ(samples[0].finish_reason, FinishReason::stop);
  EXPECT_EQ(samples[0].text, text.substr(0, text.find(options.stop[1])));
  EXPECT_EQ(streamed, samples[0].text);
}

TEST_F(GeneratorTest, EndsAtTheEndOfText) {
  const std::vector<int32_t> prompt = some_tokens(20);
  const std::vector<int32_t> tokens = fed(prompt).generate(greedy(60))[0].tokens;
  const int32_t eos = tokens[12];
  const auto first = std::find(tokens.begin(), tokens.end(), eos) - tokens.begin();
  model.weights.config.eos_token_ids = {eos};
  GenerateOptions options = greedy(60);
  options.ignore_eos = false;
  const Sample sample = fed(prompt).generate(options)[0];
  EXPECT_EQ(sample.finish_reason, FinishReason::eos);
  EXPECT_EQ(static_cast<std::ptrdiff_t>(sample.tokens.size()), first + 1);
  EXPECT_EQ(sample.tokens.back(), eos);
  options.ignore_eos = true;
  EXPECT_EQ(fed(prompt).generate(options)[0].tokens, tokens);
}

TEST_F(GeneratorTest, StreamsWholeCharacters) {
  GenerateOptions options;
  options.max_tokens = 300;
  options.sampling.temperature = 3;  // many bytes that are part of characters, or of none
  options.sampling.top_k = 0;
  options.sampling.top_p = 1;
  options.sampling.min_p = 0;
  options.ignore_eos = true;
  std::string streamed;
  int calls = 0;
  const Sample sample = fed(some_tokens(5)).generate(options, [&](int64_t, std::string_view text) {
    EXPECT_EQ(valid_utf8_prefix(text), text.size());
    streamed += text;
    ++calls;
    return true;
  })[0];
  EXPECT_EQ(streamed, sample.text);
  EXPECT_GE(calls, 300);
  EXPECT_NE(sample.text.find(kReplacementCharacter), std::string::npos);
}

TEST_F(GeneratorTest, AConversationIsAValue) {
  Generator generator = fed(some_tokens(50));
  generator.generate(greedy(10));
  const SavedConversation fork = generator.save();
  const std::vector<int32_t> first = generator.generate(greedy(20))[0].tokens;
  generator.feed(some_tokens(700, 9));
  generator.restore(fork);
  EXPECT_EQ(generator.generate(greedy(20))[0].tokens, first);

  Generator other(ctx, model.weights, tokenizer);
  other.restore(fork);
  EXPECT_EQ(other.generate(greedy(20))[0].tokens, first);

  const Model larger = make_random_model(make_config(256, 48, 2), DType::f32, 1);
  Generator of_larger(ctx, larger.weights, tokenizer);
  EXPECT_THROW(of_larger.restore(fork), Error);
}

TEST_F(GeneratorTest, GoesOnAfterBeingCancelled) {
  const std::vector<int32_t> prompt = some_tokens(20);
  const std::vector<int32_t> whole = fed(prompt).generate(greedy(40))[0].tokens;
  Generator generator = fed(prompt);
  int left = 15;
  const Sample part =
      generator.generate(greedy(40), [&](int64_t, std::string_view) { return --left > 0; })[0];
  EXPECT_EQ(part.finish_reason, FinishReason::cancelled);
  ASSERT_EQ(part.tokens.size(), 15u);
  std::vector<int32_t> tokens = part.tokens;
  const std::vector<int32_t> rest = generator.generate(greedy(25))[0].tokens;
  tokens.insert(tokens.end(), rest.begin(), rest.end());
  EXPECT_EQ(tokens, whole);
}

TEST_F(GeneratorTest, SteadyDecodingAllocatesNothing) {
  Generator generator = fed(some_tokens(20));
  std::vector<int64_t> seen, blocks;
  seen.reserve(400);
  blocks.reserve(400);
  generator.generate(greedy(300), [&](int64_t, std::string_view) {
    seen.push_back(allocation_count());
    blocks.push_back(ctx.workspace().block_allocations());
    return true;
  });
  EXPECT_EQ(blocks[10], blocks[299]);
  // What grows is the result: its vectors double now and then.
  EXPECT_LE(seen[299] - seen[10], 20);
}

TEST_F(GeneratorTest, RefusesWhatItCannotContinue) {
  Generator generator(ctx, model.weights, tokenizer);
  EXPECT_THROW(generator.generate(greedy(1)), Error);
  EXPECT_THROW(generator.feed(std::vector<int32_t>{1, 256}), Error);
  EXPECT_THROW(generator.feed(std::vector<int32_t>{-1}), Error);
  EXPECT_TRUE(generator.empty());
  generator.feed(some_tokens(3));
  GenerateOptions options = greedy(1);
  options.samples = 0;
  EXPECT_THROW(generator.generate(options), Error);
  options = greedy(1);
  options.stop = {""};
  EXPECT_THROW(generator.generate(options), Error);
}

class ScorerTest : public GeneratorTest {
 protected:
  std::vector<double> scored(std::span<const int32_t> tokens) {
    std::vector<double> logprobs;
    Scorer scorer(ctx, model.weights);
    scorer.score(tokens, [&](std::span<const float> some) {
      logprobs.insert(logprobs.end(), some.begin(), some.end());
      return true;
    });
    return logprobs;
  }
};

TEST_F(ScorerTest, ScoresAnyLengthAsAtOnce) {
  for (const size_t count : {1u, 2u, 512u, 513u, 514u, 1200u}) {
    const std::vector<int32_t> tokens = some_tokens(count);
    const std::vector<std::vector<double>> rows = logits_at_once(tokens);
    std::vector<double> expected;
    for (size_t i = 1; i < count; ++i) {
      const std::vector<float> row(rows[i - 1].begin(), rows[i - 1].end());
      expected.push_back(token_logprob(row, tokens[i]));
    }
    EXPECT_TRUE(close(scored(tokens), expected, 1e-5)) << count;
  }
}

TEST_F(ScorerTest, StartsEachTextAfresh) {
  Scorer scorer(ctx, model.weights);
  std::vector<float> logprobs;
  for (const auto& tokens : {some_tokens(600), some_tokens(600), some_tokens(600)})
    scorer.score(tokens, [&](std::span<const float> some) {
      logprobs.insert(logprobs.end(), some.begin(), some.end());
      return true;
    });
  for (size_t i = 0; i < 599; ++i) ASSERT_EQ(logprobs[i], logprobs[2 * 599 + i]) << i;
}

TEST_F(ScorerTest, TopIsOfTheLastPosition) {
  const std::vector<int32_t> tokens = some_tokens(700);
  const std::vector<double> row = logits_at_once(tokens).back();
  const auto expected = top_logprobs(std::vector<float>(row.begin(), row.end()), 256);
  Scorer scorer(ctx, model.weights);
  scorer.score(tokens, [](std::span<const float>) { return true; });
  const auto top = scorer.top(256);
  ASSERT_EQ(top.size(), 256u);
  EXPECT_EQ(top[0].first, expected[0].first);
  for (size_t i = 0; i < 256; ++i) EXPECT_NEAR(top[i].second, expected[i].second, 1e-4);
  EXPECT_EQ(scorer.top(3), decltype(top)(top.begin(), top.begin() + 3));
}

TEST_F(ScorerTest, EvaluatesInWindowsOfFreshState) {
  const std::vector<int32_t> tokens = some_tokens(1500);
  for (const int64_t context : {int64_t{0}, int64_t{7}, int64_t{512}, int64_t{600}}) {
    const size_t window = context == 0 ? tokens.size() : static_cast<size_t>(context);
    double expected = 0;
    for (size_t at = 0; at + 1 < tokens.size(); at += window)
      for (const double p :
           scored(std::span(tokens).subspan(at, std::min(window + 1, tokens.size() - at))))
        expected -= p;
    Scorer::Total total;
    Scorer scorer(ctx, model.weights);
    ASSERT_TRUE(scorer.evaluate(tokens, context, tokenizer, total));
    EXPECT_EQ(total.tokens, 1499);
    EXPECT_EQ(total.bytes, 1499);
    EXPECT_NEAR(total.loss, expected, 1e-3) << context;
  }
}

TEST_F(ScorerTest, RefusesWhatIsNoToken) {
  EXPECT_THROW(scored({}), Error);
  EXPECT_THROW(scored(std::vector<int32_t>{1, 2, 256}), Error);
}

// Everything that a Generator and a Scorer do, on an asynchronous engine and on the CPU.
void expect_what_the_cpu_does(Context& gpu) {
  Context cpu(cpu_engine(), 1);
  const Model on_cpu = make_random_model(tiny_config(), DType::f32, 1);
  const Model on_gpu = copy_model(on_cpu, gpu.memory());
  const Tokenizer tokenizer = Tokenizer::bytes();
  Generator a(cpu, on_cpu.weights, tokenizer), b(gpu, on_gpu.weights, tokenizer);
  const std::vector<int32_t> prompt = some_tokens(1300);
  a.feed(prompt);
  b.feed(prompt);
  EXPECT_TRUE(close(doubles(b.next_logits()), doubles(a.next_logits()), 1e-5));
  const SavedConversation kept = b.save();

  GenerateOptions options;
  options.max_tokens = 40;
  options.ignore_eos = true;
  options.sampling.temperature = 0;
  for (const int64_t samples : {1, 3}) {
    options.samples = samples;
    a.reset();
    b.reset();
    a.feed(prompt);
    b.feed(prompt);
    const std::vector<Sample> expected = a.generate(options), actual = b.generate(options);
    for (size_t i = 0; i < expected.size(); ++i)
      EXPECT_EQ(actual[i].tokens, expected[i].tokens) << samples << " samples, " << i;
  }
  // A conversation goes on, on either.
  options.samples = 1;
  a.restore(kept);
  b.restore(kept);
  EXPECT_EQ(b.generate(options)[0].tokens, a.generate(options)[0].tokens);

  Scorer on_a(cpu, on_cpu.weights), on_b(gpu, on_gpu.weights);
  std::vector<double> expected, actual;
  const auto into = [](std::vector<double>& to) {
    return [&to](std::span<const float> some) {
      to.insert(to.end(), some.begin(), some.end());
      return true;
    };
  };
  on_a.score(prompt, into(expected));
  on_b.score(prompt, into(actual));
  EXPECT_TRUE(close(actual, expected, 1e-5));
  EXPECT_EQ(on_b.top(1)[0].first, on_a.top(1)[0].first);
  for (const int64_t context : {0, 100, 700}) {
    Scorer::Total x, y;
    on_a.evaluate(prompt, context, tokenizer, x);
    on_b.evaluate(prompt, context, tokenizer, y);
    EXPECT_NEAR(y.loss, x.loss, 1e-4 * x.loss) << context;
    EXPECT_EQ(y.tokens, x.tokens);
    EXPECT_EQ(y.bytes, x.bytes);
  }
}

TEST(GeneratorDeferred, DoesWhatItDoesOnTheCpu) {
  Context ctx(op_test::deferred_engine(), 1);
  expect_what_the_cpu_does(ctx);
}

TEST(GeneratorCuda, DoesWhatItDoesOnTheCpu) { op_test::on_cuda(expect_what_the_cpu_does); }

}  // namespace
}  // namespace krait
