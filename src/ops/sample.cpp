#include "ops/sample.h"

#include <cmath>
#include <limits>
#include <string>

#include "ops/check.h"
#include "ops/engine.h"

namespace krait {
namespace {

void check_range(const char* name, double value, double low, double high, const char* expected) {
  if (!(value >= low && value <= high)) {
    throw Error("bad sampling parameter", name, expected, std::to_string(value));
  }
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargest = std::numeric_limits<float>::max();

}  // namespace

void SamplingParams::validate() const {
  check_range("temperature", temperature, 0, kLargest, "0 or more, finite");
  check_range("top_p", top_p, 0, 1, "0 to 1");
  check_range("min_p", min_p, 0, 1, "0 to 1");
  check_range("repeat_penalty", repeat_penalty, std::numeric_limits<float>::min(), kLargest,
              "more than 0, finite");
  check_range("repeat_last_n", repeat_last_n, -1, kInfinity, "-1 or more");
  check_range("vocab_limit", vocab_limit, 0, kInfinity, "0 or more");
}

SampledSequence sampled_sequence(const SamplingParams& params, int64_t remaining) {
  params.validate();
  return {.seed = params.seed,
          .rng_position = 0,
          .remaining = remaining,
          .tokens = 0,
          .log_min_p = params.min_p > 0 ? std::log(double{params.min_p}) : -kInfinity,
          .temperature = params.temperature,
          .top_p = params.top_p,
          .repeat_penalty = params.repeat_penalty,
          .top_k = params.top_k,
          .repeat_last_n = params.repeat_last_n,
          .vocab_limit = params.vocab_limit,
          .end_token_count = 0,
          .end_tokens = {}};
}

Cost sample_cost(const TokenSampling& op) {
  return {.bytes = static_cast<double>(op.logits.size()) * sizeof(float)};
}

void sample_tokens(Context& ctx, const TokenSampling& op) {
  const int64_t num_seqs = op.tokens.shape[0];
  check_tensor(op.tokens, "tokens", DType::i32, {-1});
  check_tensor(op.logits, "logits", DType::f32, {num_seqs, -1});
  KRAIT_CHECK(op.logits.shape[1] > 0 && op.logits.shape[1] <= kMaxSampledVocab,
              "logits is " + shape_string(op.logits));
  check_tensor(op.slot, "slot", DType::i32, {num_seqs});
  check_tensor(op.sequence, "sequence", DType::u8,
               {-1, static_cast<int64_t>(sizeof(SampledSequence))});
  check_tensor(op.recent, "recent", DType::i32, {op.sequence.shape[0], -1});
  check_tensor(op.picked, "picked", DType::i32, {num_seqs, 2});
  KRAIT_CHECK(op.sequence.contiguous() && op.picked.contiguous() && op.recent.shape[1] > 0);
  KRAIT_CHECK(op.spare_slot >= 0 && op.spare_slot < op.sequence.shape[0]);
  if (num_seqs > 0) ctx.engine().sample_tokens(ctx, op);
}

void check_picked(int32_t token, Picked picked) {
  switch (picked) {
    case Picked::token:
    case Picked::at_rest:
      return;
    case Picked::not_a_number:
    case Picked::infinite:
      throw Error("the model gave a logit that is no number", "token " + std::to_string(token), "",
                  picked == Picked::infinite ? "inf" : "nan");
    case Picked::nothing_finite:
      throw Error("no token can be picked", "logits", "a finite one");
  }
}

}  // namespace krait
