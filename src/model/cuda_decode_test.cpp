// decode(): the engine's own way for a step, where it has one, against the ops one by one.
#include <algorithm>
#include <deque>
#include <numeric>

#include "model/model_test.h"
#include "ops/cuda_engine.h"
#include "ops/decoder_step.h"
#include "ops/recordings.h"

namespace krait {
namespace {

using namespace model_test;
using op_test::on_cuda;
using op_test::relative_rms;

struct Case {
  const char* name;
  Config config;
};

// Shapes that the GPU's persistent kernel takes, and some that it leaves to the ops.
std::vector<Case> cases() {
  std::vector<Case> all = {{"few channels", make_config(300, 128, 4)},
                           {"130m's width", make_config(1000, 768, 3)},
                           {"more layers than a launch", make_config(70, 128, 67)},
                           // Rows of three and five pieces of the weights' ring.
                           {"odd pieces", make_config(500, 1280, 2)},
                           {"no multiple of eight", small_config()}};
  // On a GPU with up to 180 multiprocessors blocks have more weights than the ring holds: on an
  // H100 tiles of 16 rows and halved ones of 2 in in_proj and out_proj, and rows that end within a
  // piece's second half.
  Config c = make_config(90, 2304, 2);
  c.d_inner = 2208;
  all.push_back({"more than the ring", c});
  c = make_config(333, 256, 3);
  c.tie_embeddings = false;
  c.use_bias = true;
  c.d_inner = 1280;  // not twice d_model
  c.dt_rank = 40;
  all.push_back({"wide, biases", c});
  c = make_config(64, 192, 3);
  c.dt_rank = 24;
  c.d_state = 64;
  c.use_conv_bias = false;
  c.residual_in_fp32 = false;
  all.push_back({"64 states, residual in bf16", c});
  // On a large GPU: blocks without rows of out_proj, several groups of rows in head and, for four
  // sequences, in in_proj, and more states than a block has threads.
  c = make_config(20000, 64, 2);
  c.d_inner = 9216;
  c.dt_rank = 8;
  all.push_back({"many channels, large vocabulary", c});
  // No multiple of 64: rows of weights end within what a warp multiplies at a time.
  c = make_config(200, 208, 3);
  c.dt_rank = 16;
  all.push_back({"208 wide", c});
  c = make_config(50, 128, 2);
  c.selective_B = false;
  all.push_back({"constant B", c});
  return all;
}

// Shapes that the GPU takes many sequences of by a kernel of clusters.
std::vector<Case> cluster_cases() {
  std::vector<Case> all = {{"130m's width", make_config(200, 768, 3)},
                           {"370m's width", make_config(100, 1024, 2)}};
  // Tiles and steps of every product that end early.
  Config c = make_config(90, 384, 3);
  c.d_inner = 1280;
  c.dt_rank = 72;
  c.tie_embeddings = false;
  c.use_bias = true;
  c.residual_in_fp32 = false;
  all.push_back({"uneven, biases, residual in bf16", c});
  c = make_config(60, 128, 4);
  c.d_inner = 256;
  c.dt_rank = 8;
  c.use_conv_bias = false;
  all.push_back({"smallest", c});
  return all;
}

// Shapes that the GPU takes many sequences of by four kernels a layer.
std::vector<Case> kernel_cases() {
  // Inputs that end within a step, boxes that end within the channels, one tile of outputs.
  Config c = make_config(90, 200, 3);
  c.d_inner = 1088;
  c.dt_rank = 32;
  c.tie_embeddings = false;
  c.use_bias = true;
  std::vector<Case> all = {{"uneven, biases", c}};
  c = make_config(70, 1280, 2);
  c.use_conv_bias = false;
  c.residual_in_fp32 = false;
  all.push_back({"wide, residual in bf16", c});
  return all;
}

std::vector<Case> batch_cases() {
  std::vector<Case> all = cluster_cases();
  for (Case& c : kernel_cases()) all.push_back(std::move(c));
  return all;
}

TrainableModel model_on(Context& gpu, const Config& config, DType dtype) {
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

std::vector<int32_t> tokens_of(int step, int64_t num_seqs, const Config& config) {
  return random_tokens(num_seqs, config.vocab_size, 100 + static_cast<uint64_t>(step));
}

// Not left to the ops, up to four sequences.
bool fuses(const Config& c) { return c.d_model % 16 == 0 && c.selective_B; }

// The engine's, counting the steps that it does its own way.
int own_steps = 0;
Engine counting(const Engine& engine) {
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
std::vector<int32_t> mixed_slots(int64_t num_seqs) {
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < num_seqs; ++i)
    slots.push_back(static_cast<int32_t>(2 * num_seqs - 1 - 2 * i));
  return slots;
}

// Of logits and states over some steps, with states of a type, from those in f32 throughout.
void expect_no_further_than_the_ops(Context& gpu, const Case& c, const Weights& f32,
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

// Else the other tests would compare the ops with themselves.
TEST(DecodeCuda, TheEnginesOwnWayIsTaken) {
  on_cuda([](Context& gpu) {
    const Engine engine = counting(gpu.engine());
    Context ctx(engine, 1);
    for (const Case& c : cases())
      for (const Quantization quantization : {Quantization::none, Quantization::int8})
        for (const int64_t num_seqs : {1, 2, 4}) {
          const Model model =
              make_random_model(c.config, DType::bf16, 7, ctx.memory(), quantization);
          Decoding fused(ctx, model.weights, num_seqs, num_seqs);
          fused.put(tokens_of(0, num_seqs, c.config));
          own_steps = 0;
          fused.fused();
          EXPECT_EQ(own_steps, fuses(c.config)) << c.name << ", " << num_seqs << " sequences";
        }
  });
}

TEST(DecodeCuda, IsNoFurtherFromTheTruthThanTheOps) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases()) {
      const TrainableModel f32 = model_on(gpu, c.config, DType::f32),
                           bf16 = model_on(gpu, c.config, DType::bf16);
      for (const DType state_dtype : {DType::f32, DType::bf16})
        for (const int64_t num_seqs : {1, 2, 4})
          expect_no_further_than_the_ops(gpu, c, f32.weights(), bf16.weights(), state_dtype,
                                         num_seqs);
    }
  });
}

// Both ways compute with the same integers.
TEST(DecodeCuda, WithWeightsIn8BitsAsTheOps) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases()) {
      const Model model =
          make_random_model(c.config, DType::bf16, 7, gpu.memory(), Quantization::int8);
      for (const int64_t num_seqs : {1, 3}) {
        Decoding ops(gpu, model.weights, num_seqs, num_seqs);
        Decoding fused(gpu, model.weights, num_seqs, num_seqs);
        for (int step = 0; step < kSteps; ++step) {
          for (Decoding* d : {&ops, &fused}) d->put(tokens_of(step, num_seqs, c.config));
          ops.by_ops();
          fused.fused();
          EXPECT_LE(relative_rms(fused.result(), ops.result()), 0.02) << c.name << " " << step;
        }
      }
    }
  });
}

// Neither the other sequences of the batch, nor how many there are, nor the run change a bit. With
// batch_invariant that holds for batches of any size. with_slots: else sequence i has slot i.
void expect_bits_of_its_own(Context& gpu, const Case& c, const Weights& weights, int64_t many,
                            bool with_slots, DType state_dtype) {
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

TEST(DecodeCuda, ASequencesBitsDependOnNothingElse) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases()) {
      if (!fuses(c.config)) continue;
      const TrainableModel model = model_on(gpu, c.config, DType::bf16);
      for (const DType state_dtype : {DType::f32, DType::bf16})
        expect_bits_of_its_own(gpu, c, model.weights(), 4, /*with_slots=*/true, state_dtype);
    }
  });
}

TEST(DecodeCuda, ASequencesBitsDependOnNothingElseWithWeightsIn8Bits) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases()) {
      if (!fuses(c.config)) continue;
      const Model model =
          make_random_model(c.config, DType::bf16, 7, gpu.memory(), Quantization::int8);
      expect_bits_of_its_own(gpu, c, model.weights, 4, /*with_slots=*/true, DType::f32);
    }
  });
}

TEST(DecodeCuda, BatchInvariantHoldsForManySequences) {
  on_cuda([](Context& gpu) {
    gpu.batch_invariant = true;
    for (const Case& c : cases()) {
      if (!fuses(c.config)) continue;
      const TrainableModel model = model_on(gpu, c.config, DType::bf16);
      expect_bits_of_its_own(gpu, c, model.weights(), 7, /*with_slots=*/false, DType::f32);
    }
  });
}

// Rows without a sequence share a slot.
// slots: of a batch some of whose rows share the spare slot behind the others. What the others,
// which keep their own, hold is what they hold where no row rests.
void expect_rows_at_rest_to_change_no_other(Context& gpu, const Case& c,
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

TEST(DecodeCuda, RowsAtRestChangeNoOther) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases())
      if (fuses(c.config)) expect_rows_at_rest_to_change_no_other(gpu, c, {0, 4, 2, 4});
  });
}

void expect_a_replay_to_give_the_same_bits(Context& gpu, const Case& c, int64_t num_seqs) {
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

TEST(DecodeCuda, AReplayGivesTheSameBits) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases()) expect_a_replay_to_give_the_same_bits(gpu, c, 3);
  });
}

// The kernels of a batch are in code for compute capability 9.0 only.
bool has_batch_kernels() {
  const GpuInfo gpu = list_gpus().at(0);
  return gpu.major == 9 && gpu.minor == 0;
}

// More than the four kernels take; in two passes, too.
TEST(DecodeBatchCuda, ClustersAreTaken) {
  on_cuda([](Context& gpu) {
    const Engine engine = counting(gpu.engine());
    Context ctx(engine, 1);
    for (const Case& c : cluster_cases()) {
      if (c.config.d_model > 768) continue;  // no room for so many
      const Model model = make_random_model(c.config, DType::bf16, 7, ctx.memory());
      for (const int64_t num_seqs : {130, 200}) {
        Decoding fused(ctx, model.weights, num_seqs, num_seqs);
        fused.put(tokens_of(0, num_seqs, c.config));
        own_steps = 0;
        fused.fused();
        EXPECT_EQ(own_steps, has_batch_kernels()) << c.name << ", " << num_seqs << " sequences";
      }
    }
  });
}

// Few sequences' errors spread more.
void expect_batches_no_further_than_the_ops(const std::vector<Case>& cases, int64_t most) {
  on_cuda([&](Context& gpu) {
    for (const Case& c : cases) {
      const TrainableModel f32 = model_on(gpu, c.config, DType::f32),
                           bf16 = model_on(gpu, c.config, DType::bf16);
      const auto expect = [&](DType state_dtype, int64_t num_seqs) {
        expect_no_further_than_the_ops(gpu, c, f32.weights(), bf16.weights(), state_dtype, num_seqs,
                                       kBatchSteps, num_seqs < 64 ? 1.5 : 1.2);
      };
      // Clusters have room for no more of wider models.
      const int64_t many = c.config.d_model == 1024 ? 112 : most;
      for (const int64_t num_seqs : {int64_t{5}, int64_t{110}, many}) expect(DType::f32, num_seqs);
      for (const int64_t num_seqs : {int64_t{33}, many}) expect(DType::bf16, num_seqs);
    }
  });
}
TEST(DecodeBatchCuda, ClustersAreNoFurtherFromTheTruthThanTheOps) {
  expect_batches_no_further_than_the_ops(cluster_cases(), 150);
}
TEST(DecodeBatchCuda, KernelsAreNoFurtherFromTheTruthThanTheOps) {
  expect_batches_no_further_than_the_ops(kernel_cases(), 128);
}

// Nor does it go by the ops.
TEST(DecodeBatchCuda, NeitherPlaceNorSlotNorCompanyChangeABit) {
  on_cuda([](Context& gpu) {
    for (const Case& c : batch_cases()) {
      const TrainableModel model = model_on(gpu, c.config, DType::bf16);
      constexpr int64_t kSeqs = 37, kWidth = kSeqs - 1;
      Decoding batch(gpu, model.weights(), kSeqs, kSeqs), ops(gpu, model.weights(), kSeqs, kSeqs),
          other(gpu, model.weights(), kSeqs, 2 * kSeqs);
      other.use_slots(mixed_slots(kSeqs));
      for (int step = 0; step < kBatchSteps; ++step) {
        std::vector<int32_t> tokens = tokens_of(step, kSeqs, c.config);
        batch.put(tokens);
        ops.put(tokens);
        // Backwards, and one sequence is another.
        std::reverse(tokens.begin(), tokens.end());
        tokens[3] = (tokens[3] + 1) % static_cast<int32_t>(c.config.vocab_size);
        other.put(tokens);
        batch.fused();
        other.fused();
        ops.by_ops();
        const std::vector<double> a = batch.logits(), b = other.logits();
        for (int64_t i = 0; i < kSeqs; ++i) {
          const auto row = [&](const std::vector<double>& all, int64_t r) {
            return std::vector<double>(all.begin() + r * c.config.vocab_size,
                                       all.begin() + (r + 1) * c.config.vocab_size);
          };
          if (i == 3)
            EXPECT_NE(row(b, i), row(a, kWidth - i)) << c.name;
          else
            ASSERT_EQ(row(b, i), row(a, kWidth - i)) << c.name << " step " << step << " row " << i;
        }
        EXPECT_EQ(ops.logits() != a, has_batch_kernels()) << c.name << ": by the ops";
      }
      const std::vector<int32_t> slots = mixed_slots(kSeqs);
      for (int64_t i = 0; i < kSeqs; ++i) {
        if (i == 3) continue;
        ASSERT_EQ(other.saved(slots[static_cast<size_t>(i)]), batch.saved(kWidth - i));
      }
    }
  });
}

// Each pass's sequences have their own tokens, slots and states: as those of one pass that are cut
// into clusters alike.
TEST(DecodeBatchCuda, PassesAreStepsOfTheirOwn) {
  on_cuda([](Context& gpu) {
    if (!has_batch_kernels()) return;
    const Case c = {"130m's width", make_config(200, 768, 3)};
    const TrainableModel model = model_on(gpu, c.config, DType::bf16);
    constexpr int64_t kSeqs = 330, kHalf = kSeqs / 2;
    for (const bool with_slots : {false, true}) {
      Decoding both(gpu, model.weights(), kSeqs, 2 * kSeqs);
      std::vector<int32_t> slots(kSeqs);
      std::iota(slots.begin(), slots.end(), 0);
      if (with_slots) both.use_slots(slots = mixed_slots(kSeqs));
      std::deque<Decoding> halves;
      for (int i = 0; i < 2; ++i) halves.emplace_back(gpu, model.weights(), kHalf, kHalf);
      for (int step = 0; step < kBatchSteps; ++step) {
        const std::vector<int32_t> tokens = tokens_of(step, kSeqs, c.config);
        both.put(tokens);
        both.fused();
        for (int64_t i = 0; i < 2; ++i) {
          Decoding& half = halves[static_cast<size_t>(i)];
          half.put({tokens.begin() + i * kHalf, tokens.begin() + (i + 1) * kHalf});
          half.fused();
          for (int64_t s = 0; s < kHalf; ++s)
            ASSERT_EQ(half.saved(s), both.saved(slots[static_cast<size_t>(i * kHalf + s)]))
                << "step " << step << ", sequence " << i * kHalf + s << ", slots " << with_slots;
        }
      }
    }
  });
}

// Whichever way takes them takes one sequence, too.
TEST(DecodeBatchCuda, BatchInvariantHoldsForAnyNumber) {
  on_cuda([](Context& gpu) {
    gpu.batch_invariant = true;
    for (const Case& c : batch_cases()) {
      const TrainableModel model = model_on(gpu, c.config, DType::bf16);
      expect_bits_of_its_own(gpu, c, model.weights(), 70, /*with_slots=*/true, DType::f32);
      expect_bits_of_its_own(gpu, c, model.weights(), 21, /*with_slots=*/false, DType::bf16);
    }
  });
}

// More than a way takes at a time: the others come behind them.
TEST(DecodeBatchCuda, BatchInvariantHoldsForMoreThanAtATime) {
  on_cuda([](Context& gpu) {
    gpu.batch_invariant = true;
    constexpr int64_t kMany = 300, kFew = 60;
    for (const Case& c : {cluster_cases().front(), kernel_cases().front()})
      for (const bool with_slots : {false, true}) {
        const TrainableModel model = model_on(gpu, c.config, DType::bf16);
        Decoding all(gpu, model.weights(), kMany, 2 * kMany);
        std::vector<int32_t> slots = mixed_slots(kMany);
        if (with_slots) all.use_slots(slots);
        std::deque<Decoding> parts;
        for (int64_t i = 0; i < kMany; i += kFew)
          parts.emplace_back(gpu, model.weights(), kFew, kFew);
        for (int step = 0; step < kBatchSteps; ++step) {
          const std::vector<int32_t> tokens = tokens_of(step, kMany, c.config);
          all.put(tokens);
          all.fused();
          std::vector<double> logits;
          for (size_t i = 0; i < parts.size(); ++i) {
            const auto begin = tokens.begin() + static_cast<int64_t>(i) * kFew;
            parts[i].put({begin, begin + kFew});
            parts[i].fused();
            const std::vector<double> more = parts[i].logits();
            logits.insert(logits.end(), more.begin(), more.end());
          }
          ASSERT_EQ(all.logits(), logits) << c.name << " step " << step;
        }
      }
  });
}

TEST(DecodeBatchCuda, RowsAtRestChangeNoOther) {
  on_cuda([](Context& gpu) {
    for (const Case& c : batch_cases())
      expect_rows_at_rest_to_change_no_other(gpu, c, {0, 9, 2, 9, 9, 5, 9, 7, 9});
  });
}

TEST(DecodeBatchCuda, AReplayGivesTheSameBits) {
  on_cuda([](Context& gpu) {
    for (const Case& c : batch_cases()) expect_a_replay_to_give_the_same_bits(gpu, c, 50);
  });
}

}  // namespace
}  // namespace krait
