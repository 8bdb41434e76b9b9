#include "bench_model.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "generate/generator.h"
#include "ops/cuda_engine.h"
#include "ops/machine.h"
#include "train/learner.h"

namespace krait {
namespace {

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Of several runs after warming up: on a CPU the best, since others disturb it; on a GPU the
// median, since its clock varies, after three runs (plans, recordings, clock).
double time_of(Context& ctx, int repeats, const std::function<void()>& work) {
  const bool host = ctx.memory().on_host();
  const auto run = [&] {
    work();
    ctx.engine().synchronize(ctx);
  };
  for (int i = 0; i < (host ? 1 : 3); ++i) run();
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) seconds.push_back(seconds_of(run));
  std::sort(seconds.begin(), seconds.end());
  return seconds[host ? 0 : seconds.size() / 2];
}

// Bytes of the GPU's memory that are taken; 0 on a CPU.
int64_t device_bytes(const Context& ctx) {
  if (ctx.memory().on_host()) return 0;
  const GpuInfo gpu = list_gpus().at(0);
  return gpu.total_bytes - gpu.free_bytes;
}

// Elements of all matrices that every token is multiplied with, and of the head.
struct MatrixSizes {
  double blocks = 0, head = 0;
};

MatrixSizes matrix_sizes(const Config& config) {
  MatrixSizes sizes;
  for (const ParameterInfo& p : parameter_table(config))
    if (p.matrix && p.layer >= 0) sizes.blocks += static_cast<double>(p.size());
  sizes.head = static_cast<double>(config.vocab_size) * static_cast<double>(config.d_model);
  return sizes;
}

// Bytes that a decoding step must read: every parameter and every scale once, of the embedding,
// where it is not the head as well, one row.
double bytes_per_step(const ModelBench& bench) {
  Config config = bench.config;
  if (bench.quantization != Quantization::none) config.tie_embeddings = false;
  Parameters names = empty_parameters(config);
  double bytes = 0;
  for (const ParameterInfo& p : parameter_table(config)) {
    if (p.name == "backbone.embeddings.weight" && !config.tie_embeddings) continue;
    DType dtype = p.matrix ? bench.dtype : DType::f32;
    if (bench.quantization != Quantization::none && scale_of(p, names)) {
      dtype = DType::i8;
      bytes += static_cast<double>(p.shape[0]) * sizeof(float);
    }
    bytes += static_cast<double>(p.size()) * static_cast<double>(size_of(dtype));
  }
  return bytes + 2 * static_cast<double>(config.state_bytes_per_sequence());
}

std::vector<int32_t> some_tokens(const Config& config, int64_t count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  Rng rng(1);
  for (int32_t& t : tokens)
    t = static_cast<int32_t>(rng.below(static_cast<uint64_t>(config.vocab_size)));
  return tokens;
}

struct Times {
  double prefill = 0, decode = 0, train = 0;  // seconds
  int64_t device_bytes = 0;                   // most that was taken
};

void time_inference(Context& ctx, const ModelBench& bench, Times& times) {
  Model model = make_random_model(bench.config, bench.dtype, 0, bench.quantization);
  if (!ctx.memory().on_host()) model = copy_model(model, ctx.memory());
  const Tokenizer tokenizer = Tokenizer::bytes();
  Generator generator(ctx, model.weights, tokenizer);
  // The generator keeps the last token back: with one more, `prompt` tokens go through.
  const std::vector<int32_t> prompt = some_tokens(bench.config, bench.prompt + 1);
  times.prefill = time_of(ctx, bench.repeats, [&] {
    generator.reset();
    generator.feed(prompt);
  });
  times.device_bytes = device_bytes(ctx);
  if (bench.gen == 0) return;
  GenerateOptions options;
  options.max_tokens = bench.gen;
  options.sampling.temperature = 0;
  options.ignore_eos = options.any_token = true;
  times.decode = time_of(ctx, bench.repeats, [&] { generator.generate(options); });
}

void time_training(Context& ctx, const ModelBench& bench, Times& times) {
  Learner learner(ctx.engine(), bench.config,
                  {.dtype = bench.dtype, .threads = ctx.threads(), .recompute = bench.recompute});
  learner.initialize(1);
  Batch batch;
  const int64_t count = bench.train_batch * bench.train_length;
  batch.tokens = some_tokens(bench.config, count);
  batch.targets = some_tokens(bench.config, count);
  for (int64_t i = 0; i <= bench.train_batch; ++i)
    batch.seq_start.push_back(static_cast<int32_t>(i * bench.train_length));
  batch.target_count = count;
  // On a GPU several steps, each queued while the one before it runs, as in training.
  const int64_t steps = ctx.memory().on_host() ? 1 : 5;
  int64_t step = 0;
  times.train = time_of(learner.context(), bench.repeats, [&] {
    for (int64_t i = 0; i < steps; ++i) {
      learner.accumulate(batch, 1.0 / static_cast<double>(count), nullptr);
      learner.update({}, 1e-4, ++step);
      if (learner.in_flight() == Learner::kMaxInFlight || steps == 1) learner.collect();
    }
    while (learner.in_flight() > 0) learner.collect();
  });
  times.train /= static_cast<double>(steps);
  times.device_bytes = std::max(times.device_bytes, device_bytes(ctx));
}

int64_t peak_resident_bytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

}  // namespace

ModelBenchResult bench_model(Context& ctx, const ModelBench& bench) {
  Times times;
  if (bench.prompt > 0 || bench.gen > 0) time_inference(ctx, bench, times);
  if (bench.train_batch > 0) time_training(ctx, bench, times);
  ModelBenchResult result;
  result.peak_bytes = peak_resident_bytes();
  result.device_bytes = times.device_bytes;
  result.read_gb_per_s = measure_read_bandwidth(ctx);
  result.gemm_gflop_per_s = measure_gemm_rate(ctx, bench.dtype);

  const MatrixSizes sizes = matrix_sizes(bench.config);
  const double gemm = result.gemm_gflop_per_s * 1e9;
  if (bench.prompt > 0) {  // no logits are computed while a prompt is read
    const double tokens = static_cast<double>(bench.prompt);
    result.prefill = {tokens / times.prefill, 2 * sizes.blocks * tokens / gemm / times.prefill};
  }
  if (bench.gen > 0) {
    const double tokens = static_cast<double>(bench.gen);
    const double floor = bytes_per_step(bench) / (result.read_gb_per_s * 1e9) * tokens;
    result.decode = {tokens / times.decode, floor / times.decode};
  }
  if (bench.train_batch > 0) {
    const double tokens = static_cast<double>(bench.train_batch * bench.train_length);
    result.train = {tokens / times.train,
                    6 * (sizes.blocks + sizes.head) * tokens / gemm / times.train};
  }
  return result;
}

}  // namespace krait
