// Times of reading prompts and of writing tokens, several sequences at once.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "bench_model.h"

namespace krait {

struct InferenceTimes {
  double prefill = 0;                // seconds for all prompts
  double first_token = 0;            // the same with the logits behind each prompt
  double decode = 0;                 // for all steps
  double steady_token = 0;           // for a token of the second half of the prompts; 0: too short
  std::vector<double> context_step;  // for a step behind each context
  int64_t device_bytes = 0;          // of a GPU's memory that were taken
  int64_t beyond_weights = 0;        // of these, not by the weights
};

InferenceTimes time_inference(Context& ctx, const ModelBench& bench);

// What bench_model.cpp shares.
double seconds_of(const std::function<void()>& work);
// Of several runs after warming up: on a CPU the best, since others disturb it; on a GPU the
// median, since its clock varies, after three runs (plans, recordings, clock), or a second of them.
double time_of(Context& ctx, int repeats, const std::function<void()>& work);
int64_t device_bytes(const Context& ctx);  // of the GPU's memory that are taken; 0 on a CPU
std::vector<int32_t> some_tokens(const Config& config, int64_t count);

}  // namespace krait
