#include "train/learner.h"

#include <array>

#include "model/init.h"
#include "ops/adamw.h"

namespace krait {
namespace {

// Ops only read these.
Tensor view_of(const std::vector<int32_t>& values) {
  return Tensor(const_cast<int32_t*>(values.data()), DType::i32,
                {static_cast<int64_t>(values.size())});
}

}  // namespace

Learner::Learner(const Engine& engine, const Config& config, DType dtype, int threads)
    : context_(engine, threads),
      model_(config, dtype),
      gradients_(config),
      moments_(config),
      norm_(DType::f32, {1}) {}

void Learner::initialize(uint64_t seed) {
  krait::initialize(model_.config(), model_.masters().parameters(), seed);
  masters_changed();
}

PackedTokens Learner::packed(const Batch& batch) const {
  return {view_of(batch.tokens), view_of(batch.seq_start), {}};
}

double Learner::sum_of_losses(const Tensor& loss) const {
  double sum = 0;
  for (int64_t t = 0; t < loss.shape[0]; ++t) sum += static_cast<double>(loss.ptr<float>()[t]);
  return sum;
}

double Learner::accumulate(const Batch& batch, double loss_scale, DecodeState* state) {
  const auto tokens = static_cast<int64_t>(batch.tokens.size());
  if (!losses_.view() || losses_->shape[0] < tokens) losses_ = OwnedTensor(DType::f32, {tokens});
  const Tensor loss = losses_.view().slice(0, 0, tokens);
  TrainingBatch input;
  input.input = packed(batch);
  input.targets = view_of(batch.targets);
  input.loss_scale = static_cast<float>(loss_scale);
  input.state = state;
  forward_backward(context_, model_.weights(), input, gradients_.parameters(), loss);
  return sum_of_losses(loss);
}

double Learner::gradient_norm() {
  const std::array<Tensor, 1> all = {gradients_.flat()};
  global_norm(context_, {all, norm_});
  return static_cast<double>(norm_->ptr<float>()[0]);
}

void Learner::update(const AdamWSettings& settings, double lr, int64_t step) {
  AdamW op;
  op.norm = settings.clip > 0 ? norm_.view() : Tensor();
  op.max_norm = static_cast<float>(settings.clip);
  op.lr = static_cast<float>(lr);
  op.beta1 = static_cast<float>(settings.beta1);
  op.beta2 = static_cast<float>(settings.beta2);
  op.eps = static_cast<float>(settings.eps);
  op.step = step;
  for (const bool decay : {true, false}) {
    const auto part = [decay](const ParameterStore& s) {
      return decay ? s.decayed() : s.undecayed();
    };
    op.param = part(model_.masters());
    op.grad = part(gradients_);
    op.m = part(moments_.m);
    op.v = part(moments_.v);
    op.weight_decay = decay ? static_cast<float>(settings.weight_decay) : 0.0f;
    adamw(context_, op);
  }
  gradients_.buffer().zero();
  masters_changed();
}

double Learner::score(const Batch& batch, DecodeState* state) {
  const auto tokens = static_cast<int64_t>(batch.tokens.size());
  Arena::Scope scope(context_.workspace());
  const Tensor loss = context_.workspace().tensor(DType::f32, {tokens});
  krait::score(context_, model_.weights(), packed(batch), view_of(batch.targets), state, loss);
  return sum_of_losses(loss);
}

}  // namespace krait
