// Speed of a whole model with random weights, beside what the machine can do at best.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "model/language_model.h"
#include "ops/context.h"

namespace krait {

struct ModelBench {
  Config config;
  DType dtype = DType::bf16;
  Quantization quantization = Quantization::none;  // in inference
  DType state_dtype = DType::f32;                  // in inference
  int64_t batch = 1;                               // sequences that are read and written at once
  int64_t prompt = 512, gen = 64;                  // tokens of each; 0: leave out
  std::vector<int64_t> contexts;                   // also write behind so many tokens
  int64_t train_batch = 0, train_length = 0;       // sequences and their tokens; 0: leave out
  Recompute recompute = Recompute::none;           // in training
  int repeats = 3;
};

// A rate is none where it was left out. floor: the least time the machine could take, as a fraction
// of the time taken; 1 is perfect.
struct ModelBenchResult {
  struct Rate {
    double tokens_per_s = 0, floor = 0;
  };
  std::optional<Rate> prefill, decode, train;
  double first_token_s = 0;    // a prompt and the logits behind it; 0 where there is no prompt
  double steady_token_s = 0;   // a prompt's token in its second half; 0: the prompt is short
  double decode_gb_per_s = 0;  // weights and states, as far as they had to move
  std::vector<double> context_step_s;              // of each context: a step behind it
  double read_gb_per_s = 0, gemm_gflop_per_s = 0;  // measured in the same run
  int64_t peak_bytes = 0;                          // resident, without those measurements
  int64_t device_bytes = 0;                        // of a GPU's memory, with CUDA's own; 0 on a CPU
  int64_t beyond_weights_bytes = 0;                // of these, for prompts and steps
};

ModelBenchResult bench_model(Context& ctx, const ModelBench& bench);

}  // namespace krait
