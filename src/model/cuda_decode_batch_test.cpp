// decode(): the engine's own ways for a step of many sequences.
#include <algorithm>

#include "model/cuda_decode_test.h"

namespace krait {
namespace {

using namespace decode_test;

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
