// Properties of the whole model: chunks, packing, steps, states, gradients through states, steady
// memory.
#include "model/model_test.h"

namespace krait {
namespace {

using namespace model_test;
using op_test::close;
using op_test::to_double;

struct Run {
  const char* name;
  const Engine& (*engine)();
  DType dtype;
  double tolerance;
};

class LanguageModel : public testing::TestWithParam<Run> {
 protected:
  Context ctx{GetParam().engine()};
  Config config = small_config();
  TrainableModel model = random_trainable(ctx, config, GetParam().dtype);
  DType full = full_precision_of(GetParam().dtype);
  double tolerance = GetParam().tolerance;

  std::vector<double> whole(const std::vector<int32_t>& tokens) {
    const Packed p = packed({tokens});
    return logits_of(ctx, model.weights(), p.view(), nullptr);
  }
  void expect_recomputing_changes_nothing();
};

std::vector<int32_t> part(const std::vector<int32_t>& v, size_t begin, size_t end) {
  return {v.begin() + static_cast<std::ptrdiff_t>(begin),
          v.begin() + static_cast<std::ptrdiff_t>(end)};
}

void append(std::vector<double>& to, const std::vector<double>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

TEST_P(LanguageModel, AnyChunkingGivesTheSame) {
  const std::vector<int32_t> tokens = random_tokens(150, config.vocab_size, 3);
  for (const std::vector<size_t>& cuts :
       std::vector<std::vector<size_t>>{{1}, {2, 3}, {64, 128}, {7, 7, 100}}) {
    DecodeState state(config, 1, full);
    std::vector<double> logits;
    size_t begin = 0;
    std::vector<size_t> ends = cuts;
    ends.push_back(tokens.size());
    for (size_t end : ends) {
      const Packed chunk = packed({part(tokens, begin, end)});
      append(logits, logits_of(ctx, model.weights(), chunk.view(), &state));
      begin = end;
    }
    EXPECT_TRUE(close(logits, whole(tokens), tolerance));
  }
}

TEST_P(LanguageModel, TokenByTokenGivesTheSame) {
  const std::vector<int32_t> tokens = random_tokens(40, config.vocab_size, 4);
  DecodeState state(config, 3, full);
  std::vector<double> logits;
  for (int32_t token : tokens)
    append(logits, step_logits(ctx, model.weights(), {token}, {2}, state));
  EXPECT_TRUE(close(logits, whole(tokens), tolerance));
  for (double x : to_double(state.ssm(1).slice(0, 0, 2)))
    EXPECT_EQ(x, 0);  // other slots are not touched
}

TEST_P(LanguageModel, PackedSequencesDoNotSeeEachOther) {
  std::vector<std::vector<int32_t>> sequences;
  for (int64_t length : {5, 0, 1, 70, 2})
    sequences.push_back(random_tokens(length, config.vocab_size, static_cast<uint64_t>(length)));
  const Packed all = packed(sequences, {4, 0, 1, 3, 2});
  DecodeState state(config, 5, full);
  const std::vector<double> together = logits_of(ctx, model.weights(), all.view(), &state);
  std::vector<double> apart;
  for (const auto& s : sequences)
    if (!s.empty()) append(apart, whole(s));
  EXPECT_TRUE(close(together, apart, tolerance));
  // And each slot continues its own sequence.
  const std::vector<double> next =
      step_logits(ctx, model.weights(), {1, 2, 3, 4, 5}, {4, 0, 1, 3, 2}, state);
  std::vector<double> expected;
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i].push_back(static_cast<int32_t>(i) + 1);
    const std::vector<double> l = whole(sequences[i]);
    append(expected, std::vector<double>(l.end() - config.vocab_size, l.end()));
  }
  EXPECT_TRUE(close(next, expected, tolerance));
}

// With batch_invariant to the bit: logits, losses, states, and the next token's logits.
TEST_P(LanguageModel, BatchInvariantSequencesHaveBitsOfTheirOwn) {
  ctx.batch_invariant = true;
  config.d_model = 96;  // wide enough for products that choose their tiles by the number of rows
  config.d_inner = 192;
  model = random_trainable(ctx, config, GetParam().dtype);
  const auto values = [&](const std::vector<std::vector<int32_t>>& sequences) {
    const auto count = static_cast<int64_t>(sequences.size());
    const Packed input = packed(sequences);
    DecodeState state(config, count, full);
    std::vector<std::vector<double>> all = {logits_of(ctx, model.weights(), input.view(), &state)};
    const OwnedTensor loss(full, {input.tokens->shape[0]});
    score(ctx, model.weights(), input.view(), input.tokens, nullptr, loss);
    const OwnedTensor next(full, {count, config.vocab_size});
    decode(ctx, model.weights(), tensor_of(std::vector<int32_t>(sequences.size(), 3)), {}, state,
           next);
    for (const Tensor& t : {loss.view(), next.view(), state.conv(2), state.ssm(2)})
      all.push_back(to_double(t));
    return all;
  };
  std::vector<std::vector<int32_t>> sequences;
  for (int64_t length : {5, 1, 70, 2, 33})
    sequences.push_back(random_tokens(length, config.vocab_size, static_cast<uint64_t>(length)));
  std::vector<std::vector<double>> apart(5);
  for (const auto& s : sequences) {
    const auto alone = values({s});
    for (size_t i = 0; i < apart.size(); ++i) append(apart[i], alone[i]);
  }
  EXPECT_EQ(values(sequences), apart);
}

// Stages of ten tokens, which cut sequences anywhere, four at a time; one after the other, and in
// contexts of their own.
TEST_P(LanguageModel, StagesThroughTheLayersGiveTheSame) {
  Config deep = config;
  deep.n_layer = 8;
  const TrainableModel deep_model = random_trainable(ctx, deep, GetParam().dtype);
  std::vector<std::vector<int32_t>> sequences;
  for (int64_t length : {5, 0, 1, 27, 20, 4})
    sequences.push_back(random_tokens(length, deep.vocab_size, static_cast<uint64_t>(length)));
  const Packed all = packed(sequences, {4, 0, 1, 3, 2, 5});
  const auto run_on = [&](const Engine& engine, DType states, bool batch_invariant = false) {
    Context other(engine, 1);
    other.batch_invariant = batch_invariant;
    DecodeState state(deep, 6, states);
    std::vector<double> values;
    for (int chunk = 0; chunk < 2; ++chunk)  // the second goes on from the first one's states
      append(values, logits_of(other, deep_model.weights(), all.view(), &state));
    for (int64_t layer = 0; layer < deep.n_layer; ++layer) {
      append(values, to_double(state.conv(layer)));
      append(values, to_double(state.ssm(layer)));
    }
    return values;
  };
  static int64_t asked, followed;
  asked = followed = 0;
  Engine staged = ctx.engine();
  staged.scan_stage = [](Context&, int64_t, int64_t, int64_t, int64_t) {
    ++asked;
    return int64_t{10};
  };
  const std::vector<double> expected = run_on(ctx.engine(), full);
  EXPECT_TRUE(close(run_on(staged, full), expected, tolerance));
  EXPECT_EQ(asked, 2);
  staged.follow = [](Context&, const std::shared_ptr<void>&) { ++followed; };
  EXPECT_TRUE(close(run_on(staged, full), expected, tolerance));
  // Six stages, four and then two at a time: of 11 rounds 1, 2, 3 meet at the beginning and the end
  // and four in five of them; of 9 rounds two in seven. Each piece of more than one follows the
  // beginning and is followed, before the scans and in them.
  EXPECT_EQ(followed, 2 * 2 * 2 * (2 * (2 + 3) + 5 * 4 + 7 * 2));

  // What a stage would round, or what would depend on the batch, goes as a whole.
  asked = 0;
  if (full == DType::f32) run_on(staged, DType::bf16);
  run_on(staged, full, /*batch_invariant=*/true);
  EXPECT_EQ(asked, 0);
}

// What a piece has queued before it throws is awaited, too.
TEST_P(LanguageModel, PiecesSideBySideAreAwaitedWhateverHappens) {
  static int64_t marks, follows;
  marks = follows = 0;
  Engine engine = ctx.engine();
  engine.mark = [](Context&, std::shared_ptr<void>&) { ++marks; };
  engine.follow = [](Context&, const std::shared_ptr<void>&) { ++follows; };
  Context main(engine, 1);
  main.batch_invariant = true;
  std::vector<int> done;
  const auto work = [&](Context& side, int i) {
    EXPECT_NE(&side, &main);
    EXPECT_TRUE(side.batch_invariant);
    done.push_back(i);
    if (i == 2) throw Error("no more");
  };
  EXPECT_THROW(main.side_by_side(5, work), Error);
  EXPECT_EQ(done, (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(marks, 1 + 3);
  EXPECT_EQ(follows, 2 * 3);
  main.side_by_side(1, [&](Context& side, int) { EXPECT_EQ(&side, &main); });
}

TEST_P(LanguageModel, AStateIsAValue) {
  DecodeState state(config, 2, full);
  const Packed prompt = packed({random_tokens(30, config.vocab_size, 5)});
  logits_of(ctx, model.weights(), prompt.view(), &state);
  const std::vector<std::byte> saved = state.save(0);
  state.copy(ctx, 0, 1);
  const std::vector<double> first = step_logits(ctx, model.weights(), {7}, {0}, state);
  EXPECT_EQ(step_logits(ctx, model.weights(), {7}, {1}, state), first);  // the fork
  state.restore(0, saved);
  EXPECT_EQ(step_logits(ctx, model.weights(), {7}, {0}, state), first);  // rolled back
  DecodeState other(config, 4, full);
  other.restore(3, saved);
  EXPECT_EQ(step_logits(ctx, model.weights(), {7}, {3}, other), first);  // elsewhere
  state.reset(0);
  const std::vector<double> fresh = step_logits(ctx, model.weights(), {7}, {0}, state);
  EXPECT_TRUE(close(fresh, whole({7}), tolerance));
  EXPECT_NE(fresh, first);
}

TEST_P(LanguageModel, TheSameInputsGiveTheSameBits) {
  const std::vector<int32_t> tokens = random_tokens(100, config.vocab_size, 6);
  EXPECT_EQ(whole(tokens), whole(tokens));
}

TEST_P(LanguageModel, SteadyLoopsAllocateNothing) {
  DecodeState state(config, 1, full);
  const Packed chunk = packed({random_tokens(64, config.vocab_size, 7)});
  const ParameterStore gradients(config, full);
  const OwnedTensor loss(full, {64}), targets = tensor_of(random_tokens(64, config.vocab_size, 8));
  const auto round = [&] {
    logits_of(ctx, model.weights(), chunk.view(), &state);
    step_logits(ctx, model.weights(), {3}, {}, state);
    forward_backward(ctx, model.weights(),
                     {.input = chunk.view(), .targets = targets, .state = &state},
                     gradients.parameters(), loss);
  };
  round();
  round();
  const int64_t before = ctx.workspace().block_allocations();
  for (int i = 0; i < 3; ++i) round();
  EXPECT_EQ(ctx.workspace().block_allocations(), before);
}

TEST_P(LanguageModel, ScoreIsTheCrossEntropyOfTheLogits) {
  const std::vector<int32_t> tokens = random_tokens(20, config.vocab_size, 9);
  std::vector<int32_t> targets = random_tokens(20, config.vocab_size, 10);
  targets[4] = -1;
  const Packed p = packed({tokens});
  const OwnedTensor loss(full, {20});
  score(ctx, model.weights(), p.view(), tensor_of(targets), nullptr, loss);
  const std::vector<double> l = whole(tokens), actual = to_double(loss);
  for (size_t t = 0; t < tokens.size(); ++t) {
    double sum = 0;
    const double* row = l.data() + t * static_cast<size_t>(config.vocab_size);
    for (int64_t v = 0; v < config.vocab_size; ++v) sum += std::exp(row[v]);
    const double expected = targets[t] < 0 ? 0 : std::log(sum) - row[targets[t]];
    EXPECT_NEAR(actual[t], expected, 10 * tolerance * (1 + std::abs(expected)));
  }
}

TEST_P(LanguageModel, TokensOutsideTheVocabularyAreRefused) {
  for (int32_t bad : {-1, 23, 1 << 30}) {
    const Packed p = packed({{1, 2, bad}});
    try {
      logits_of(ctx, model.weights(), p.view(), nullptr);
      FAIL();
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()),
                "token number 2: token outside the vocabulary; expected 0 to 22, got " +
                    std::to_string(bad));
    }
  }
}

// The gradients of a text are those of its parts when the state and its gradient are handed on.
TEST_P(LanguageModel, GradientsFlowThroughTheState) {
  const std::vector<int32_t> tokens = random_tokens(90, config.vocab_size, 11),
                             targets = random_tokens(90, config.vocab_size, 12);
  const Packed all = packed({tokens}),
               parts[] = {packed({part(tokens, 0, 37)}), packed({part(tokens, 37, 90)})};
  const ParameterStore expected(config, full), actual(config, full);
  const OwnedTensor loss(full, {90});
  forward_backward(ctx, model.weights(), {.input = all.view(), .targets = tensor_of(targets)},
                   expected.parameters(), loss);

  DecodeState start(config, 1, full), middle(config, 1, full), gradient(config, 1, full);
  const OwnedTensor target[] = {tensor_of(part(targets, 0, 37)), tensor_of(part(targets, 37, 90))};
  const Tensor first = loss->slice(0, 0, 37), second = loss->slice(0, 37, 90);
  logits_of(ctx, model.weights(), parts[0].view(), &middle);
  forward_backward(
      ctx, model.weights(),
      {.input = parts[1].view(), .targets = target[1], .state = &middle, .dstate = &gradient},
      actual.parameters(), second);
  forward_backward(
      ctx, model.weights(),
      {.input = parts[0].view(), .targets = target[0], .state = &start, .dstate = &gradient},
      actual.parameters(), first);
  for (const ParameterInfo& p : parameter_table(config))
    EXPECT_TRUE(close(to_double(p.of(actual.parameters())), to_double(p.of(expected.parameters())),
                      10 * tolerance))
        << p.name;
}

TEST_P(LanguageModel, GradientsAreAddedAndPackedOnesAreTheSum) {
  const std::vector<int32_t> a = random_tokens(9, config.vocab_size, 13),
                             b = random_tokens(66, config.vocab_size, 14);
  const Packed both = packed({a, b}), one[] = {packed({a}), packed({b})};
  const ParameterStore expected(config, full), actual(config, full);
  const OwnedTensor loss(full, {75});
  std::vector<int32_t> targets = a;
  targets.insert(targets.end(), b.begin(), b.end());
  forward_backward(ctx, model.weights(), {.input = both.view(), .targets = tensor_of(targets)},
                   expected.parameters(), loss);
  forward_backward(ctx, model.weights(), {.input = one[0].view(), .targets = tensor_of(a)},
                   actual.parameters(), loss->slice(0, 0, 9));
  forward_backward(ctx, model.weights(), {.input = one[1].view(), .targets = tensor_of(b)},
                   actual.parameters(), loss->slice(0, 9, 75));
  for (const ParameterInfo& p : parameter_table(config))
    EXPECT_TRUE(close(to_double(p.of(actual.parameters())), to_double(p.of(expected.parameters())),
                      10 * tolerance))
        << p.name;
}

// Activations computed again are those that were thrown away: same bits, with gradients through the
// state too. Depths around the blocks between two residual streams that are kept.
TEST_P(LanguageModel, RecomputingChangesNothingButMemory) {
  for (const int64_t n_layer : {3, 4, 5, 7, 8}) {
    SCOPED_TRACE(n_layer);
    config.n_layer = n_layer;
    model = random_trainable(ctx, config, GetParam().dtype);
    expect_recomputing_changes_nothing();
  }
}

void LanguageModel::expect_recomputing_changes_nothing() {
  const std::vector<int32_t> tokens = random_tokens(70, config.vocab_size, 17);
  const Packed input = packed({tokens}, {1});
  const OwnedTensor targets = tensor_of(random_tokens(70, config.vocab_size, 18)), loss(full, {70});
  std::vector<std::vector<double>> gradients, states;
  for (const Recompute recompute : {Recompute::none, Recompute::light, Recompute::full}) {
    const ParameterStore store(config, full);
    DecodeState state(config, 2, full), dstate(config, 2, full);
    Rng rng(19);
    for (int64_t layer = 0; layer < config.n_layer; ++layer)
      for (const Tensor& t :
           {state.conv(layer), state.ssm(layer), dstate.conv(layer), dstate.ssm(layer)})
        dispatch_float(full, [&](auto tag) {
          using T = typename decltype(tag)::type;
          for (int64_t i = 0; i < t.size(); ++i) t.ptr<T>()[i] = static_cast<T>(rng.normal());
        });
    TrainingBatch batch = {.input = input.view(), .targets = targets};
    batch.state = &state;
    batch.dstate = &dstate;
    batch.recompute = recompute;
    forward_backward(ctx, model.weights(), batch, store.parameters(), loss);
    gradients.push_back(to_double(store.flat()));
    states.push_back(to_double(dstate.conv(0)));
    states.push_back(to_double(state.ssm(1)));
  }
  for (size_t i : {1, 2}) {
    EXPECT_EQ(gradients[0], gradients[i]);
    EXPECT_EQ(states[0], states[2 * i]);
    EXPECT_EQ(states[1], states[2 * i + 1]);
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, LanguageModel,
                         testing::Values(Run{"reference_f64", reference_engine, DType::f64, 1e-13},
                                         Run{"reference_f32", reference_engine, DType::f32, 1e-6},
                                         Run{"cpu_f32", cpu_engine, DType::f32, 1e-6},
                                         Run{"cpu_bf16", cpu_engine, DType::bf16, 2e-2}),
                         [](const auto& run) { return run.param.name; });

// Every gradient against central differences in double, for each way to turn selection off.
TEST(LanguageModelControls, GradientsMatchDifferences) {
  for (int mask = 0; mask < 8; ++mask) {
    Config c = small_config();
    c.n_layer = 1;
    c.selective_delta = mask & 1;
    c.selective_B = mask & 2;
    c.selective_C = mask & 4;
    c.tie_embeddings = mask & 1;
    Context ctx(reference_engine());
    TrainableModel model = random_trainable(ctx, c, DType::f64);
    const Packed input = packed({random_tokens(9, c.vocab_size, 15)});
    const OwnedTensor targets = tensor_of(random_tokens(9, c.vocab_size, 16)),
                      loss(DType::f64, {9});
    const auto objective = [&] {
      model.refresh(ctx);
      score(ctx, model.weights(), input.view(), targets, nullptr, loss);
      double sum = 0;
      for (double l : to_double(loss)) sum += l;
      return sum;
    };
    const ParameterStore gradients(c, DType::f64);
    forward_backward(ctx, model.weights(), {.input = input.view(), .targets = targets},
                     gradients.parameters(), loss);
    Rng rng(17);
    for (const ParameterInfo& p : parameter_table(c))
      EXPECT_TRUE(op_test::gradient_matches(p.of(model.masters().parameters()),
                                            to_double(p.of(gradients.parameters())), objective, rng,
                                            1e-6))
          << p.name << " with controls " << mask;
  }
}

TEST(LanguageModelControls, RunOnTheCpuEngineToo) {
  Config c = small_config();
  c.selective_delta = c.selective_B = c.selective_C = false;
  Context reference(reference_engine()), cpu(cpu_engine());
  const TrainableModel oracle = random_trainable(reference, c, DType::f64),
                       model = random_trainable(cpu, c, DType::f32);
  const Packed input = packed({random_tokens(80, c.vocab_size, 18)});
  const OwnedTensor targets = tensor_of(random_tokens(80, c.vocab_size, 19)),
                    loss64(DType::f64, {80}), loss32(DType::f32, {80});
  const ParameterStore expected(c, DType::f64), actual(c, DType::f32);
  forward_backward(reference, oracle.weights(), {.input = input.view(), .targets = targets},
                   expected.parameters(), loss64);
  forward_backward(cpu, model.weights(), {.input = input.view(), .targets = targets},
                   actual.parameters(), loss32);
  for (const ParameterInfo& p : parameter_table(c))
    EXPECT_TRUE(
        close(to_double(p.of(actual.parameters())), to_double(p.of(expected.parameters())), 1e-5))
        << p.name;
}

// With `fresh` the products' gradients are written, whatever they held; the others are added to.
TEST(LanguageModelControls, FreshGradientsAreTheSame) {
  for (const bool tied : {false, true}) {
    Config c = small_config();
    c.tie_embeddings = tied;
    c.use_bias = true;
    Context ctx(cpu_engine());
    const TrainableModel model = random_trainable(ctx, c, DType::f32);
    const Packed input = packed({random_tokens(80, c.vocab_size, 18)});
    const OwnedTensor targets = tensor_of(random_tokens(80, c.vocab_size, 19)),
                      loss(DType::f32, {80});
    const ParameterStore expected(c, DType::f32), actual(c, DType::f32);
    TrainingBatch batch = {.input = input.view(), .targets = targets};
    forward_backward(ctx, model.weights(), batch, expected.parameters(), loss);
    for (const ParameterInfo& p : parameter_table(c)) {
      const Tensor& gradient = p.of(actual.parameters());
      std::fill_n(gradient.ptr<float>(), gradient.size(), std::nanf(""));
    }
    clear_added(ctx, c, actual);
    batch.fresh = true;
    forward_backward(ctx, model.weights(), batch, actual.parameters(), loss);
    EXPECT_TRUE(close(to_double(actual.flat()), to_double(expected.flat()), 1e-6)) << tied;
  }
}

// docs/design.md, "Memory of a training step": what four blocks keep, to the byte.
TEST(TrainingMemory, IsWhatTheDesignSays) {
  constexpr int64_t kTokens = 512;  // no tensor needs filling up to the workspace's alignment
  const auto needed = [](int64_t n_layer, Recompute recompute) {
    const Config config = make_config(64, 32, n_layer);
    const TrainableModel model(config, DType::bf16);
    const ParameterStore gradients(config);
    const Packed input = packed({random_tokens(kTokens, 64, 1)});
    const OwnedTensor targets = tensor_of(random_tokens(kTokens, 64, 2));
    const OwnedTensor loss(DType::f32, {kTokens});
    TrainingBatch batch = {.input = input.view(), .targets = targets};
    batch.recompute = recompute;
    Context ctx(cpu_engine());
    forward_backward(ctx, model.weights(), batch, gradients.parameters(), loss);
    return static_cast<int64_t>(ctx.workspace().capacity());
  };
  const Config c = make_config(64, 32, 2);
  Context ctx(cpu_engine());
  const int64_t f32 = 4, bf16 = 2;
  const int64_t stream = kTokens * c.d_model * f32, output = kTokens * c.d_model * bf16;
  const int64_t rstd = kTokens * f32, scan_inputs = 2 * kTokens * c.d_inner * bf16;
  const int64_t saved = selective_scan_saved_size(ctx, kTokens, c.d_inner, c.d_state) * f32;
  const int64_t products = kTokens * (2 * c.d_inner + c.x_proj_size()) * bf16;
  // So many that the workspace's first block, of 1 MiB, is too small.
  const auto four = [&](Recompute r) { return needed(36, r) - needed(32, r); };
  EXPECT_EQ(four(Recompute::full), stream + 3 * output + 4 * rstd);
  EXPECT_EQ(four(Recompute::light), stream + 3 * output + 4 * (rstd + saved + products));
  EXPECT_EQ(four(Recompute::none),
            2 * (stream + output) + 4 * (rstd + saved + products + scan_inputs));
}

TEST(DecodeState, TakesWhatWasSavedInAnotherType) {
  const Config c = small_config();
  DecodeState exact(c), narrow(c, 2, DType::bf16), back(c);
  Rng rng(4);
  for (int64_t layer = 0; layer < c.n_layer; ++layer)
    for (const Tensor& t : {exact.conv(layer), exact.ssm(layer)})
      for (int64_t i = 0; i < t.size(); ++i) t.ptr<float>()[i] = static_cast<float>(rng.normal());
  narrow.restore(1, exact.save(0));
  back.restore(0, narrow.save(1));
  for (int64_t layer = 0; layer < c.n_layer; ++layer)
    for (const auto& [from, to] :
         {std::pair(exact.conv(layer), back.conv(layer)), {exact.ssm(layer), back.ssm(layer)}})
      for (int64_t i = 0; i < from.size(); ++i)
        ASSERT_EQ(to.ptr<float>()[i], static_cast<float>(bf16(from.ptr<float>()[i])));
  for (const double x : to_double(narrow.ssm(1).slice(0, 0, 1))) ASSERT_EQ(x, 0);
  EXPECT_EQ(DecodeState::saved_dtype(exact.save(0)), DType::f32);
  EXPECT_EQ(DecodeState::saved_dtype(narrow.save(0)), DType::bf16);
  EXPECT_LT(narrow.save(0).size(), exact.save(0).size() / 2 + 48);
  EXPECT_THROW(DecodeState(c, 1, DType::f64).restore(0, exact.save(0)), Error);
}

// The rounding behind each token stays as small as it is, however many tokens there are; in chunks
// there is less of it.
TEST(DecodeState, InBf16CostsLittle) {
  Context cpu(cpu_engine(), 1), reference(reference_engine(), 1);
  const Config c = small_config();
  const std::vector<int32_t> tokens = random_tokens(400, c.vocab_size, 3);
  const auto stepped = [&](Context& ctx, DType dtype, DType states) {
    const TrainableModel model = random_trainable(ctx, c, dtype);
    DecodeState state(c, 2, states);
    std::vector<double> logits;
    for (const int32_t token : tokens)
      append(logits, step_logits(ctx, model.weights(), {token}, {1}, state));
    return logits;
  };
  const auto last = [&](const std::vector<double>& logits) {
    return std::vector<double>(logits.end() - 100 * c.vocab_size, logits.end());
  };
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::vector<double> exact = stepped(cpu, dtype, DType::f32),
                              narrow = stepped(cpu, dtype, DType::bf16);
    EXPECT_LT(op_test::relative_rms(last(narrow), last(exact)), 5e-3);
    EXPECT_GT(op_test::relative_rms(last(narrow), last(exact)), 1e-5);
    // Sums in another order, which some roundings turn into a unit of bf16.
    EXPECT_TRUE(close(stepped(reference, dtype, DType::bf16), narrow, 2e-3));
  }
  const TrainableModel model = random_trainable(cpu, c, DType::f32);
  DecodeState state(c, 1, DType::bf16);
  std::vector<double> chunked;
  for (size_t at = 0; at < tokens.size(); at += 100)
    append(chunked,
           logits_of(cpu, model.weights(), packed({part(tokens, at, at + 100)}).view(), &state));
  const std::vector<double> exact = stepped(cpu, DType::f32, DType::f32);
  EXPECT_LT(op_test::relative_rms(chunked, exact),
            op_test::relative_rms(stepped(cpu, DType::f32, DType::bf16), exact));
}

TEST(DecodeState, InBf16IsNotTrainedWith) {
  Context cpu(cpu_engine(), 1);
  const Config c = small_config();
  const TrainableModel model = random_trainable(cpu, c, DType::f32);
  const Packed input = packed({random_tokens(8, c.vocab_size, 7)});
  const OwnedTensor loss(DType::f32, {8}), targets = tensor_of(random_tokens(8, c.vocab_size, 8));
  const ParameterStore gradients(c, DType::f32);
  DecodeState state(c, 1, DType::bf16);
  const TrainingBatch batch = {.input = input.view(), .targets = targets, .state = &state};
  EXPECT_THROW(forward_backward(cpu, model.weights(), batch, gradients.parameters(), loss),
               CheckFailure);
}

TEST(DecodeState, RefusesWhatIsNotItsOwn) {
  const Config c = small_config();
  Config wider = c;
  wider.d_inner += 2;
  DecodeState state(c), other(wider);
  const std::vector<std::byte> saved = other.save(0);
  EXPECT_THROW(state.restore(0, saved), Error);
  std::vector<std::byte> mine = state.save(0);
  mine.pop_back();
  EXPECT_THROW(state.restore(0, mine), Error);
  mine = state.save(0);
  mine[0] ^= std::byte{1};
  EXPECT_THROW(state.restore(0, mine), Error);
  EXPECT_THROW(state.reset(1), CheckFailure);
  Config swapped = c;  // the same number of bytes
  std::swap(swapped.n_layer, swapped.d_inner);
  EXPECT_THROW(state.restore(0, DecodeState(swapped).save(0)), Error);
}

}  // namespace
}  // namespace krait
