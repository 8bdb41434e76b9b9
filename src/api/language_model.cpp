#include "krait/language_model.h"

#include "generate/generator.h"
#include "generate/scorer.h"
#include "generate/state_file.h"
#include "model/weights.h"
#include "ops/context.h"
#include "ops/device.h"

namespace krait {
namespace {

constexpr int kMaxThreads = 4096;  // as on the command line

std::optional<DType> dtype_of_name(const std::string& name) {
  if (name == "auto") return std::nullopt;
  if (name != "f32" && name != "bf16")
    throw Error("unknown element type", "dtype", "auto, f32 or bf16", name);
  return dtype_from_name(name);
}

DType state_dtype_of_name(const std::string& name) {
  if (name != "f32" && name != "bf16")
    throw Error("unknown element type", "state_dtype", "f32 or bf16", name);
  return dtype_from_name(name);
}

int checked_threads(int threads) {
  if (threads < 0 || threads > kMaxThreads)
    throw Error("value out of range", "threads", "0 to " + std::to_string(kMaxThreads),
                std::to_string(threads));
  return threads;
}

Tokenizer tokenizer_of(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "tokenizer.json";
  return std::filesystem::exists(path) ? Tokenizer::from_file(path) : Tokenizer::bytes();
}

}  // namespace

struct LanguageModel::Impl {
  Impl(const std::filesystem::path& folder, const LoadOptions& options)
      : context(engine_of_device(options.device), checked_threads(options.threads)),
        model(load_model(folder, dtype_of_name(options.dtype), context.memory(),
                         quantization_from_name(options.quantize))),
        tokenizer(tokenizer_of(folder)),
        state_dtype(state_dtype_of_name(options.state_dtype)),
        generator(context, model.weights, tokenizer, state_dtype) {
    context.batch_invariant = options.batch_invariant;
    const Config& c = model.config();
    info = {.parameters = parameter_count(c),
            .vocab_size = c.vocab_size,
            .d_model = c.d_model,
            .n_layer = c.n_layer,
            .d_inner = c.d_inner,
            .d_state = c.d_state,
            .d_conv = c.d_conv,
            .dt_rank = c.dt_rank,
            .state_bytes = c.state_bytes_per_sequence(state_dtype),
            .dtype = name_of(model.weights.dtype)};
  }

  Context context;
  Model model;
  Tokenizer tokenizer;
  DType state_dtype;
  Generator generator;
  ModelInfo info;
  std::optional<StateOwner> owner;  // once it was asked for

  const StateOwner& state_owner() {
    if (!owner) owner = state_owner_of(model);
    return *owner;
  }

  // The generator at `state`.
  Generator& at(const SavedConversation& state) {
    if (state.pending < 0)
      generator.reset();
    else
      generator.restore(state);
    return generator;
  }
};

LanguageModel LanguageModel::load(const std::filesystem::path& folder, const LoadOptions& options) {
  return LanguageModel(std::make_unique<Impl>(folder, options));
}

LanguageModel::LanguageModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LanguageModel::LanguageModel(LanguageModel&&) noexcept = default;
LanguageModel& LanguageModel::operator=(LanguageModel&&) noexcept = default;
LanguageModel::~LanguageModel() = default;

SavedConversation LanguageModel::conversation_of(const State& state) {
  return {state.memory_, state.pending_, state.recent_, state.tokens_};
}

State LanguageModel::state_of(SavedConversation conversation) {
  State state;
  state.memory_ = std::move(conversation.state);
  state.pending_ = conversation.pending;
  state.recent_ = std::move(conversation.recent);
  state.tokens_ = conversation.tokens;
  return state;
}

const ModelInfo& LanguageModel::info() const { return impl_->info; }

std::vector<int32_t> LanguageModel::encode(std::string_view text) const {
  return impl_->tokenizer.encode(text);
}

std::string LanguageModel::decode(std::span<const int32_t> tokens) const {
  return impl_->tokenizer.decode(tokens);
}

void LanguageModel::read(State& state, std::string_view text) {
  // What the tokenizer puts in front of a text belongs to its beginning only.
  read(state, impl_->tokenizer.encode(text, true, state.empty()));
}

void LanguageModel::read(State& state, std::span<const int32_t> tokens) {
  Generator& generator = impl_->at(conversation_of(state));
  generator.feed(tokens);
  state = state_of(generator.save());
}

Text LanguageModel::generate(State& state, const TextOptions& options) {
  if (options.max_tokens < 0)
    throw Error("value out of range", "max_tokens", "at least 0",
                std::to_string(options.max_tokens));
  GenerateOptions generate;
  generate.max_tokens = options.max_tokens;
  generate.sampling.temperature = options.temperature;
  generate.sampling.top_k = options.top_k;
  generate.sampling.top_p = options.top_p;
  generate.sampling.min_p = options.min_p;
  generate.sampling.repeat_penalty = options.repeat_penalty;
  generate.sampling.repeat_last_n = options.repeat_last_n;
  generate.sampling.seed = options.seed;
  generate.stop = options.stop;
  generate.ignore_eos = options.ignore_eos;
  Generator& generator = impl_->at(conversation_of(state));
  std::vector<Sample> samples = generator.generate(generate, [&](int64_t, std::string_view text) {
    return !options.on_text || options.on_text(text);
  });
  state = state_of(generator.save());
  return {std::move(samples[0].text), std::move(samples[0].tokens),
          name_of(samples[0].finish_reason)};
}

std::vector<float> LanguageModel::next_logits(const State& state) {
  return impl_->at(conversation_of(state)).next_logits();
}

void LanguageModel::save_state(const State& state, const std::filesystem::path& file) {
  save_state_file(file, conversation_of(state), impl_->state_owner());
}

State LanguageModel::load_state(const std::filesystem::path& file) {
  return state_of(load_state_file(file, impl_->state_owner()));
}

std::vector<float> LanguageModel::score(std::span<const int32_t> tokens) {
  std::vector<float> logprobs;
  Scorer(impl_->context, impl_->model.weights, {.state_dtype = impl_->state_dtype})
      .score(tokens, [&](std::span<const float> some) {
        logprobs.insert(logprobs.end(), some.begin(), some.end());
        return true;
      });
  return logprobs;
}

}  // namespace krait
