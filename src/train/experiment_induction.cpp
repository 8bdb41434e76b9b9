#include "train/experiment_induction.h"

#include <algorithm>

#include "core/rng.h"
#include "train/learner.h"

namespace krait {
namespace {

constexpr int64_t kFirstLength = 8, kTestEvery = 50, kTestSequences = 64;
constexpr uint64_t kTrainStream = 1, kTestStream = 2, kLongStream = 3;

// `count` sequences of `length` tokens; the target of each last token is M, of all others none.
void make_batch(const InductionSettings& s, int64_t count, int64_t length, Rng& rng, Batch& batch) {
  const auto vocab = static_cast<uint64_t>(s.vocab_size);
  const auto special = static_cast<int32_t>(s.vocab_size);
  batch.clear();
  for (int64_t i = 0; i < count; ++i) {
    const auto begin = static_cast<int64_t>(batch.tokens.size());
    for (int64_t t = 0; t < length; ++t)
      batch.tokens.push_back(static_cast<int32_t>(rng.below(vocab)));
    const int64_t last_place = std::min(s.max_position, length - 2);  // M stands before the last S
    const auto place = static_cast<int64_t>(rng.below(static_cast<uint64_t>(last_place)));
    batch.tokens[begin + place] = special;
    batch.tokens.back() = special;
    batch.targets.resize(batch.tokens.size(), -1);
    batch.targets.back() = batch.tokens[begin + place + 1];
    batch.seq_start.push_back(static_cast<int32_t>(batch.tokens.size()));
  }
  batch.target_count = count;
}

// Share of sequences whose most likely last token is M.
double accuracy(Learner& learner, const Batch& batch) {
  Context& ctx = learner.context();
  const Config& config = learner.model().config();
  const auto tokens = static_cast<int64_t>(batch.tokens.size());
  const auto sent = [&ctx](const std::vector<int32_t>& values) {
    const auto count = static_cast<int64_t>(values.size());
    MirroredTensor t(ctx, DType::i32, {count});
    std::copy(values.begin(), values.end(), t.host_ptr<int32_t>());
    t.upload(count);
    return t;
  };
  const MirroredTensor in = sent(batch.tokens), seq_start = sent(batch.seq_start);
  Arena::Scope scope(ctx.workspace());
  const Tensor hidden = ctx.workspace().tensor(DType::f32, {tokens, config.d_model});
  MirroredTensor row(ctx, DType::f32, {1, config.vocab_size});
  forward(ctx, learner.model().weights(), {in, seq_start, {}}, nullptr, hidden);
  int64_t right = 0;
  for (int64_t i = 0; i < batch.num_seqs(); ++i) {
    const int64_t last = batch.seq_start[i + 1] - 1;
    logits(ctx, learner.model().weights(), hidden.slice(0, last, last + 1), row);
    row.download(1);
    const float* l = row.host_ptr<float>();
    right += std::max_element(l, l + config.vocab_size) - l == batch.targets[last] ? 1 : 0;
  }
  return static_cast<double>(right) / static_cast<double>(batch.num_seqs());
}

Config model_config(const InductionSettings& s) {
  Config config = make_config((s.vocab_size + 8) / 8 * 8, s.d_model, s.n_layer);
  config.d_state = s.d_state;
  config.dt_min = s.dt_min;
  config.dt_max = s.dt_max;
  config.tie_embeddings = false;
  config.selective_delta = config.selective_B = config.selective_C = s.selective;
  return config;
}

// Constant, then linearly to zero over the last 30 %: what is learned last must not be shaken off.
double learning_rate(const InductionSettings& s, int64_t step) {
  const auto steps = static_cast<double>(s.max_steps);
  return s.lr * std::min(1.0, (steps - static_cast<double>(step)) / (0.3 * steps));
}

}  // namespace

InductionResult run_induction(const Engine& engine, const InductionSettings& s,
                              const std::function<void(int64_t, double, double)>& progress) {
  Learner learner(engine, model_config(s), {.threads = s.threads});
  learner.initialize(s.seed);
  Rng rng(s.seed, kTrainStream), test_rng(s.seed, kTestStream), long_rng(s.seed, kLongStream);
  AdamWSettings adam;
  adam.weight_decay = 0;
  Batch batch;
  InductionResult result;
  double loss = 0;
  while (result.steps < s.max_steps) {
    const int64_t step = ++result.steps;
    const int64_t length =
        std::min(s.length, kFirstLength + (s.growth_steps > 0
                                               ? (s.length - kFirstLength) * step / s.growth_steps
                                               : s.length));
    // Shorter sequences come in larger numbers: the work of a step stays the same.
    make_batch(s, s.batch_size * s.length / length, length, rng, batch);
    learner.accumulate(batch, 1.0 / static_cast<double>(batch.target_count), nullptr);
    learner.update(adam, learning_rate(s, step), step);
    loss += learner.collect().loss / static_cast<double>(batch.target_count);
    if (step % kTestEvery != 0) continue;
    make_batch(s, kTestSequences, s.length, test_rng, batch);
    result.accuracy = accuracy(learner, batch);
    if (progress) progress(step, loss / kTestEvery, result.accuracy);
    loss = 0;
  }
  make_batch(s, kTestSequences, s.length, test_rng, batch);
  result.accuracy = accuracy(learner, batch);
  make_batch(s, kTestSequences, 16 * s.length, long_rng, batch);
  result.long_accuracy = accuracy(learner, batch);
  return result;
}

}  // namespace krait
