// krait generate: continues a prompt.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "command.h"
#include "generate/state_file.h"
#include "model/weights.h"

namespace krait {
namespace {

struct GenerateFlags {
  ModelFlags model;
  ComputeFlags compute;
  SamplingFlags sampling;
  std::string prompt, file, tokens, state, save_state;
  CLI::Option *prompt_given = nullptr, *tokens_given = nullptr;
  bool json = false;
};

nlohmann::ordered_json to_json(const Sample& sample) {
  return {{"text", sample.text},
          {"tokens", sample.tokens},
          {"finish_reason", name_of(sample.finish_reason)}};
}

std::vector<int32_t> prompt_tokens(const GenerateFlags& flags, const Tokenizer& tokenizer) {
  if (flags.tokens_given->count() > 0) return parse_tokens(flags.tokens, "--tokens");
  const std::string text = flags.file.empty() ? flags.prompt : read_text_file(flags.file);
  // What the tokenizer puts in front of a text belongs to its beginning only.
  const std::vector<int32_t> tokens = tokenizer.encode(text, true, flags.state.empty());
  if (tokens.empty() && flags.state.empty())
    throw Error("empty prompt", flags.file.empty() ? "--prompt" : flags.file, "some text",
                "nothing");
  return tokens;
}

void print_samples(const std::vector<Sample>& samples, bool json) {
  if (json) {
    nlohmann::ordered_json out = to_json(samples[0]);
    if (samples.size() > 1)
      for (const Sample& sample : samples) out["samples"].push_back(to_json(sample));
    print_json(out);
    return;
  }
  for (size_t i = 0; i < samples.size(); ++i)
    write_stdout((i > 0 ? "\n" : "") + ("--- sample " + std::to_string(i + 1)) + "\n" +
                 samples[i].text + "\n");
}

int run(const GenerateFlags& flags) {
  if (flags.prompt_given->count() == 0 && flags.file.empty() && flags.tokens_given->count() == 0 &&
      flags.state.empty())
    throw UsageError("generate needs --prompt, --file or --tokens, or --state");
  if (!flags.save_state.empty() && flags.sampling.options.samples > 1)
    throw UsageError("--save-state goes with one sample, not with --samples");
  GenerateOptions options = flags.sampling.resolve();
  if (!flags.save_state.empty()) check_state_place(flags.save_state);
  const Tokenizer tokenizer = flags.model.load_tokenizer();
  const std::vector<int32_t> prompt = prompt_tokens(flags, tokenizer);
  options.any_token = flags.tokens_given->count() > 0;
  const std::unique_ptr<Context> ctx = flags.compute.make_context();
  const Model model = flags.compute.load(flags.model.folder, *ctx);
  Generator generator(*ctx, model.weights, tokenizer, flags.compute.states_dtype());
  std::optional<StateOwner> owner;
  if (!flags.state.empty() || !flags.save_state.empty()) owner = state_owner_of(model);
  if (!flags.state.empty()) generator.restore(load_state_file(flags.state, *owner));

  catch_interrupts();
  if (!generator.feed(prompt, [] { return !interrupted(); })) return kInterrupted;
  const bool stream = !flags.json && options.samples == 1;
  const std::vector<Sample> samples =
      generator.generate(options, [&](int64_t, std::string_view text) {
        if (stream && !text.empty()) {
          write_stdout(text);
          flush_stdout();
        }
        return !interrupted();
      });
  if (stream)
    write_stdout("\n");
  else
    print_samples(samples, flags.json);
  flush_stdout();
  if (!flags.save_state.empty()) save_state_file(flags.save_state, generator.save(), *owner);
  return interrupted() ? kInterrupted : 0;
}

}  // namespace

void add_generate_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand("generate", "Continue a prompt");
  const auto flags = std::make_shared<GenerateFlags>();
  flags->model.add_to(*command);
  flags->prompt_given = command->add_option("-p,--prompt", flags->prompt, "The prompt");
  command->add_option("-f,--file", flags->file, "The prompt from a file; -: from standard input")
      ->excludes(flags->prompt_given);
  flags->tokens_given =
      command->add_option("--tokens", flags->tokens, "The prompt as token ids, \"1 2 3\"")
          ->excludes(flags->prompt_given)
          ->excludes("--file");
  command->add_option("--state", flags->state,
                      "Go on from this state file (krait state save); the prompt may then be left "
                      "out, and is encoded by itself");
  command->add_option("--save-state", flags->save_state,
                      "Write the state behind the last token to this file");
  flags->sampling.add_to(*command);
  command
      ->add_option("--samples", flags->sampling.options.samples,
                   "How many continuations; the prompt is read once, sample i has seed + i")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  flags->compute.add_to(*command);
  flags->compute.add_inference_to(*command);
  command->add_flag("--json", flags->json, "Print {\"text\", \"tokens\", \"finish_reason\"}");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
