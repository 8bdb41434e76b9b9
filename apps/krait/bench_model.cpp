#include "bench_model.h"

#include <sys/resource.h>

#include <algorithm>

#include "bench_inference.h"
#include "ops/machine.h"
#include "train/learner.h"

namespace krait {
namespace {

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

// Bytes that a decoding step must move: every parameter and every scale is read once, of the
// embedding, where it is not the head as well, a row for each sequence; every sequence's state is
// read and written.
double bytes_per_step(const ModelBench& bench) {
  Config config = bench.config;
  if (bench.quantization != Quantization::none) config.tie_embeddings = false;
  Parameters names = empty_parameters(config);
  double bytes = 0;
  for (const ParameterInfo& p : parameter_table(config)) {
    const bool rows = p.name == "backbone.embeddings.weight" && !config.tie_embeddings;
    DType dtype = p.matrix ? bench.dtype : DType::f32;
    if (bench.quantization != Quantization::none && scale_of(p, names)) {
      dtype = DType::i8;
      bytes += static_cast<double>(p.shape[0]) * sizeof(float);
    }
    bytes += static_cast<double>(rows ? bench.batch * config.d_model : p.size()) *
             static_cast<double>(size_of(dtype));
  }
  return bytes +
         2 * static_cast<double>(bench.batch * config.state_bytes_per_sequence(bench.state_dtype));
}

// Seconds of a step; device_bytes: the most that was taken of a GPU's memory.
double time_training(Context& ctx, const ModelBench& bench, int64_t& device) {
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
  const double seconds = time_of(learner.context(), bench.repeats, [&] {
    for (int64_t i = 0; i < steps; ++i) {
      learner.accumulate(batch, 1.0 / static_cast<double>(count), nullptr);
      learner.update({}, 1e-4, ++step);
      if (learner.in_flight() == Learner::kMaxInFlight || steps == 1) learner.collect();
    }
    while (learner.in_flight() > 0) learner.collect();
  });
  device = std::max(device, device_bytes(ctx));
  return seconds / static_cast<double>(steps);
}

int64_t peak_resident_bytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

}  // namespace

ModelBenchResult bench_model(Context& ctx, const ModelBench& bench) {
  InferenceTimes times;
  double train = 0;
  if (bench.prompt > 0 || bench.gen > 0) times = time_inference(ctx, bench);
  if (bench.train_batch > 0) train = time_training(ctx, bench, times.device_bytes);
  ModelBenchResult result;
  result.peak_bytes = peak_resident_bytes();
  result.device_bytes = times.device_bytes;
  result.beyond_weights_bytes = times.beyond_weights;
  result.read_gb_per_s = measure_read_bandwidth(ctx);
  result.gemm_gflop_per_s = measure_gemm_rate(ctx, bench.dtype);

  const MatrixSizes sizes = matrix_sizes(bench.config);
  const double gemm = result.gemm_gflop_per_s * 1e9;
  if (bench.prompt > 0) {  // no logits are computed while a prompt is read
    const double tokens = static_cast<double>(bench.batch * bench.prompt);
    result.prefill = {tokens / times.prefill, 2 * sizes.blocks * tokens / gemm / times.prefill};
    result.first_token_s = times.first_token;
    result.steady_token_s = times.steady_token;
  }
  if (bench.gen > 0) {
    const double bytes = bytes_per_step(bench) * static_cast<double>(bench.gen) / times.decode;
    result.decode = {static_cast<double>(bench.batch * bench.gen) / times.decode,
                     bytes / (result.read_gb_per_s * 1e9)};
    result.decode_gb_per_s = bytes * 1e-9;
    result.context_step_s = times.context_step;
  }
  if (bench.train_batch > 0) {
    const double tokens = static_cast<double>(bench.train_batch * bench.train_length);
    result.train = {tokens / train, 6 * (sizes.blocks + sizes.head) * tokens / gemm / train};
  }
  return result;
}

}  // namespace krait
