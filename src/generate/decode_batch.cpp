#include "generate/decode_batch.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "ops/engine.h"

namespace krait {
namespace {

// Slots besides those of sequences: the spare one, and snapshots where steps are queued ahead.
int64_t more_slots(const Context& ctx) { return ctx.memory().on_host() ? 1 : 3; }

}  // namespace

DecodeBatch::DecodeBatch(Context& ctx, const Weights& weights, DType state_dtype)
    : ctx_(ctx),
      weights_(weights),
      state_(weights.config, 1 + more_slots(ctx), state_dtype, ctx.memory()),
      results_(static_cast<size_t>(on_host() ? 1 : kAhead)) {
  if (weights.config.vocab_size > kMaxSampledVocab)
    throw Error("too many tokens to pick from", "vocab_size",
                "at most " + std::to_string(kMaxSampledVocab),
                std::to_string(weights.config.vocab_size));
  reserve(1, 1);
}

DecodeBatch::~DecodeBatch() { ctx_.engine().synchronize(ctx_); }

void DecodeBatch::reserve(int64_t sequences, int64_t recent) {
  const int64_t had_recent = recent_.view() ? recent_.view().shape[1] : 0;
  if (reserved_ >= sequences && had_recent >= recent) return;
  const Config& c = weights_.config;
  ctx_.engine().synchronize(ctx_);  // what is freed may be in use
  recordings_.clear();
  recent = std::max(recent, had_recent);
  if (reserved_ < sequences) {
    reserved_ = sequences;
    if (const int64_t slots = sequences + more_slots(ctx_); state_.slots() < slots) {
      DecodeState larger(c, slots, state_.dtype(), ctx_.memory());
      larger.restore(0, state_.save(0));
      state_ = std::move(larger);
    }
    tokens_ = MirroredTensor(ctx_, DType::i32, {sequences});
    slot_ = MirroredTensor(ctx_, DType::i32, {sequences});
    logits_ = OwnedTensor(DType::f32, {sequences, c.vocab_size}, ctx_.memory());
    sequence_ = MirroredTensor(ctx_, DType::u8, {sequences + 1, sizeof(SampledSequence)});
    picked_ = OwnedTensor(DType::i32, {sequences, 2}, ctx_.memory());
    if (!on_host())
      for (StepResult& result : results_)
        result.host = OwnedTensor(DType::i32, {sequences, 2}, ctx_.engine().transfer_memory());
  }
  recent_ = MirroredTensor(ctx_, DType::i32, {reserved_ + 1, recent});
}

void DecodeBatch::start(std::span<const Sequence> sequences, int32_t token, bool rewinds) {
  const auto count = static_cast<int64_t>(sequences.size());
  KRAIT_CHECK(count <= reserved_);
  auto* const sampled = reinterpret_cast<SampledSequence*>(sequence_.host_ptr<uint8_t>());
  int32_t* const tokens = tokens_.host_ptr<int32_t>();
  int32_t* const slot = slot_.host_ptr<int32_t>();
  const Tensor recent = recent_.host();
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& s = sequences[static_cast<size_t>(i)];
    const auto room = static_cast<size_t>(recent.shape[1]);
    const std::span<const int32_t> last = s.recent.last(std::min(s.recent.size(), room));
    std::copy(last.begin(), last.end(), recent.row<int32_t>(i));
    sampled[i] = s.sampled;
    sampled[i].tokens = static_cast<int64_t>(last.size());
    tokens[i] = token;
    slot[i] = static_cast<int32_t>(i);
    if (i > 0) state_.copy(ctx_, 0, i);
  }
  sequence_.upload(count);
  recent_.upload(count);
  rows_ = count;
  queued_ = read_ = 0;
  rewinds_ = rewinds && !on_host();  // elsewhere no step is ahead of the host
  step_rows_.clear();
  upload_rows();
}

void DecodeBatch::set_rows(std::span<const int32_t> slots, std::span<const int32_t> tokens) {
  KRAIT_CHECK(in_flight() == 0 && slots.size() == tokens.size());
  rows_ = static_cast<int64_t>(slots.size());
  std::copy(slots.begin(), slots.end(), slot_.host_ptr<int32_t>());
  std::copy(tokens.begin(), tokens.end(), tokens_.host_ptr<int32_t>());
  upload_rows();
}

void DecodeBatch::upload_rows() {
  tokens_.upload(rows_);
  slot_.upload(rows_);
}

// The rows' tokens through the model, up to the logits.
void DecodeBatch::decode() {
  const auto rows = [this](const Tensor& t) { return t.slice(0, 0, rows_); };
  krait::decode(ctx_, weights_, rows(tokens_), rows(slot_), state_, rows(logits_));
}

void DecodeBatch::queue_step() {
  KRAIT_CHECK(in_flight() < max_in_flight());
  if (rewinds_) {
    if (queued_ % kSnapshotSteps == 0) state_.copy(ctx_, 0, snapshot_slot(queued_));
    step_rows_.push_back(static_cast<int32_t>(rows_));
  }
  const auto rows = [this](const Tensor& t) { return t.slice(0, 0, rows_); };
  recordings_.run(ctx_, {rows_}, [&] {
    decode();
    sample_tokens(ctx_, {.logits = rows(logits_),
                         .slot = rows(slot_),
                         .spare_slot = spare_slot(),
                         .sequence = sequence_,
                         .recent = recent_,
                         .tokens = rows(tokens_),
                         .picked = rows(picked_)});
  });
  StepResult& result = results_[static_cast<size_t>(queued_ % max_in_flight())];
  result.rows = rows_;
  if (!on_host()) {
    copy_elements(ctx_, rows(picked_), rows(result.host));
    ctx_.engine().mark(ctx_, result.mark);
  }
  ++queued_;
}

std::span<const DecodeBatch::Result> DecodeBatch::read_step() {
  KRAIT_CHECK(in_flight() > 0);
  const StepResult& result = results_[static_cast<size_t>(read_++ % max_in_flight())];
  if (!on_host()) ctx_.engine().wait(ctx_, result.mark);
  const Tensor& picked = on_host() ? picked_.view() : result.host.view();
  static_assert(sizeof(Result) == 2 * sizeof(int32_t));
  return {reinterpret_cast<const Result*>(picked.ptr<int32_t>()), static_cast<size_t>(result.rows)};
}

void DecodeBatch::rewind(std::span<const int32_t> inputs) {
  const auto wanted = static_cast<int64_t>(inputs.size());
  if (on_host() || queued_ == wanted) return;
  KRAIT_CHECK(wanted < queued_ && wanted <= static_cast<int64_t>(step_rows_.size()));
  // Of the two snapshots the later one may be of a step that is too many.
  const int64_t last = (static_cast<int64_t>(step_rows_.size()) - 1) / kSnapshotSteps;
  const int64_t snapshot = std::min(last, wanted / kSnapshotSteps) * kSnapshotSteps;
  state_.copy(ctx_, snapshot_slot(snapshot), 0);
  for (int64_t i = snapshot; i < wanted; ++i) {
    // As many rows as then, since that may decide how sums are ordered.
    rows_ = step_rows_[static_cast<size_t>(i)];
    int32_t *const slot = slot_.host_ptr<int32_t>(), *const tokens = tokens_.host_ptr<int32_t>();
    std::fill_n(slot, rows_, spare_slot());
    std::fill_n(tokens, rows_, 0);
    slot[0] = 0;
    tokens[0] = inputs[static_cast<size_t>(i)];
    upload_rows();
    decode();
  }
}

std::vector<float> DecodeBatch::logits_after(int32_t token) {
  state_.copy(ctx_, 0, spare_slot());
  rows_ = 1;
  tokens_.host_ptr<int32_t>()[0] = token;
  slot_.host_ptr<int32_t>()[0] = spare_slot();
  upload_rows();
  decode();
  std::vector<float> out(static_cast<size_t>(weights_.config.vocab_size));
  ctx_.memory().download(out.data(), logits_->data, out.size() * sizeof(float));
  return out;
}

}  // namespace krait
