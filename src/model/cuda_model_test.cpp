// The whole model on a GPU: as on the CPU, the same bits every time, and in the engine's memory
// only.
#include "core/error.h"
#include "model/model_test.h"
#include "ops/recordings.h"

namespace krait {
namespace {

using namespace model_test;
using op_test::close;
using op_test::on_cuda;
using op_test::relative_rms;

using Sequences = std::vector<std::vector<int32_t>>;

constexpr double kF32 = 1e-5;  // relative RMS; its square is the NMSE of docs/numerics.md, 1e-10

// Odd widths, every kind of parameter; and widths that kernels are made for.
std::vector<Config> configs() {
  Config wide = make_config(300, 128, 4);
  wide.tie_embeddings = false;
  return {small_config(), wide};
}

Sequences sequences_of(const Config& config) {
  Sequences sequences;
  uint64_t seed = 40;
  for (const int64_t length : {1, 300, 2, 17, 129})
    sequences.push_back(random_tokens(length, config.vocab_size, ++seed));
  return sequences;
}

OwnedTensor sent(const Context& ctx, const std::vector<int32_t>& values) {
  OwnedTensor t(DType::i32, {static_cast<int64_t>(values.size())}, ctx.memory());
  t.upload(values.data());
  return t;
}

std::vector<double> received(Context& ctx, const Tensor& t) {
  const Buffer copy(t.bytes());
  ctx.memory().download(copy.data(), t.data, t.bytes());
  Tensor on_host = t;
  on_host.data = copy.data();
  return op_test::to_double(on_host);
}

// A model with the same masters on any engine.
TrainableModel model_on(Context& ctx, const Config& config, DType dtype) {
  const ParameterStore host(config);
  initialize(config, host.parameters(), 1);
  // Nothing stays zero or one, and rounding is not blown up from layer to layer.
  Rng rng(1, 99);
  for (const ParameterInfo& p : parameter_table(config)) {
    const Tensor& t = p.of(host.parameters());
    for (int64_t i = 0; i < t.size(); ++i)
      t.ptr<float>()[i] += 0.05f * static_cast<float>(rng.normal());
  }
  TrainableModel model(config, dtype, ctx.memory());
  model.masters().buffer().upload(host.flat().data);
  model.refresh(ctx);
  return model;
}

// Packed sequences, with as many empty ones behind them as are asked for.
struct Input {
  Input(const Context& ctx, const Sequences& sequences, int64_t empty = 0) {
    std::vector<int32_t> all, start = {0};
    for (const auto& s : sequences) {
      all.insert(all.end(), s.begin(), s.end());
      start.push_back(static_cast<int32_t>(all.size()));
    }
    for (int64_t i = 0; i < empty; ++i) start.push_back(start.back());
    std::vector<int32_t> next(all.begin() + 1, all.end());
    next.push_back(-1);
    tokens = sent(ctx, all);
    targets = sent(ctx, next);
    seq_start = sent(ctx, start);
  }
  PackedTokens view() const { return {tokens, seq_start, {}}; }
  int64_t count() const { return tokens->shape[0]; }

  OwnedTensor tokens, targets, seq_start;
};

struct Inference {
  std::vector<double> logits, conv, ssm;
};

Inference infer(Context& ctx, const Config& config, DType dtype, const Sequences& sequences) {
  const TrainableModel model = model_on(ctx, config, dtype);
  const Input input(ctx, sequences);
  DecodeState state(config, static_cast<int64_t>(sequences.size()), DType::f32, ctx.memory());
  const OwnedTensor hidden(dtype, {input.count(), config.d_model}, ctx.memory());
  const OwnedTensor out(DType::f32, {input.count(), config.vocab_size}, ctx.memory());
  forward(ctx, model.weights(), input.view(), &state, hidden);
  logits(ctx, model.weights(), hidden, out);
  const int64_t last = config.n_layer - 1;
  return {received(ctx, out), received(ctx, state.conv(last)), received(ctx, state.ssm(last))};
}

// Forward and backward, as often as wanted, with gradients and loss anew each time.
class Training {
 public:
  Training(Context& ctx, const Config& config, DType dtype, int64_t empty = 0)
      : ctx_(ctx),
        model_(model_on(ctx, config, dtype)),
        input_(ctx, sequences_of(config), empty),
        gradients_(config, DType::f32, ctx.memory()),
        loss_(DType::f32, {input_.count()}, ctx.memory()) {}

  Recompute recompute = Recompute::none;

  // fresh: only what a fresh batch adds to starts from zero.
  void queue(bool fresh = false) {
    if (fresh)
      clear_added(ctx_, model_.config(), gradients_);
    else
      fill_zero(ctx_, gradients_.flat());
    TrainingBatch batch = {.input = input_.view(), .targets = input_.targets};
    batch.loss_scale = 1.0f / static_cast<float>(input_.count());
    batch.recompute = recompute;
    batch.fresh = fresh;
    forward_backward(ctx_, model_.weights(), batch, gradients_.parameters(), loss_);
  }
  std::vector<double> gradients() { return received(ctx_, gradients_.flat()); }
  std::vector<double> loss() { return received(ctx_, loss_); }

 private:
  Context& ctx_;
  TrainableModel model_;
  Input input_;
  ParameterStore gradients_;
  OwnedTensor loss_;
};

TEST(ModelCuda, LogitsAndStatesAreTheCpus) {
  on_cuda([](Context& gpu) {
    Context cpu(cpu_engine(), 1);
    for (const Config& config : configs()) {
      const Inference expected = infer(cpu, config, DType::f32, sequences_of(config));
      const Inference actual = infer(gpu, config, DType::f32, sequences_of(config));
      EXPECT_TRUE(close(actual.logits, expected.logits, kF32)) << config.d_model;
      EXPECT_TRUE(close(actual.conv, expected.conv, kF32)) << config.d_model;
      EXPECT_TRUE(close(actual.ssm, expected.ssm, kF32)) << config.d_model;
    }
  });
}

TEST(ModelCuda, Bf16IsNoFurtherFromTheTruthThanOnTheCpu) {
  on_cuda([](Context& gpu) {
    Context cpu(cpu_engine(), 1);
    for (const Config& config : configs()) {
      const Sequences sequences = sequences_of(config);
      const std::vector<double> truth = infer(cpu, config, DType::f32, sequences).logits;
      const double on_cpu = relative_rms(infer(cpu, config, DType::bf16, sequences).logits, truth);
      const double on_gpu = relative_rms(infer(gpu, config, DType::bf16, sequences).logits, truth);
      EXPECT_LE(on_gpu, 1.5 * on_cpu) << config.d_model;
    }
  });
}

TEST(ModelCuda, TokenByTokenIsTheWhole) {
  on_cuda([](Context& gpu) {
    for (const Config& config : configs()) {
      const Sequences sequence = {random_tokens(70, config.vocab_size, 5)};
      const Inference whole = infer(gpu, config, DType::f32, sequence);
      const TrainableModel model = model_on(gpu, config, DType::f32);
      DecodeState state(config, 3, DType::f32, gpu.memory());
      const OwnedTensor hidden(DType::f32, {1, config.d_model}, gpu.memory());
      const OwnedTensor out(DType::f32, {1, config.vocab_size}, gpu.memory());
      const OwnedTensor slot = sent(gpu, {2});
      std::vector<double> logits;
      for (const int32_t token : sequence[0]) {
        const OwnedTensor tokens = sent(gpu, {token});
        step(gpu, model.weights(), tokens, slot, state, hidden);
        krait::logits(gpu, model.weights(), hidden, out);
        const std::vector<double> row = received(gpu, out);
        logits.insert(logits.end(), row.begin(), row.end());
      }
      EXPECT_TRUE(close(logits, whole.logits, 3e-6)) << config.d_model;
    }
  });
}

// Nine stages of 2048, eight and one, of which the fifth ends the first sequence and begins the
// second; five of 4096.
TEST(ModelCuda, LongSequencesGoInStages) {
  on_cuda([](Context& gpu) {
    Context cpu(cpu_engine());
    const Config config = make_config(40, 64, 18);
    const Sequences sequences = {random_tokens(10000, config.vocab_size, 60),
                                 random_tokens(8300, config.vocab_size, 61)};
    const Inference expected = infer(cpu, config, DType::f32, sequences);
    const double bf16_on_cpu =
        relative_rms(infer(cpu, config, DType::bf16, sequences).logits, expected.logits);
    Engine staged = gpu.engine();
    for (const int64_t stage : {2048, 4096}) {
      static int64_t tokens;
      tokens = stage;
      staged.scan_stage = [](Context&, int64_t, int64_t, int64_t, int64_t) { return tokens; };
      Context stages(staged);
      const Inference actual = infer(stages, config, DType::f32, sequences);
      EXPECT_TRUE(close(actual.logits, expected.logits, kF32)) << stage;
      EXPECT_TRUE(close(actual.conv, expected.conv, kF32)) << stage;
      EXPECT_TRUE(close(actual.ssm, expected.ssm, kF32)) << stage;
      const Inference again = infer(stages, config, DType::f32, sequences);
      EXPECT_EQ(again.logits, actual.logits) << stage;
      EXPECT_EQ(again.ssm, actual.ssm) << stage;
      EXPECT_LE(relative_rms(infer(stages, config, DType::bf16, sequences).logits, expected.logits),
                1.5 * bf16_on_cpu)
          << stage;
    }
  });
}

// With batch_invariant neither what a sequence is packed with nor how many rows there are changes a
// bit: on both sides of what layouts and tiles are chosen by, and in segments.
TEST(ModelCuda, BatchInvariantSequencesHaveBitsOfTheirOwn) {
  on_cuda([](Context& gpu) {
    gpu.batch_invariant = true;
    std::vector<Config> all = configs();
    all.push_back(make_config(200, 512, 2));  // rows whose norm several threads or warps add up
    for (const Config& config : all)
      for (const DType dtype : {DType::f32, DType::bf16}) {
        Sequences sequences = sequences_of(config);
        sequences.push_back(random_tokens(4500, config.vocab_size, 39));
        const Inference together = infer(gpu, config, dtype, sequences);
        Inference apart;
        for (const auto& s : sequences) {
          const Inference alone = infer(gpu, config, dtype, {s});
          for (const auto member : {&Inference::logits, &Inference::conv, &Inference::ssm})
            (apart.*member)
                .insert((apart.*member).end(), (alone.*member).begin(), (alone.*member).end());
        }
        EXPECT_EQ(together.logits, apart.logits) << config.d_model << " " << name_of(dtype);
        EXPECT_EQ(together.conv, apart.conv) << config.d_model << " " << name_of(dtype);
        EXPECT_EQ(together.ssm, apart.ssm) << config.d_model << " " << name_of(dtype);
      }
  });
}

// Token by token behind a prompt. Sums in another order, which some roundings turn into a unit of
// bf16.
TEST(ModelCuda, StatesInBf16GiveTheCpusLogits) {
  on_cuda([](Context& gpu) {
    Context cpu(cpu_engine(), 1);
    for (const Config& config : configs()) {
      const Sequences sequence = {random_tokens(70, config.vocab_size, 5)};
      const auto logits_on = [&](Context& ctx, DType states) {
        const TrainableModel model = model_on(ctx, config, DType::f32);
        DecodeState state(config, 3, states, ctx.memory());
        const Input prompt(ctx, sequence);
        const OwnedTensor read(DType::f32, {prompt.count(), config.d_model}, ctx.memory());
        forward(ctx, model.weights(), prompt.view(), &state, read);
        state.copy(ctx, 0, 2);
        const OwnedTensor out(DType::f32, {1, config.vocab_size}, ctx.memory());
        const OwnedTensor slot = sent(ctx, {2});
        std::vector<double> logits;
        for (const int32_t token : sequence[0]) {
          const OwnedTensor tokens = sent(ctx, {token});
          decode(ctx, model.weights(), tokens, slot, state, out);
          const std::vector<double> row = received(ctx, out);
          logits.insert(logits.end(), row.begin(), row.end());
        }
        return logits;
      };
      const std::vector<double> expected = logits_on(cpu, DType::bf16);
      EXPECT_TRUE(close(logits_on(gpu, DType::bf16), expected, 2e-3)) << config.d_model;
      EXPECT_FALSE(close(logits_on(cpu, DType::f32), expected, 1e-5)) << config.d_model;
    }
  });
}

TEST(ModelCuda, LossAndGradientsAreTheCpus) {
  on_cuda([](Context& gpu) {
    Context cpu(cpu_engine(), 1);
    for (const Config& config : configs()) {
      Training expected(cpu, config, DType::f32), actual(gpu, config, DType::f32);
      expected.queue();
      for (const bool fresh : {false, true}) {
        actual.queue(fresh);
        EXPECT_TRUE(close(actual.loss(), expected.loss(), kF32)) << config.d_model;
        EXPECT_TRUE(close(actual.gradients(), expected.gradients(), kF32)) << config.d_model;
      }
    }
  });
}

TEST(ModelCuda, TwentyRunsGiveTheSameBits) {
  on_cuda([](Context& gpu) {
    for (const Config& config : configs()) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        Training training(gpu, config, dtype);
        training.queue();
        const std::vector<double> gradients = training.gradients(), loss = training.loss();
        for (int run = 1; run < 20; ++run) {
          training.queue();
          ASSERT_EQ(training.gradients(), gradients) << config.d_model << " run " << run;
          ASSERT_EQ(training.loss(), loss) << config.d_model << " run " << run;
        }
      }
    }
  });
}

// The first run is queued op by op, the second is recorded and replayed, the third replayed.
TEST(ModelCuda, AReplayGivesTheSameBits) {
  on_cuda([](Context& gpu) {
    for (const Config& config : configs()) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        Training training(gpu, config, dtype);
        Recordings recordings;
        const auto run = [&] {
          recordings.run(gpu, {1}, [&] { training.queue(); });
          return std::pair(training.gradients(), training.loss());
        };
        const auto eager = run();
        EXPECT_EQ(run(), eager) << config.d_model;
        EXPECT_EQ(run(), eager) << config.d_model;
      }
    }
  });
}

TEST(ModelCuda, RecomputingGivesTheSameBits) {
  on_cuda([](Context& gpu) {
    for (Config config : configs()) {
      config.n_layer += 3;  // more than lie between two residual streams that are kept
      Training training(gpu, config, DType::bf16);
      training.queue();
      const std::vector<double> kept = training.gradients();
      for (const Recompute recompute : {Recompute::light, Recompute::full}) {
        training.recompute = recompute;
        training.queue();
        EXPECT_EQ(training.gradients(), kept) << config.d_model;
      }
    }
  });
}

// What a recorded step is padded with.
TEST(ModelCuda, EmptySequencesChangeNoSequence) {
  on_cuda([](Context& gpu) {
    for (const Config& config : configs()) {
      Training plain(gpu, config, DType::f32), padded(gpu, config, DType::f32, /*empty=*/3);
      plain.queue();
      padded.queue();
      EXPECT_EQ(padded.loss(), plain.loss()) << config.d_model;
      EXPECT_TRUE(close(padded.gradients(), plain.gradients(), 1e-6)) << config.d_model;
    }
  });
}

TEST(ModelCuda, AFullDeviceIsAnErrorThatSaysHowMuchIsMissing) {
  on_cuda([](Context& gpu) {
    try {
      const Buffer buffer(size_t{1} << 46, gpu.memory());
      ADD_FAILURE() << "64 TiB were there";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("65536.00 GiB"), std::string::npos) << e.what();
    }
    EXPECT_EQ(infer(gpu, small_config(), DType::f32, {{1, 2}}).logits.size(),
              2u * 23);  // it goes on
  });
}

}  // namespace
}  // namespace krait
