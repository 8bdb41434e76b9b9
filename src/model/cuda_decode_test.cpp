// decode(): the engine's own way for a step, where it has one, against the ops one by one: few
// sequences.
#include "model/cuda_decode_test.h"

namespace krait {
namespace {

using namespace decode_test;

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
TEST(DecodeCuda, RowsAtRestChangeNoOther) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases())
      if (fuses(c.config)) expect_rows_at_rest_to_change_no_other(gpu, c, {0, 4, 2, 4});
  });
}

TEST(DecodeCuda, AReplayGivesTheSameBits) {
  on_cuda([](Context& gpu) {
    for (const Case& c : cases()) expect_a_replay_to_give_the_same_bits(gpu, c, 3);
  });
}

}  // namespace
}  // namespace krait
