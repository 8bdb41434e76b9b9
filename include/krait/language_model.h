// A Mamba language model:
//
//   krait::LanguageModel model = krait::LanguageModel::load("folder");
//   krait::State state;
//   model.read(state, "Once upon a time");
//   const krait::State kept = state;                     // a fork costs a copy of the state
//   std::cout << model.generate(state, {.max_tokens = 100}).text;
//   state = kept;                                        // and taking text back an assignment
//   std::cout << model.generate(state, {.max_tokens = 100, .seed = 2}).text;
//
// Every function throws krait::Error where files, tokens or options are not as they must be.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "krait/state.h"

namespace krait {

struct SavedConversation;  // of the implementation

struct LoadOptions {
  std::string device = "cpu";     // or "cuda"
  std::string dtype = "auto";     // of weights and activations: "f32", "bf16", or as in the file
  std::string quantize = "none";  // "int8": weights in 8 bits, made when loading; docs/numerics.md
  // Of states; "bf16": half the bytes, rounded behind each token written and behind each chunk of a
  // prompt.
  std::string state_dtype = "f32";
  int threads = 0;  // at most 4096; 0: one per core
  bool batch_invariant =
      false;  // the same bits for a sequence whatever it is computed with; slower
};

struct ModelInfo {
  int64_t parameters = 0;
  int64_t vocab_size = 0;  // token ids are below it
  int64_t d_model = 0, n_layer = 0, d_inner = 0, d_state = 0, d_conv = 0, dt_rank = 0;
  int64_t state_bytes = 0;  // of one text, in LoadOptions::state_dtype
  std::string dtype;        // computed in
};

struct TextOptions {
  int64_t max_tokens = 128;     // not negative
  float temperature = 0.8f;     // 0: always the most likely token
  int top_k = 40;               // choose among the k most likely tokens; 0: all
  float top_p = 0.95f;          // choose among the likeliest that sum to p; 1: all
  float min_p = 0.05f;          // leave out what is less likely than p times the likeliest; 0: off
  float repeat_penalty = 1.0f;  // 1: none
  int repeat_last_n = 64;       // tokens it looks back; -1: all, at most 65536
  uint64_t seed = 0;            // the same seed, the same text
  std::vector<std::string> stop;  // text that ends the text; not part of it
  bool ignore_eos = false;        // write on after the end-of-text token
  // Called for each token with the text that has become certain, perhaps none, always whole UTF-8
  // characters; false ends the text.
  std::function<bool(std::string_view)> on_text;
};

struct Text {
  std::string text;  // always UTF-8
  std::vector<int32_t> tokens;
  std::string finish_reason;  // "length", "stop", "eos", or "interrupted" by on_text
};

// Move-only. One thread uses it at a time.
class LanguageModel {
 public:
  // A folder with config.json (of transformers or of state-spaces), model.safetensors (or its
  // shards, or pytorch_model.bin) and tokenizer.json; without that, tokens are bytes. Weights are
  // mapped, not read.
  static LanguageModel load(const std::filesystem::path& folder, const LoadOptions& options = {});

  LanguageModel(LanguageModel&&) noexcept;
  LanguageModel& operator=(LanguageModel&&) noexcept;
  ~LanguageModel();

  const ModelInfo& info() const;

  std::vector<int32_t> encode(std::string_view text) const;
  std::string decode(std::span<const int32_t> tokens) const;  // bytes: need not be UTF-8

  // Moves the state past the text. Of any length: it is read in chunks, in constant memory.
  void read(State& state, std::string_view text);
  void read(State& state, std::span<const int32_t> tokens);

  // Continues what the state has read, and moves it past what was written.
  Text generate(State& state, const TextOptions& options = {});

  // Keeps a state in a file of constant size, and takes it up again on any device and in any dtype
  // and state_dtype, quantized or not.
  // Saving leaves the complete file or what was there; loading verifies every byte. Error: an empty
  // state, a full disk; no state file, another version, a damaged file, a file of another model
  // (one changed weight makes another; the first call reads all weights to tell). docs/formats.md.
  void save_state(const State& state, const std::filesystem::path& file);
  State load_state(const std::filesystem::path& file);

  // (vocab_size) logits of the next token.
  std::vector<float> next_logits(const State& state);

  // Log-probability (natural) of tokens[1], tokens[2], .. each given all before it, in constant
  // memory.
  std::vector<float> score(std::span<const int32_t> tokens);

 private:
  struct Impl;
  static SavedConversation conversation_of(const State& state);
  static State state_of(SavedConversation conversation);
  explicit LanguageModel(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace krait
