#include "bench_parity.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "bench_prompts.h"
#include "core/error.h"
#include "model/init.h"
#include "ops/op_parity.h"

namespace krait {
namespace {

// Tokens of a sequence that are compared, at most: what a CPU reads, or learns from, in some
// seconds.
constexpr int64_t kTokens = 512, kTrainedTokens = 128;
constexpr int64_t kRows = 8;  // whose logits are compared, the last ones of these
constexpr int64_t kSteps = 4;

// Numbers of the first and the last of so many sequences.
std::vector<int64_t> ends(int64_t sequences) {
  return sequences == 1 ? std::vector<int64_t>{0} : std::vector<int64_t>{0, sequences - 1};
}

// Of f32.
std::vector<double> received(Context& ctx, const Tensor& t) {
  ctx.engine().synchronize(ctx);
  std::vector<float> values(static_cast<size_t>(t.size()));
  ctx.memory().download(values.data(), t.data, t.bytes());
  return {values.begin(), values.end()};
}

void append(std::vector<double>& to, const std::vector<double>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

OwnedTensor sent(Context& ctx, const std::vector<int32_t>& values) {
  OwnedTensor t(DType::i32, {static_cast<int64_t>(values.size())}, ctx.memory());
  t.upload(values.data());
  return t;
}

// Of some rows of hidden states.
std::vector<double> logits_of(Context& ctx, const Weights& w, const Tensor& hidden) {
  const OwnedTensor out(DType::f32, {hidden.shape[0], w.config.vocab_size}, ctx.memory());
  logits(ctx, w, hidden, out);
  return received(ctx, out.view());
}

// The model on the engine, and on the one whose results are expected.
struct Pair {
  Context &ctx, &expected;
  const Weights &weights, &same;
};

double prompt_error(const Pair& p, const ModelBench& bench) {
  const Config& config = bench.config;
  DecodeState state(config, bench.batch, bench.state_dtype, p.ctx.memory());
  Prompts prompts(p.ctx, p.weights, bench);
  prompts.read(state, 0, 1);
  const int64_t length = prompts.tokens_before(1), checked = std::min(length, kTokens);
  const std::vector<int32_t> tokens = some_tokens(config, bench.batch * length);
  std::vector<double> actual, expected;
  for (const int64_t sequence : ends(bench.batch)) {
    const int64_t first = sequence * length;
    const auto rows = [checked](const Tensor& of_sequence) {
      return of_sequence.slice(0, std::max<int64_t>(0, checked - kRows), checked);
    };
    append(actual,
           logits_of(p.ctx, p.weights, rows(prompts.hidden().slice(0, first, first + checked))));
    const OwnedTensor some =
        sent(p.expected, {tokens.begin() + first, tokens.begin() + first + checked});
    const OwnedTensor start = sent(p.expected, {0, static_cast<int32_t>(checked)});
    const OwnedTensor hidden(p.same.dtype, {checked, config.d_model});
    forward(p.expected, p.same, {.tokens = some, .seq_start = start, .slot = {}}, nullptr, hidden);
    append(expected, logits_of(p.expected, p.same, rows(hidden.view())));
  }
  return relative_rms(actual, expected);
}

// From nothing, each sequence with tokens of its own.
double decode_error(const Pair& p, const ModelBench& bench) {
  const Config& config = bench.config;
  const std::vector<int64_t> some = ends(bench.batch);
  const auto count = static_cast<int64_t>(some.size());
  DecodeState state(config, bench.batch, bench.state_dtype, p.ctx.memory()),
      same_state(config, count, bench.state_dtype);
  std::vector<int32_t> slots(static_cast<size_t>(bench.batch));
  std::iota(slots.begin(), slots.end(), 0);
  const OwnedTensor slot = sent(p.ctx, slots),
                    out(DType::f32, {bench.batch, config.vocab_size}, p.ctx.memory()),
                    same_out(DType::f32, {count, config.vocab_size});
  const std::vector<int32_t> tokens = some_tokens(config, kSteps * bench.batch);
  for (int64_t step = 0; step < kSteps; ++step) {
    const auto begin = tokens.begin() + step * bench.batch;
    std::vector<int32_t> same_tokens;
    for (const int64_t sequence : some) same_tokens.push_back(begin[sequence]);
    decode(p.ctx, p.weights, sent(p.ctx, {begin, begin + bench.batch}), slot, state, out);
    decode(p.expected, p.same, sent(p.expected, same_tokens), {}, same_state, same_out);
  }
  std::vector<double> actual;
  for (const int64_t sequence : some)
    append(actual, received(p.ctx, out.view().slice(0, sequence, sequence + 1)));
  return relative_rms(actual, received(p.expected, same_out.view()));
}

// A model in training, and a batch whose first `checked` tokens of the first and last sequence
// alone are scored: what they give does not depend on the tokens behind them, nor on what else
// there is.
class Training {
 public:
  Training(Context& ctx, const ModelBench& bench, const ParameterStore& masters, int64_t checked,
           const std::vector<int64_t>& sequences, int64_t length)
      : ctx_(ctx),
        model_(bench.config, bench.dtype, ctx.memory()),
        gradients_(bench.config, DType::f32, ctx.memory()) {
    model_.masters().buffer().upload(masters.flat().data);
    model_.refresh(ctx);
    const std::vector<int32_t> all =
        some_tokens(bench.config, bench.train_batch * bench.train_length + 1);
    std::vector<int32_t> tokens, targets, start = {0};
    const std::vector<int64_t> scored = ends(bench.train_batch);
    for (const int64_t sequence : sequences) {
      const bool is_scored = std::ranges::find(scored, sequence) != scored.end();
      for (int64_t i = 0; i < length; ++i) {
        const auto at = static_cast<size_t>(sequence * bench.train_length + i);
        if (is_scored && i == 0) first_.push_back(static_cast<int64_t>(tokens.size()));
        tokens.push_back(all[at]);
        targets.push_back(is_scored && i < checked ? all[at + 1] : -1);
      }
      start.push_back(static_cast<int32_t>(tokens.size()));
    }
    tokens_ = sent(ctx, tokens), targets_ = sent(ctx, targets), start_ = sent(ctx, start);
    loss_ = OwnedTensor(DType::f32, {static_cast<int64_t>(tokens.size())}, ctx.memory());
    checked_ = checked;
  }

  void run(Recompute recompute) {
    TrainingBatch batch;
    batch.input = {.tokens = tokens_, .seq_start = start_, .slot = {}};
    batch.targets = targets_;
    batch.loss_scale = 1.0f / static_cast<float>(checked_ * static_cast<int64_t>(first_.size()));
    batch.recompute = recompute;
    forward_backward(ctx_, model_.weights(), batch, gradients_.parameters(), loss_);
  }

  std::vector<double> losses() const {
    std::vector<double> all;
    for (const int64_t first : first_)
      append(all, received(ctx_, loss_->slice(0, first, first + checked_)));
    return all;
  }
  std::vector<double> gradient(const ParameterInfo& info) const {
    return received(ctx_, info.of(gradients_.parameters()));
  }

 private:
  Context& ctx_;
  TrainableModel model_;
  ParameterStore gradients_;
  OwnedTensor tokens_, targets_, start_, loss_;
  std::vector<int64_t> first_;  // tokens of the scored sequences
  int64_t checked_ = 0;
};

void compare_training(Context& ctx, Context& expected, const ModelBench& bench,
                      ModelParity& parity) {
  const int64_t checked = std::min(bench.train_length, kTrainedTokens);
  std::vector<int64_t> all(static_cast<size_t>(bench.train_batch));
  std::iota(all.begin(), all.end(), int64_t{0});
  ParameterStore masters(bench.config);
  initialize(bench.config, masters.parameters(), /*seed=*/1, expected.threads());
  Training actual(ctx, bench, masters, checked, all, bench.train_length),
      same(expected, bench, masters, checked, ends(bench.train_batch), checked);
  actual.run(bench.recompute);
  same.run(Recompute::none);
  parity.loss = relative_rms(actual.losses(), same.losses());
  parity.gradients = 0;
  for (const ParameterInfo& info : parameter_table(bench.config)) {
    const double error = relative_rms(actual.gradient(info), same.gradient(info));
    // Not std::max: no number is the largest.
    if (!(error <= *parity.gradients)) parity.gradients = error;
  }
}

void expect_small(const char* what, const std::optional<double>& error, double most) {
  if (!error || *error <= most) return;
  char text[120];
  std::snprintf(text, sizeof text, "relative RMS error %.1e (at most %.0e)", *error, most);
  throw Error(text, std::string("comparing ") + what + " with the CPU's");
}

}  // namespace

ModelParity model_parity(Context& ctx, const ModelBench& bench) {
  ModelParity parity;
  Context expected(ctx.memory().on_host() ? reference_engine() : cpu_engine(), ctx.threads());
  if (bench.prompt > 0 || bench.gen > 0) {
    const Model model =
        make_random_model(bench.config, bench.dtype, /*seed=*/0, ctx.memory(), bench.quantization);
    const Model same =
        make_random_model(bench.config, bench.dtype, /*seed=*/0, host_memory(), bench.quantization);
    const Pair pair = {ctx, expected, model.weights, same.weights};
    if (bench.prompt > 0) parity.prompt = prompt_error(pair, bench);
    if (bench.gen > 0) parity.decode = decode_error(pair, bench);
  }
  if (bench.train_batch > 0) compare_training(ctx, expected, bench, parity);
  const bool rounded = bench.dtype == DType::bf16 || bench.state_dtype == DType::bf16;
  expect_small("a prompt's logits", parity.prompt, rounded ? 5e-2 : 1e-4);
  expect_small("a step's logits", parity.decode, rounded ? 5e-2 : 1e-4);
  expect_small("losses", parity.loss, rounded ? 1e-2 : 1e-4);
  expect_small("gradients", parity.gradients, rounded ? 2e-1 : 1e-3);
  return parity;
}

}  // namespace krait
