// What the tests of decode() on a GPU share: cases, a batch that decodes, and what is expected of
// one.
#pragma once

#include <deque>
#include <numeric>

#include "model/model_test.h"
#include "ops/cuda_engine.h"
#include "ops/decoder_step.h"
#include "ops/recordings.h"

namespace krait::decode_test {

using namespace model_test;
using op_test::on_cuda;
using op_test::relative_rms;

struct Case {
  const char* name;
  Config config;
};

inline TrainableModel model_on(Context& gpu, const Config& config, DType dtype) {
  Context cpu(cpu_engine(), 1);
  const TrainableModel host = random_trainable(cpu, config, DType::f32);
  TrainableModel model(config, dtype, gpu.memory());
  model.masters().buffer().upload(host.masters().flat().data);
  model.refresh(gpu);
  return model;
}

class Decoding {
 public:
  Decoding(Context& ctx, const Weights& weights, int64_t num_seqs, int64_t slots,
           DType state_dtype = DType::f32)
      : ctx_(ctx),
        weights_(weights),
        state_(weights.config, slots, state_dtype, ctx.memory()),
        tokens_(DType::i32, {num_seqs}, ctx.memory()),
        logits_(DType::f32, {num_seqs, weights.config.vocab_size}, ctx.memory()),
        hidden_(weights.dtype, {num_seqs, weights.config.d_model}, ctx.memory()) {}

  void put(const std::vector<int32_t>& tokens) { tokens_.upload(tokens.data()); }
  void use_slots(const std::vector<int32_t>& slots) {
    slot_ = OwnedTensor(DType::i32, {static_cast<int64_t>(slots.size())}, ctx_.memory());
    slot_.upload(slots.data());
  }
  void fused() { decode(ctx_, weights_, tokens_, slot_, state_, logits_); }
  void by_ops() {
    step(ctx_, weights_, tokens_, slot_, state_, hidden_);
    krait::logits(ctx_, weights_, hidden_, logits_);
  }
  // (num_seqs, vocab_size), then the last layer's states
  std::vector<double> result() const {
    std::vector<double> all = received(logits_);
    const int64_t last = weights_.config.n_layer - 1;
    for (const Tensor& t : {state_.conv(last), state_.ssm(last)})
      for (const double x : received(t)) all.push_back(x);
    return all;
  }
  std::vector<double> logits() const { return received(logits_); }
  std::vector<std::byte> saved(int64_t slot) const { return state_.save(slot); }

 private:
  std::vector<double> received(const Tensor& t) const {
    const Buffer copy(t.bytes());
    ctx_.memory().download(copy.data(), t.data, t.bytes());
    Tensor on_host = t;
    on_host.data = copy.data();
    return op_test::to_double(on_host);
  }

  Context& ctx_;
  const Weights& weights_;
  DecodeState state_;
  OwnedTensor tokens_, slot_, logits_, hidden_;
};

constexpr int kSteps = 12, kBatchSteps = 4;

inline std::vector<int32_t> tokens_of(int step, int64_t num_seqs, const Config& config) {
  return random_tokens(num_seqs, config.vocab_size, 100 + static_cast<uint64_t>(step));
}

// Not left to the ops, up to four sequences.
inline bool fuses(const Config& c) { return c.d_model % 16 == 0 && c.selective_B; }

// The engine's, counting the steps that it does its own way.
inline int own_steps = 0;
inline Engine counting(const Engine& engine) {
  Engine copy = engine;
  static const Engine* original;
  original = &engine;
  copy.decoder_step = [](Context& ctx, const DecoderStep& op) {
    ++own_steps;
    original->decoder_step(ctx, op);
  };
  return copy;
}

// Distinct, neither ascending nor all there are.
inline std::vector<int32_t> mixed_slots(int64_t num_seqs) {
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < num_seqs; ++i)
    slots.push_back(static_cast<int32_t>(2 * num_seqs - 1 - 2 * i));
  return slots;
}

// Of logits and states over some steps, with states of a type, from those in f32 throughout.
inline void expect_no_further_than_the_ops(Context& gpu, const Case& c, const Weights& f32,
                                           const Weights& bf16, DType state_dtype, int64_t num_seqs,
                                           int steps = kSteps, double limit = 1.2) {
  Decoding truth(gpu, f32, num_seqs, 2 * num_seqs);
  Decoding ops(gpu, bf16, num_seqs, 2 * num_seqs, state_dtype);
  Decoding fused(gpu, bf16, num_seqs, 2 * num_seqs, state_dtype);
  for (Decoding* d : {&truth, &ops, &fused})
    if (num_seqs != 2) d->use_slots(mixed_slots(num_seqs));
  double of_ops = 0, of_fused = 0;
  for (int step = 0; step < steps; ++step) {
    for (Decoding* d : {&truth, &ops, &fused}) d->put(tokens_of(step, num_seqs, c.config));
    truth.by_ops();
    ops.by_ops();
    fused.fused();
    of_ops += relative_rms(ops.result(), truth.result());
    of_fused += relative_rms(fused.result(), truth.result());
  }
  EXPECT_LE(of_fused, limit * of_ops) << c.name << ", " << num_seqs << " sequences";
  EXPECT_GT(of_fused, 0) << c.name;
}

// Neither the other sequences of the batch, nor how many there are, nor the run change a bit. With
// batch_invariant that holds for batches of any size. with_slots: else sequence i has slot i.
inline void expect_bits_of_its_own(Context& gpu, const Case& c, const Weights& weights,
                                   int64_t many, bool with_slots, DType state_dtype) {
  Decoding batch(gpu, weights, many, 2 * many, state_dtype);
  Decoding again(gpu, weights, many, 2 * many, state_dtype);
  std::vector<int32_t> slots = mixed_slots(many);
  if (with_slots) {
    batch.use_slots(slots);
    again.use_slots(slots);
  } else {
    std::iota(slots.begin(), slots.end(), 0);
  }
  std::deque<Decoding> alone;
  for (int64_t i = 0; i < many; ++i) alone.emplace_back(gpu, weights, 1, 1, state_dtype);
  for (int step = 0; step < kSteps; ++step) {
    const std::vector<int32_t> tokens = tokens_of(step, many, c.config);
    for (Decoding* d : {&batch, &again}) {
      d->put(tokens);
      d->fused();
    }
    ASSERT_EQ(batch.result(), again.result()) << c.name << " step " << step;
    const std::vector<double> all = batch.logits();
    for (int64_t i = 0; i < many; ++i) {
      Decoding& one = alone[static_cast<size_t>(i)];
      one.put({tokens[static_cast<size_t>(i)]});
      one.fused();
      const std::vector<double> row(all.begin() + i * c.config.vocab_size,
                                    all.begin() + (i + 1) * c.config.vocab_size);
      ASSERT_EQ(one.logits(), row) << c.name << " step " << step << " sequence " << i;
      ASSERT_EQ(one.saved(0), batch.saved(slots[static_cast<size_t>(i)])) << c.name;
    }
  }
}

// slots: of a batch some of whose rows share the spare slot behind the others. What the others,
// which keep their own, hold is what they hold where no row rests.
inline void expect_rows_at_rest_to_change_no_other(Context& gpu, const Case& c,
                                                   const std::vector<int32_t>& slots) {
  const TrainableModel model = model_on(gpu, c.config, DType::bf16);
  const auto num_seqs = static_cast<int64_t>(slots.size());
  Decoding busy(gpu, model.weights(), num_seqs, num_seqs + 1),
      resting(gpu, model.weights(), num_seqs, num_seqs + 1);
  std::vector<int32_t> all(slots.size());
  std::iota(all.begin(), all.end(), 0);
  busy.use_slots(all);
  resting.use_slots(slots);
  for (int step = 0; step < kSteps; ++step) {
    for (Decoding* d : {&busy, &resting}) {
      d->put(tokens_of(step, num_seqs, c.config));
      d->fused();
    }
    for (const int32_t slot : slots) {
      if (slot == num_seqs) continue;
      ASSERT_EQ(resting.saved(slot), busy.saved(slot)) << c.name << " step " << step;
    }
  }
}

inline void expect_a_replay_to_give_the_same_bits(Context& gpu, const Case& c, int64_t num_seqs) {
  const TrainableModel model = model_on(gpu, c.config, DType::bf16);
  Decoding eager(gpu, model.weights(), num_seqs, num_seqs),
      replayed(gpu, model.weights(), num_seqs, num_seqs);
  Recordings recordings;
  for (int step = 0; step < kSteps; ++step) {
    for (Decoding* d : {&eager, &replayed}) d->put(tokens_of(step, num_seqs, c.config));
    eager.fused();
    recordings.run(gpu, {1}, [&] { replayed.fused(); });
    ASSERT_EQ(replayed.result(), eager.result()) << c.name << " step " << step;
  }
}

}  // namespace krait::decode_test
