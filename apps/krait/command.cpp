#include "command.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "core/mapped_file.h"
#include "ops/device.h"

namespace krait {
namespace {

volatile std::sig_atomic_t was_interrupted = 0;

}  // namespace

void ComputeFlags::add_to(CLI::App& app) {
  app.add_option("--device", device,
                 "Where to compute: cpu, or cuda: an NVIDIA GPU (krait info --devices)")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--dtype", dtype, "Type of weights and activations: auto (as the file), f32, bf16")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
  app.add_option("-t,--threads", threads, "Threads; 0: one per core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_flag("--batch-invariant", batch_invariant,
               "The same bits for a sequence whatever it is computed together with; slower");
}

void ComputeFlags::add_inference_to(CLI::App& app) {
  app.add_option("--quantize", quantize,
                 "Weights in 8 bits, made when the model is loaded: int8; faster to write with")
      ->check(CLI::IsMember({"none", "int8"}))
      ->capture_default_str();
  app.add_option("--state-dtype", state_dtype,
                 "Type of the states between tokens: f32, or bf16: half the bytes, less exact")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
}

std::unique_ptr<Context> ComputeFlags::make_context() const {
  auto context = std::make_unique<Context>(engine_of_device(device), threads);
  context->batch_invariant = batch_invariant;
  return context;
}

std::optional<DType> ComputeFlags::weights_dtype() const {
  if (dtype == "auto") return std::nullopt;
  return dtype_from_name(dtype);
}

Quantization ComputeFlags::quantization() const { return quantization_from_name(quantize); }

DType ComputeFlags::states_dtype() const { return dtype_from_name(state_dtype); }

Model ComputeFlags::load(const std::string& folder, const Context& ctx) const {
  return load_model(folder, weights_dtype(), ctx.memory(), quantization());
}

void add_chunk(CLI::App& app, int64_t& chunk) {
  app.add_option("--chunk", chunk,
                 "Tokens that go through the model at once, each with its memory; 1: as it writes; "
                 "0: as many as are fast")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
}

void ModelFlags::add_to(CLI::App& app) {
  app.add_option("-m,--model", folder, "Folder with config.json and weights")->required();
  app.add_option("--tokenizer", tokenizer, "tokenizer.json, where the folder has none");
}

Tokenizer ModelFlags::load_tokenizer() const {
  if (!tokenizer.empty()) return Tokenizer::from_file(tokenizer);
  const std::filesystem::path path = std::filesystem::path(folder) / "tokenizer.json";
  return std::filesystem::exists(path) ? Tokenizer::from_file(path) : Tokenizer::bytes();
}

std::vector<int32_t> parse_tokens(std::string_view text, const std::string& where) {
  std::vector<int32_t> tokens;
  const char *p = text.data(), *const end = p + text.size();
  while (p != end) {
    if (std::strchr(" \t\r\n,[]", *p)) {
      ++p;
      continue;
    }
    int32_t token = 0;
    const auto [next, error] = std::from_chars(p, end, token);
    const bool ends = next == end || std::strchr(" \t\r\n,]", *next);
    if (error != std::errc() || token < 0 || !ends) {
      const char* const stop =
          std::find_if(p, end, [](char c) { return std::strchr(" \t\r\n,]", c); });
      throw Error("not a token id", where, "whole numbers from 0 on, e.g. \"1 2 3\"",
                  std::string(p, std::min(stop, p + 40)));
    }
    tokens.push_back(token);
    p = next;
  }
  return tokens;
}

namespace {

// Converting alone would read 010 as octal, and take what is too large as the largest number.
std::string whole_number(const std::string& text) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  const bool octal = text.size() > 1 && text[text[0] == '-' ? 1 : 0] == '0';
  return error == std::errc() && rest == end && !octal
             ? ""
             : "expected a whole number in 64 bits, got " + text;
}

std::string not_negative(const std::string& text) {
  return std::strtod(text.c_str(), nullptr) >= 0 ? "" : "expected 0 or more, got " + text;
}

}  // namespace

void SamplingFlags::add_to(CLI::App& app) {
  SamplingParams& s = options.sampling;
  app.add_option("-n,--n-predict", options.max_tokens, "Tokens to write; -1: until the text ends")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 40))
      ->capture_default_str();
  app.add_option("-s,--seed", seed,
                 "Seed of the random numbers; -1 or without it: another every time")
      ->check(whole_number)
      ->check(CLI::Range(int64_t{-1}, std::numeric_limits<int64_t>::max()));
  app.add_option("--temp", s.temperature, "Temperature; 0: always the most likely token")
      ->check(not_negative)
      ->capture_default_str();
  app.add_option("--top-k", s.top_k, "Choose among the k most likely tokens; 0 or less: all")
      ->capture_default_str();
  app.add_option("--top-p", s.top_p, "Choose among the likeliest tokens that sum to p; 1: all")
      ->check(CLI::Range(0.0f, 1.0f))
      ->capture_default_str();
  app.add_option("--min-p", s.min_p, "Leave out what is less likely than p times the likeliest")
      ->check(CLI::Range(0.0f, 1.0f))
      ->capture_default_str();
  app.add_option("--repeat-penalty", s.repeat_penalty, "Penalty of repeated tokens; 1: none")
      ->capture_default_str();
  app.add_option("--repeat-last-n", s.repeat_last_n,
                 "Tokens it looks back; 0: none, -1: all, at most 65536")
      ->check(CLI::Range(-1, 65536))
      ->capture_default_str();
  app.add_option("--stop", options.stop, "End at this text; may be given several times")
      ->allow_extra_args(false);
  app.add_flag("--ignore-eos", options.ignore_eos, "Write on after the end-of-text token");
}

GenerateOptions SamplingFlags::resolve() const {
  GenerateOptions resolved = options;
  for (const std::string& stop : options.stop)
    if (stop.empty()) throw UsageError("--stop: an empty text");
  resolved.sampling.seed =
      seed && *seed >= 0 ? static_cast<uint64_t>(*seed) : std::random_device()();
  try {
    resolved.sampling.validate();
  } catch (const Error& e) {
    throw UsageError(e.what());
  }
  return resolved;
}

void catch_interrupts() {
  struct sigaction action = {};
  action.sa_handler = [](int) { was_interrupted = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // reading from a terminal is not resumed
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

void forget_interrupt() {
  was_interrupted = 0;
  catch_interrupts();
}

bool interrupted() { return was_interrupted != 0; }

void write_stdout(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size())
    throw Error("cannot write", "standard output", "", std::strerror(errno));
}

void flush_stdout() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout))
    throw Error("cannot write", "standard output", "", std::strerror(errno));
}

void print_json(const nlohmann::ordered_json& json) {
  write_stdout(json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

std::string json_string(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void log_line(const std::string& text) { std::fprintf(stderr, "%s\n", text.c_str()); }

std::string read_text_file(const std::string& path) {
  if (path != "-") return std::string(MappedFile(path).text());
  std::string text;
  char buffer[1 << 16];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, stdin)) > 0;) text.append(buffer, n);
  if (std::ferror(stdin)) throw Error("cannot read", "standard input", "", std::strerror(errno));
  return text;
}

}  // namespace krait
