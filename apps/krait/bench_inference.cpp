#include "bench_inference.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <limits>

#include "bench_prompts.h"
#include "core/rng.h"
#include "generate/decode_batch.h"
#include "ops/cuda_engine.h"

namespace krait {
namespace {

// Returns the state behind the first prompt.
std::vector<std::byte> time_prompts(Context& ctx, const Weights& w, const ModelBench& bench,
                                    InferenceTimes& times) {
  constexpr int64_t kSteadyChunks = 4;
  DecodeState state(bench.config, bench.batch, bench.state_dtype, ctx.memory());
  const OwnedTensor out(DType::f32, {bench.batch, bench.config.vocab_size}, ctx.memory());
  Prompts prompts(ctx, w, bench);
  const int64_t chunks = prompts.chunks();
  times.prefill = time_of(ctx, bench.repeats, [&] { prompts.read(state, 0, chunks); });
  times.first_token = time_of(ctx, bench.repeats, [&] {
    prompts.read(state, 0, chunks);
    logits(ctx, w, prompts.last_hidden(), out);
  });
  if (chunks >= kSteadyChunks) {
    const int64_t half = chunks / 2;
    const double seconds = time_of(ctx, bench.repeats, [&] { prompts.read(state, half, chunks); });
    times.steady_token =
        seconds / static_cast<double>((bench.prompt - prompts.tokens_before(half)) * bench.batch);
  }
  return state.save(0);
}

// Greedy, as the generator writes: the host reads what was picked behind the engine.
class Writing {
 public:
  // prompt: the state that all sequences go on from; empty: zero.
  Writing(Context& ctx, const Weights& w, const ModelBench& bench,
          const std::vector<std::byte>& prompt)
      : batch_(ctx, w, bench.state_dtype) {
    if (!prompt.empty()) batch_.state().restore(0, prompt);
    batch_.reserve(bench.batch, /*recent=*/1);
    SamplingParams greedy;
    greedy.temperature = 0;
    const DecodeBatch::Sequence sequence = {
        sampled_sequence(greedy, std::numeric_limits<int64_t>::max()), {}};
    batch_.start(std::vector(static_cast<size_t>(bench.batch), sequence), /*token=*/0,
                 /*rewinds=*/false);
  }

  void write(int64_t steps) {
    for (int64_t i = 0; i < steps; ++i) {
      if (batch_.in_flight() == batch_.max_in_flight()) batch_.read_step();
      batch_.queue_step();
    }
    while (batch_.in_flight() > 0) batch_.read_step();
  }

 private:
  DecodeBatch batch_;
};

// The best of several times; on a GPU, where they are not disturbed by others but by its clock, the
// median.
double typical(const Context& ctx, std::vector<double>& seconds) {
  std::sort(seconds.begin(), seconds.end());
  return seconds[ctx.memory().on_host() ? 0 : seconds.size() / 2];
}

// Of a step behind each context. They take turns, for a GPU's clock varies by more than they may
// differ.
std::vector<double> time_contexts(Context& ctx, const Weights& w, const ModelBench& bench) {
  std::deque<Writing> writings;
  for (const int64_t context : bench.contexts) {
    ModelBench read = bench;
    read.prompt = context;
    DecodeState state(bench.config, bench.batch, bench.state_dtype, ctx.memory());
    Prompts prompts(ctx, w, read);
    prompts.read(state, 0, prompts.chunks());
    writings.emplace_back(ctx, w, bench, state.save(0));
  }
  std::vector<std::vector<double>> seconds(writings.size());
  constexpr int kWarmUp = 3;
  for (int turn = -kWarmUp; turn < bench.repeats; ++turn)
    for (size_t i = 0; i < writings.size(); ++i) {
      const double s = seconds_of([&] { writings[i].write(bench.gen); });
      if (turn >= 0) seconds[i].push_back(s / static_cast<double>(bench.gen));
    }
  std::vector<double> steps;
  for (std::vector<double>& s : seconds) steps.push_back(typical(ctx, s));
  return steps;
}

}  // namespace

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double time_of(Context& ctx, int repeats, const std::function<void()>& work) {
  const bool host = ctx.memory().on_host();
  const auto run = [&] {
    work();
    ctx.engine().synchronize(ctx);
  };
  double warming = 0;
  for (int i = 0; i < (host ? 1 : 3) && warming < 1; ++i) warming += seconds_of(run);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) seconds.push_back(seconds_of(run));
  return typical(ctx, seconds);
}

int64_t device_bytes(const Context& ctx) {
  if (ctx.memory().on_host()) return 0;
  const GpuInfo gpu = list_gpus().at(0);
  return gpu.total_bytes - gpu.free_bytes;
}

std::vector<int32_t> some_tokens(const Config& config, int64_t count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  Rng rng(1);
  for (int32_t& t : tokens)
    t = static_cast<int32_t>(rng.below(static_cast<uint64_t>(config.vocab_size)));
  return tokens;
}

InferenceTimes time_inference(Context& ctx, const ModelBench& bench) {
  InferenceTimes times;
  const Model model =
      make_random_model(bench.config, bench.dtype, /*seed=*/0, ctx.memory(), bench.quantization);
  const int64_t with_weights = device_bytes(ctx);
  std::vector<std::byte> prompt;
  if (bench.prompt > 0) prompt = time_prompts(ctx, model.weights, bench, times);
  if (bench.gen > 0) {
    Writing writing(ctx, model.weights, bench, prompt);
    times.decode = time_of(ctx, bench.repeats, [&] { writing.write(bench.gen); });
    times.context_step = time_contexts(ctx, model.weights, bench);
  }
  times.device_bytes = device_bytes(ctx);
  times.beyond_weights = times.device_bytes - with_weights;
  return times;
}

}  // namespace krait
