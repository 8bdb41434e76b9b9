#include "train/learner.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "core/error.h"
#include "model/init.h"
#include "ops/adamw.h"
#include "ops/elementwise.h"
#include "train/host_copy.h"

namespace krait {
namespace {

// Up to here forward and backward are recorded where the engine can: tokens x d_model. A kernel
// that reads and writes so many elements of bf16 a few times is done in about 10 microseconds on a
// large GPU, no more than it takes to launch the next few; beyond it launching hides behind the
// work.
constexpr int64_t kRecordedElements = int64_t{1} << 22;

// Keys of recordings: the first number tells the work.
constexpr int64_t kRound = 0, kRefresh = 1;

Tensor front(const MirroredTensor& t, int64_t count) { return t.view().slice(0, 0, count); }

}  // namespace

Learner::Learner(const Engine& engine, const Config& config, const LearnerSettings& settings)
    : context_(engine, settings.threads),
      recompute_(settings.recompute),
      model_(config, settings.dtype, context_.memory()),
      gradients_(config, DType::f32, context_.memory()),
      moments_(config, context_.memory()),
      loss_sum_(DType::f64, {1}, context_.memory()),
      norm_(DType::f32, {1}, context_.memory()),
      zero_(DType::f32, {1}, context_.memory()),
      poison_(DType::f32, {1}, context_.memory()),
      score_sum_(context_, DType::f64, {1}) {
  for (Slot& slot : slots_) {
    slot.loss = OwnedTensor(DType::f64, {1}, engine.transfer_memory());
    slot.norm = OwnedTensor(DType::f32, {1}, engine.transfer_memory());
  }
}

Learner::~Learner() {
  try {
    context_.engine().synchronize(context_);
  } catch (const Error&) {
    // A GPU that has failed has no work left; whoever asked it for a result was told.
  }
}

void Learner::initialize(uint64_t seed) {
  const HostCopy masters(model_.config(), model_.masters());
  krait::initialize(model_.config(), masters.parameters(), seed, context_.threads());
  masters.write_back(model_.masters());
  masters_changed();
}

void Learner::reserve(int64_t tokens, int64_t num_seqs) {
  const auto holds = [](const MirroredTensor& t, int64_t count) {
    return t.view() && t.view().shape[0] >= count;
  };
  if (holds(tokens_, tokens) && holds(seq_start_, num_seqs + 1)) return;
  context_.engine().synchronize(context_);  // what is freed may be in use
  recordings_.clear();
  // Two of each for the host: one is filled while the other is still on its way.
  const auto make = [&](int64_t count) {
    return MirroredTensor(context_, DType::i32, {count}, /*mirrors=*/2);
  };
  if (!holds(tokens_, tokens)) {
    tokens_ = make(tokens);
    targets_ = make(tokens);
    losses_ = OwnedTensor(DType::f32, {tokens}, context_.memory());
  }
  if (!holds(seq_start_, num_seqs + 1)) seq_start_ = make(num_seqs + 1);
}

// num_seqs: at least the batch's; those beyond it are empty.
Learner::Views Learner::send(const Batch& batch, int64_t num_seqs) {
  const auto tokens = static_cast<int64_t>(batch.tokens.size());
  const int64_t vocab_size = model_.config().vocab_size;
  check_tokens(batch.tokens, vocab_size);
  for (const int32_t target : batch.targets)
    KRAIT_CHECK(target < vocab_size, "target " + std::to_string(target));
  reserve(tokens, num_seqs);
  std::copy(batch.tokens.begin(), batch.tokens.end(), tokens_.host_ptr<int32_t>());
  std::copy(batch.targets.begin(), batch.targets.end(), targets_.host_ptr<int32_t>());
  int32_t* const end =
      std::copy(batch.seq_start.begin(), batch.seq_start.end(), seq_start_.host_ptr<int32_t>());
  std::fill_n(end, num_seqs - batch.num_seqs(), static_cast<int32_t>(tokens));
  tokens_.upload(tokens);
  targets_.upload(tokens);
  seq_start_.upload(num_seqs + 1);
  return {.input = {front(tokens_, tokens), front(seq_start_, num_seqs + 1), {}},
          .targets = front(targets_, tokens),
          .loss = losses_.view().slice(0, 0, tokens)};
}

void Learner::accumulate(const Batch& batch, double loss_scale, DecodeState* state) {
  // Fewer numbers of sequences, so fewer recordings. It depends on the batch alone: a resumed run
  // does the same. With a state every sequence has a slot, and their number is always the same.
  const bool padded = context_.engine().record && !state;
  const auto num_seqs = static_cast<uint64_t>(batch.num_seqs());
  const Views views =
      send(batch, static_cast<int64_t>(padded ? std::bit_ceil(num_seqs) : num_seqs));
  TrainingBatch input;
  input.input = views.input;
  input.targets = views.targets;
  input.loss_scale = static_cast<float>(loss_scale);
  input.state = state;
  input.recompute = recompute_;
  input.fresh = std::exchange(fresh_, false);
  const auto round = [&] {
    forward_backward(context_, model_.weights(), input, gradients_.parameters(), views.loss);
    sum_elements(context_, views.loss, loss_sum_);
  };
  const int64_t tokens = views.loss.shape[0];
  if (tokens * model_.config().d_model > kRecordedElements) return round();
  const int64_t state_address = state ? reinterpret_cast<intptr_t>(state->conv(0).data) : 0;
  recordings_.run(context_,
                  {kRound, tokens, views.input.seq_start.shape[0], state_address,
                   std::bit_cast<int32_t>(input.loss_scale), input.fresh},
                  round);
}

void Learner::apply(const AdamWSettings& settings, double lr, int64_t step) {
  AdamW op;
  op.norm = norm_;
  op.max_norm = settings.clip > 0 ? static_cast<float>(settings.clip)
                                  : std::numeric_limits<float>::infinity();
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
    if (const Tensor& rounded = model_.rounded_masters())
      op.rounded = decay ? model_.masters().decayed(rounded) : model_.masters().undecayed(rounded);
    op.weight_decay = decay ? static_cast<float>(settings.weight_decay) : 0.0f;
    adamw(context_, op);
  }
}

void Learner::update(const AdamWSettings& settings, double lr, int64_t step) {
  KRAIT_CHECK(in_flight() < kMaxInFlight);
  if (fresh_) fill_zero(context_, gradients_.flat());  // no batch
  const std::array<Tensor, 2> all = {gradients_.flat(), poison_};
  global_norm(context_, {all, norm_});
  add_product(context_, norm_, zero_, poison_);
  apply(settings, lr, step);
  Slot& slot = slots_[static_cast<size_t>(updated_++ % kMaxInFlight)];
  slot.step = step;
  copy_elements(context_, loss_sum_, slot.loss);
  copy_elements(context_, norm_, slot.norm);
  context_.engine().mark(context_, slot.ready);
  recordings_.run(context_, {kRefresh}, [&] {
    fill_zero(context_, loss_sum_);
    clear_added(context_, model_.config(), gradients_);
    model_.refresh_A(context_);
  });
  fresh_ = true;
}

StepResult Learner::collect() {
  KRAIT_CHECK(in_flight() > 0);
  const Slot& slot = slots_[static_cast<size_t>(collected_++ % kMaxInFlight)];
  context_.engine().wait(context_, slot.ready);
  return {slot.step, slot.loss->ptr<double>()[0], static_cast<double>(slot.norm->ptr<float>()[0])};
}

double Learner::score(const Batch& batch, DecodeState* state) {
  const Views views = send(batch, batch.num_seqs());
  krait::score(context_, model_.weights(), views.input, views.targets, state, views.loss);
  fill_zero(context_, score_sum_);
  sum_elements(context_, views.loss, score_sum_);
  score_sum_.download(1);
  return score_sum_.host_ptr<double>()[0];
}

}  // namespace krait
