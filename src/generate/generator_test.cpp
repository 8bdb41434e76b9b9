#include "generate/generator.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "generate/logprobs.h"
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
  std::vector<double> scored(std::span<const int32_t> tokens, const ScorerOptions& options = {}) {
    std::vector<double> logprobs;
    Scorer(ctx, model.weights, options).score(tokens, [&](std::span<const float> some) {
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

// A state in bf16 is rounded where a chunk ends.
TEST_F(ScorerTest, RoundsStatesBehindEachChunk) {
  const std::vector<int32_t> tokens = some_tokens(300);
  const std::vector<double> exact = scored(tokens);
  EXPECT_EQ(scored(tokens, {.state_dtype = DType::bf16}), exact) << "one chunk";
  EXPECT_TRUE(close(scored(tokens, {.chunk = 1}), exact, 1e-5));
  const std::vector<double> rounded = scored(tokens, {.state_dtype = DType::bf16, .chunk = 1});
  EXPECT_TRUE(close(rounded, exact, 1e-2));
  EXPECT_FALSE(close(rounded, exact, 1e-5));
  // As a generator steps.
  Generator generator(ctx, model.weights, tokenizer, DType::bf16);
  for (size_t i = 0; i + 1 < tokens.size(); ++i) {
    generator.feed(std::span(tokens).subspan(i, 1));
    if (i <= 280) continue;
    EXPECT_NEAR(token_logprob(generator.next_logits(), tokens[i + 1]), rounded[i], 1e-3);
  }
  Scorer::Total total;
  Scorer scorer(ctx, model.weights, {.state_dtype = DType::bf16, .chunk = 1});
  ASSERT_TRUE(scorer.evaluate(tokens, 0, tokenizer, total));
  double sum = 0;
  for (const double p : rounded) sum -= p;
  EXPECT_NEAR(total.loss, sum, 1e-3);
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

// What ends a sample behind which steps were queued leaves the conversation at that very bit.
void expect_to_stand_where_it_ended(Context& ctx, DType state_dtype = DType::f32) {
  const Model on_host = make_random_model(tiny_config(), DType::f32, 1);
  Model model = copy_model(on_host, ctx.memory());
  const Tokenizer tokenizer = Tokenizer::bytes();
  const auto fed = [&] {
    Generator generator(ctx, model.weights, tokenizer, state_dtype);
    generator.feed(some_tokens(20));
    return generator;
  };
  GenerateOptions options;
  options.max_tokens = 45;
  options.sampling.seed = 3;
  options.sampling.repeat_penalty = 1.2f;
  const Sample whole = fed().generate(options)[0];
  ASSERT_EQ(whole.finish_reason, FinishReason::length);
  const auto expect_end_after = [&](size_t tokens, Generator& actual, const Sample& sample) {
    SCOPED_TRACE(tokens);
    EXPECT_EQ(sample.tokens, std::vector(whole.tokens.begin(),
                                         whole.tokens.begin() + static_cast<ptrdiff_t>(tokens)));
    Generator expected = fed();
    GenerateOptions fewer = options;
    fewer.max_tokens = static_cast<int64_t>(tokens);
    expected.generate(fewer);
    const SavedConversation a = actual.save(), b = expected.save();
    EXPECT_EQ(a.state, b.state);
    EXPECT_EQ(a.pending, b.pending);
    EXPECT_EQ(a.recent, b.recent);
  };
  for (const size_t tokens : {1u, 2u, 3u, 14u, 15u, 16u, 17u, 18u, 19u, 31u, 32u, 33u, 44u, 45u}) {
    Generator generator = fed();
    size_t left = tokens;
    const Sample sample =
        generator.generate(options, [&](int64_t, std::string_view) { return --left > 0; })[0];
    EXPECT_EQ(sample.finish_reason, tokens == 45 ? FinishReason::length : FinishReason::cancelled);
    expect_end_after(tokens, generator, sample);
  }
  {
    Generator generator = fed();
    GenerateOptions stopped = options;
    stopped.stop = {whole.text.substr(whole.text.size() / 2, 3)};
    const Sample sample = generator.generate(stopped)[0];
    EXPECT_EQ(sample.finish_reason, FinishReason::stop);
    EXPECT_LT(sample.tokens.size(), 45u);
    expect_end_after(sample.tokens.size(), generator, sample);
  }
  const int32_t eos = whole.tokens[21];
  const auto first =
      std::find(whole.tokens.begin(), whole.tokens.end(), eos) - whole.tokens.begin();
  for (const size_t others : {0, 10}) {  // more than the engine looks for
    std::vector<int32_t> ids;
    for (int32_t id = 0; ids.size() < others; ++id)
      if (std::find(whole.tokens.begin(), whole.tokens.end(), id) == whole.tokens.end())
        ids.push_back(id);
    ids.push_back(eos);
    model.weights.config.eos_token_ids = ids;
    Generator generator = fed();
    const Sample sample = generator.generate(options)[0];
    EXPECT_EQ(sample.finish_reason, FinishReason::eos);
    model.weights.config.eos_token_ids = {};
    expect_end_after(static_cast<size_t>(first) + 1, generator, sample);
  }
}

TEST(Generator, StandsWhereItEnded) {
  Context ctx(cpu_engine(), 2);
  expect_to_stand_where_it_ended(ctx);
}
TEST(GeneratorDeferred, StandsWhereItEnded) {
  Context ctx(op_test::deferred_engine(), 1);
  expect_to_stand_where_it_ended(ctx);
}
TEST(GeneratorCuda, StandsWhereItEnded) {
  op_test::on_cuda([](Context& ctx) { expect_to_stand_where_it_ended(ctx); });
}
TEST(GeneratorDeferred, StandsWhereItEndedInBf16) {
  Context ctx(op_test::deferred_engine(), 1);
  expect_to_stand_where_it_ended(ctx, DType::bf16);
}
TEST(GeneratorCuda, StandsWhereItEndedInBf16) {
  op_test::on_cuda([](Context& ctx) { expect_to_stand_where_it_ended(ctx, DType::bf16); });
}

// More slots, with what is in slot 0, of the same type.
TEST_F(GeneratorTest, SamplesShareStatesInBf16) {
  ctx.batch_invariant = true;
  Generator generator(ctx, model.weights, tokenizer, DType::bf16);
  generator.feed(some_tokens(600));
  const SavedConversation prompt = generator.save();
  EXPECT_EQ(DecodeState::saved_dtype(prompt.state), DType::bf16);
  GenerateOptions options = greedy(30);
  options.samples = 3;
  const std::vector<Sample> samples = generator.generate(options);
  for (const Sample& sample : samples) EXPECT_EQ(sample.tokens, samples[0].tokens);
  EXPECT_EQ(DecodeState::saved_dtype(generator.save().state), DType::bf16);
  generator.restore(prompt);
  EXPECT_EQ(generator.generate(greedy(30))[0].tokens, samples[0].tokens);
  // In f32 it goes on from the same numbers, more exactly.
  Generator exact = fed(some_tokens(1));
  exact.restore(prompt);
  EXPECT_EQ(DecodeState::saved_dtype(exact.save().state), DType::f32);
  const std::vector<float> a = exact.next_logits();
  generator.restore(prompt);
  EXPECT_TRUE(close(doubles(a), doubles(generator.next_logits()), 1e-2));
}

// Logits that are no numbers are an error, however far the engine is by then.
void expect_to_refuse_bad_logits(Context& ctx) {
  const Model on_host = make_random_model(tiny_config(), DType::f32, 1);
  const Model model = copy_model(on_host, ctx.memory());
  const Tokenizer tokenizer = Tokenizer::bytes();
  Generator generator(ctx, model.weights, tokenizer);
  generator.feed(some_tokens(20));
  const SavedConversation before = generator.save();
  GenerateOptions options;
  options.max_tokens = 30;
  const std::vector<int32_t> expected = generator.generate(options)[0].tokens;
  float& weight = *static_cast<float*>(on_host.weights.parameters.norm_f.data);
  const float good = weight, bad = NAN;
  ctx.memory().upload(model.weights.parameters.norm_f.data, &bad, sizeof bad);
  generator.restore(before);
  try {
    generator.generate(options);
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("token 0: the model gave a logit that is no number"),
              std::string::npos)
        << e.what();
  }
  ctx.memory().upload(model.weights.parameters.norm_f.data, &good, sizeof good);
  generator.restore(before);
  EXPECT_EQ(generator.generate(options)[0].tokens, expected);
}

TEST(Generator, RefusesBadLogits) {
  Context ctx(cpu_engine(), 2);
  expect_to_refuse_bad_logits(ctx);
}
TEST(GeneratorDeferred, RefusesBadLogits) {
  Context ctx(op_test::deferred_engine(), 1);
  expect_to_refuse_bad_logits(ctx);
}
TEST(GeneratorCuda, RefusesBadLogits) { op_test::on_cuda(expect_to_refuse_bad_logits); }

// Samples of all lengths leave the batch one by one; each is what it is alone.
void expect_samples_to_leave(Context& ctx) {
  ctx.batch_invariant = true;
  const Model on_host = make_random_model(tiny_config(), DType::f32, 1);
  Model model = copy_model(on_host, ctx.memory());
  model.weights.config.eos_token_ids = {10, 20, 30, 40, 50};
  const Tokenizer tokenizer = Tokenizer::bytes();
  GenerateOptions options;
  options.max_tokens = 150;
  options.samples = 12;
  options.sampling.top_k = 0;
  options.sampling.temperature = 1.5;
  options.sampling.repeat_penalty = 1.1f;
  options.sampling.repeat_last_n = -1;
  const auto generate = [&] {
    Generator generator(ctx, model.weights, tokenizer);
    generator.feed(some_tokens(30));
    std::vector<Sample> samples = generator.generate(options);
    samples.push_back(generator.generate(options)[0]);  // where sample 0 ended, it goes on
    return samples;
  };
  const std::vector<Sample> together = generate();
  std::vector<size_t> lengths;
  options.samples = 1;
  for (size_t i = 0; i < 12; ++i) {
    const std::vector<Sample> alone = generate();
    EXPECT_EQ(alone[0].tokens, together[i].tokens) << i;
    EXPECT_EQ(alone[0].finish_reason, together[i].finish_reason) << i;
    if (i == 0) {
      EXPECT_EQ(alone[1].tokens, together[12].tokens);
    }
    lengths.push_back(together[i].tokens.size());
    ++options.sampling.seed;
  }
  std::sort(lengths.begin(), lengths.end());
  EXPECT_GE(std::unique(lengths.begin(), lengths.end()) - lengths.begin(), 8);
}

TEST(Generator, SamplesLeaveTheBatch) {
  Context ctx(cpu_engine(), 2);
  expect_samples_to_leave(ctx);
}
TEST(GeneratorDeferred, SamplesLeaveTheBatch) {
  Context ctx(op_test::deferred_engine(), 1);
  ctx.batch_invariant = true;
  expect_samples_to_leave(ctx);
}
TEST(GeneratorCuda, SamplesLeaveTheBatch) { op_test::on_cuda(expect_samples_to_leave); }

// Tokens are at the engine: four steps are queued before the host has seen one.
TEST(DecodeBatchDeferred, RunsAhead) {
  Context cpu(cpu_engine(), 1), later(op_test::deferred_engine(), 1);
  const Model on_cpu = make_random_model(tiny_config(), DType::f32, 1);
  const Model model = copy_model(on_cpu, later.memory());
  DecodeBatch a(cpu, on_cpu.weights), b(later, model.weights);
  SamplingParams greedy;
  greedy.temperature = 0;
  const std::vector<DecodeBatch::Sequence> sequences = {{sampled_sequence(greedy, 100), {}}};
  a.start(sequences, 7, /*rewinds=*/false);
  b.start(sequences, 7, /*rewinds=*/false);
  ASSERT_EQ(a.max_in_flight(), 1);
  ASSERT_EQ(b.max_in_flight(), 4);
  for (int i = 0; i < 20; ++i) {
    while (b.in_flight() < 4) b.queue_step();
    a.queue_step();
    EXPECT_EQ(b.read_step()[0].token, a.read_step()[0].token) << i;
  }
}

TEST(GeneratorDeferred, DoesWhatItDoesOnTheCpu) {
  Context ctx(op_test::deferred_engine(), 1);
  expect_what_the_cpu_does(ctx);
}

TEST(GeneratorCuda, DoesWhatItDoesOnTheCpu) { op_test::on_cuda(expect_what_the_cpu_does); }

}  // namespace
}  // namespace krait
