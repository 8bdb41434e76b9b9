// krait bench: how fast the model and the single ops are, beside the machine's floors.
#include <charconv>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "bench_model.h"
#include "bench_parity.h"
#include "command.h"
#include "model/parameters.h"
#include "ops/op_bench.h"

namespace krait {
namespace {

constexpr int64_t kTrainedByDefault = 200'000'000;  // parameters; larger ones only when asked for

struct ModelBenchFlags {
  ComputeFlags compute;
  std::string size = "130m", config, train, recompute = "none";
  ModelBench bench;
  bool check = false, json = false;
};

// The published sizes, one that trains quickly on a CPU, and one of a large model's shape.
Config named_config(const std::string& size) {
  if (size == "10m") return make_config(256, 384, 10);
  if (size == "6.9b") return make_config(50280, 4096, 64);
  return preset(size);
}

CLI::Option* add_size(CLI::App& command, std::string& size) {
  return command.add_option("--size", size, "10m, 130m, 370m, 790m, 1.4b, 2.8b or 6.9b")
      ->check(CLI::IsMember({"10m", "130m", "370m", "790m", "1.4b", "2.8b", "6.9b"}))
      ->capture_default_str();
}

// "BxL": sequences and their length.
void parse_train(const std::string& text, ModelBench& bench) {
  const char* const end = text.data() + text.size();
  const auto [x, error] = std::from_chars(text.data(), end, bench.train_batch);
  if (error == std::errc() && x != end && *x == 'x') {
    const auto [last, error2] = std::from_chars(x + 1, end, bench.train_length);
    if (error2 == std::errc() && last == end && bench.train_batch > 0 && bench.train_length > 0 &&
        bench.train_batch <= (int64_t{1} << 24) / bench.train_length)
      return;
  }
  if (text == "0") return;
  throw UsageError(
      "--train: expected sequences x tokens, e.g. 8x512, at most 2^24 tokens in all, or 0; got " +
      text);
}

nlohmann::ordered_json rate_json(const std::optional<ModelBenchResult::Rate>& rate) {
  return rate ? nlohmann::ordered_json(rate->tokens_per_s) : nlohmann::ordered_json(nullptr);
}

nlohmann::ordered_json optional_json(double value) {  // 0: not measured
  return value > 0 ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
}

nlohmann::ordered_json in_microseconds(const std::vector<double>& seconds) {
  auto out = nlohmann::ordered_json::array();
  for (const double s : seconds) out.push_back(s * 1e6);
  return out;
}

void print_rate(const char* name, const std::optional<ModelBenchResult::Rate>& rate,
                const char* of_what) {
  if (!rate) return;
  char line[128];
  std::snprintf(line, sizeof line, "%-9s %10.1f tokens/s   %3.0f %% of %s\n", name,
                rate->tokens_per_s, 100 * rate->floor, of_what);
  write_stdout(line);
}

nlohmann::ordered_json parity_json(const std::optional<ModelParity>& parity) {
  if (!parity) return nullptr;
  const auto value = [](const std::optional<double>& error) {
    return error ? nlohmann::ordered_json(*error) : nlohmann::ordered_json(nullptr);
  };
  return {{"prompt", value(parity->prompt)},
          {"decode", value(parity->decode)},
          {"loss", value(parity->loss)},
          {"gradients", value(parity->gradients)}};
}

void print_parity(const ModelParity& parity) {
  char line[80];
  for (const auto& [name, error] : {std::pair{"prompt", parity.prompt},
                                    {"decode", parity.decode},
                                    {"loss", parity.loss},
                                    {"gradients", parity.gradients}}) {
    if (!error) continue;
    std::snprintf(line, sizeof line, "%-9s %10.1e relative error\n", name, *error);
    write_stdout(line);
  }
}

int run(ModelBenchFlags flags) {
  ModelBench& bench = flags.bench;
  bench.config = flags.config.empty() ? named_config(flags.size) : read_config(flags.config);
  bench.dtype = flags.compute.weights_dtype().value_or(DType::bf16);
  bench.quantization = flags.compute.quantization();
  bench.state_dtype = flags.compute.states_dtype();
  if (!flags.train.empty())
    parse_train(flags.train, bench);
  else if (bench.quantization == Quantization::none &&
           parameter_count(bench.config) < kTrainedByDefault)
    parse_train("1x512", bench);
  if (bench.train_batch > 0 && bench.quantization != Quantization::none)
    throw UsageError("--train: a quantized model is not trained");
  if (!bench.contexts.empty() && bench.gen == 0)
    throw UsageError("--contexts: needs --gen, the tokens to write behind each");
  bench.recompute = recompute_from_name(flags.recompute);
  const std::unique_ptr<Context> ctx = flags.compute.make_context();
  std::optional<ModelParity> parity;
  if (flags.check) parity = model_parity(*flags.compute.make_context(), bench);
  const ModelBenchResult r = bench_model(*ctx, bench);
  if (flags.json) {
    const auto share = [](const auto& rate) {
      return rate ? nlohmann::ordered_json(rate->floor) : nlohmann::ordered_json(nullptr);
    };
    print_json({{"parameters", parameter_count(bench.config)},
                {"dtype", name_of(bench.dtype)},
                {"quantize", name_of(bench.quantization)},
                {"state_dtype", name_of(bench.state_dtype)},
                {"device", ctx->engine().name},
                {"threads", ctx->threads()},
                {"prefill_tokens_per_s", rate_json(r.prefill)},
                {"decode_tokens_per_s", rate_json(r.decode)},
                {"batch", bench.batch},
                {"first_token_ms", optional_json(r.first_token_s * 1e3)},
                {"steady_us_per_token", optional_json(r.steady_token_s * 1e6)},
                {"decode_gb_per_s", optional_json(r.decode_gb_per_s)},
                {"contexts", bench.contexts},
                {"context_step_us", in_microseconds(r.context_step_s)},
                {"beyond_weights_bytes", r.beyond_weights_bytes},
                {"train_tokens_per_s", rate_json(r.train)},
                {"read_gb_per_s", r.read_gb_per_s},
                {"gemm_gflop_per_s", r.gemm_gflop_per_s},
                {"peak_bytes", r.peak_bytes},
                {"device_bytes", r.device_bytes},
                {"prefill_of_gemm", share(r.prefill)},
                {"decode_of_read", share(r.decode)},
                {"train_of_gemm", share(r.train)},
                {"error", parity_json(parity)}});
    return 0;
  }
  char line[160];
  const bool quantized = bench.quantization != Quantization::none;
  const bool states = bench.prompt > 0 || bench.gen > 0;
  std::snprintf(line, sizeof line, "%lld parameters, %s%s%s%s%s, %s, %d threads\n",
                static_cast<long long>(parameter_count(bench.config)), name_of(bench.dtype),
                quantized ? " with weights in " : "", quantized ? name_of(bench.quantization) : "",
                states ? ", states in " : "", states ? name_of(bench.state_dtype) : "",
                ctx->engine().name, ctx->threads());
  write_stdout(line);
  if (parity) print_parity(*parity);
  print_rate("prefill", r.prefill, "the GEMM rate");
  if (r.first_token_s > 0) {
    std::snprintf(line, sizeof line, "          %10.3f ms to the first token\n",
                  r.first_token_s * 1e3);
    write_stdout(line);
  }
  if (r.steady_token_s > 0) {
    std::snprintf(line, sizeof line, "          %10.3f us a token in the prompt's second half\n",
                  r.steady_token_s * 1e6);
    write_stdout(line);
  }
  print_rate("decode", r.decode, "the read bandwidth");
  if (r.decode) {
    std::snprintf(line, sizeof line, "          %10.1f GB/s\n", r.decode_gb_per_s);
    write_stdout(line);
  }
  for (size_t i = 0; i < r.context_step_s.size(); ++i) {
    std::snprintf(line, sizeof line, "          %10.1f us a step behind %lld tokens\n",
                  r.context_step_s[i] * 1e6, static_cast<long long>(bench.contexts[i]));
    write_stdout(line);
  }
  print_rate("training", r.train, "the GEMM rate");
  std::snprintf(line, sizeof line,
                "machine   %.1f GB/s read, %.0f GFLOP/s %s GEMM\npeak      %.0f MiB resident\n",
                r.read_gb_per_s, r.gemm_gflop_per_s, name_of(bench.dtype),
                static_cast<double>(r.peak_bytes) / (1 << 20));
  write_stdout(line);
  if (r.device_bytes > 0) {
    std::snprintf(line, sizeof line, "          %.2f GiB of the GPU, %.2f of them beyond weights\n",
                  static_cast<double>(r.device_bytes) / (1 << 30),
                  static_cast<double>(r.beyond_weights_bytes) / (1 << 30));
    write_stdout(line);
  }
  return 0;
}

void add_model_bench(CLI::App& bench, CommandList& out) {
  CLI::App* const command = bench.add_subcommand("model", "A whole model with random weights");
  const auto flags = std::make_shared<ModelBenchFlags>();
  CLI::Option* const size = add_size(*command, flags->size);
  command->add_option("--config", flags->config, "Instead, the shape of the model in this folder")
      ->excludes(size);
  command->add_option("--batch", flags->bench.batch, "Sequences to read and write at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--prompt", flags->bench.prompt, "Tokens to read of each; 0: leave out")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command->add_option("--gen", flags->bench.gen, "Tokens to write of each; 0: leave out")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command
      ->add_option("--contexts", flags->bench.contexts,
                   "Also how long one of --gen steps takes behind so many tokens; several, "
                   "e.g. 1024,65536, are measured in turns")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 24));
  command->add_option("--train", flags->train,
                      "Training step: sequences x tokens, e.g. 8x512; 0: leave out "
                      "(without it 1x512 for models below 200m)");
  command
      ->add_option("--recompute", flags->recompute,
                   "Train with less memory, activations are computed again: none, light or full")
      ->check(CLI::IsMember({"none", "light", "full"}))
      ->capture_default_str();
  command->add_flag("--check", flags->check,
                    "Compare first, on the same shapes, with the CPU's results (on a CPU: with the "
                    "reference's) for the first and last sequences");
  command
      ->add_option("--repeats", flags->bench.repeats,
                   "The best of so many runs (on a GPU: their median)")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  flags->compute.add_to(*command);
  flags->compute.add_inference_to(*command);
  command->add_flag("--json", flags->json, "Print one JSON object");
  out.push_back({command, [flags] { return run(*flags); }});
}

struct OpBenchFlags {
  ComputeFlags compute;
  std::string op = "all", size = "130m";
  int64_t prompt = 512, sequences = 1, d_inner = 0, d_state = 0;
  std::vector<std::string> shapes;  // instead of these four
  bool check = false, json = false;
};

// "SxDxL" or "SxDxLxN": sequences, d_inner, tokens of each and d_state.
OpShape parse_shape(const std::string& text, OpShape shape) {
  std::vector<int64_t> extents;
  const char *at = text.data(), *const end = at + text.size();
  for (bool more = true; more;) {
    int64_t extent = 0;
    const auto [rest, error] = std::from_chars(at, end, extent);
    if (error != std::errc() || extent < 1 || extent > (int64_t{1} << 24)) break;
    extents.push_back(extent);
    more = rest != end && *rest == 'x';
    at = rest + (more ? 1 : 0);
  }
  const size_t count = extents.size();
  if (at != end || (count != 3 && count != 4) || extents[0] > (int64_t{1} << 31) / extents[2] ||
      (count == 4 && extents[3] > kMaxDState))
    throw UsageError(
        "--shapes: expected sequences x d_inner x tokens [x d_state], e.g. 8x1536x2048; "
        "got " +
        text);
  shape.num_seqs = extents[0], shape.d_inner = extents[1], shape.tokens = extents[0] * extents[2];
  if (count == 4) shape.d_state = extents[3];
  return shape;
}

std::vector<OpShape> shapes_of(const OpBenchFlags& flags) {
  const Config c = named_config(flags.size);
  OpShape shape;
  shape.tokens = flags.prompt;
  shape.num_seqs = flags.sequences;
  shape.d_model = c.d_model;
  shape.d_inner = flags.d_inner > 0 ? flags.d_inner : c.d_inner;
  shape.d_state = flags.d_state > 0 ? flags.d_state : c.d_state;
  shape.d_conv = c.d_conv;
  shape.dt_rank = c.dt_rank;
  shape.vocab_size = c.vocab_size;
  shape.dtype = flags.compute.weights_dtype().value_or(DType::f32);
  if (flags.prompt % flags.sequences != 0)
    throw UsageError("--prompt must be a multiple of --sequences");
  if (flags.shapes.empty()) return {shape};
  std::vector<OpShape> shapes;
  for (const std::string& text : flags.shapes) shapes.push_back(parse_shape(text, shape));
  return shapes;
}

int run_op(const OpBenchFlags& flags) {
  if (!flags.shapes.empty() && flags.op != "selective_scan" && flags.op != "causal_conv1d" &&
      flags.op != "all")
    throw UsageError("--shapes: for selective_scan and causal_conv1d");
  if (flags.check && flags.op != "selective_scan" && flags.op != "causal_conv1d")
    throw UsageError("--check: for selective_scan and causal_conv1d");
  const std::vector<OpShape> shapes = shapes_of(flags);
  const std::unique_ptr<Context> ctx = flags.compute.make_context();
  auto rows = nlohmann::ordered_json::array();
  char line[200];
  if (!flags.json)
    write_stdout(
        "op               pass  shape                    dtype        ms     GB/s  TFLOP/s  floor "
        "ms "
        "% of floor\n");
  bench_op(*ctx, flags.op, shapes, flags.check, [&](const OpTime& t) {
    if (flags.json) {
      rows.push_back({{"op", t.op},
                      {"pass", t.pass},
                      {"shape", t.shape},
                      {"dtype", t.dtype},
                      {"ms", t.ms},
                      {"floor_ms", t.floor_ms},
                      {"gb_per_s", t.gb_per_s},
                      {"tflop_per_s", t.tflop_per_s},
                      {"bound", t.bound}});
      if (t.error) rows.back()["error"] = *t.error;
      return;
    }
    std::snprintf(line, sizeof line, "%-16s %-5s %-24s %-5s %9.4f %8.0f %8.2f %9.4f %5.0f (%s)",
                  t.op.c_str(), t.pass.c_str(), t.shape.c_str(), t.dtype.c_str(), t.ms, t.gb_per_s,
                  t.tflop_per_s, t.floor_ms, 100 * t.floor_ms / t.ms, t.bound.c_str());
    write_stdout(line);
    if (t.error) {
      std::snprintf(line, sizeof line, "  error %.1e", *t.error);
      write_stdout(line);
    }
    write_stdout("\n");
    flush_stdout();
  });
  if (flags.json) print_json(rows);
  return 0;
}

void add_op_bench(CLI::App& bench, CommandList& out) {
  CLI::App* const command = bench.add_subcommand("op", "Single ops on a model's shapes");
  const auto flags = std::make_shared<OpBenchFlags>();
  std::vector<std::string> names = bench_op_names();
  names.push_back("all");
  command->add_option("NAME", flags->op, "The op, or all")
      ->check(CLI::IsMember(names))
      ->capture_default_str();
  add_size(*command, flags->size);
  CLI::Option* const shapes =
      command
          ->add_option("--shapes", flags->shapes,
                       "Sequences x d_inner x tokens [x d_state], one after the other: "
                       "8x1536x2048,1x1536x32768x64")
          ->delimiter(',');
  command->add_option("--prompt", flags->prompt, "Tokens")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str()
      ->excludes(shapes);
  command
      ->add_option("--sequences", flags->sequences, "Sequences of equal length that they make up")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str()
      ->excludes(shapes);
  command->add_option("--d-inner", flags->d_inner, "Channels, instead of the model's")
      ->check(CLI::Range(1, 1 << 20))
      ->excludes(shapes);
  command->add_option("--d-state", flags->d_state, "States of a channel, instead of the model's")
      ->check(CLI::Range(1, 256))
      ->excludes(shapes);
  command->add_flag("--check", flags->check,
                    "Compare first, for the first and last 16 channels, with the CPU's results "
                    "(on a CPU: with the reference's); selective_scan, causal_conv1d");
  flags->compute.add_to(*command);
  command->add_flag("--json", flags->json,
                    "Print a list of {\"op\", \"pass\", \"shape\", \"dtype\", \"ms\", "
                    "\"floor_ms\", \"gb_per_s\", \"tflop_per_s\", \"bound\"; with --check "
                    "\"error\"}");
  out.push_back({command, [flags] { return run_op(*flags); }});
}

}  // namespace

void add_bench_command(CLI::App& app, CommandList& out) {
  CLI::App* const bench =
      app.add_subcommand("bench", "Measure speed, beside what the machine can do at best");
  bench->require_subcommand(1);
  add_model_bench(*bench, out);
  add_op_bench(*bench, out);
}

}  // namespace krait
