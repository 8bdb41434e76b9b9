// krait eval: loss of a model over files.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "command.h"
#include "core/mapped_file.h"
#include "generate/scorer.h"
#include "model/weights.h"

namespace krait {
namespace {

struct EvalFlags {
  ModelFlags model;
  ComputeFlags compute;
  std::vector<std::string> files;
  int64_t context = 0, chunk = 0;
  bool json = false;
};

int run(const EvalFlags& flags) {
  const Tokenizer tokenizer = flags.model.load_tokenizer();
  const std::unique_ptr<Context> ctx = flags.compute.make_context();
  std::vector<MappedFile> files;  // all opened before the work begins
  for (const std::string& path : flags.files) files.emplace_back(path);
  const Model model = flags.compute.load(flags.model.folder, *ctx);
  Scorer scorer(*ctx, model.weights,
                {.state_dtype = flags.compute.states_dtype(), .chunk = flags.chunk});
  Scorer::Total total;
  catch_interrupts();
  for (const MappedFile& file : files) {
    const std::vector<int32_t> tokens = tokenizer.encode(file.text());
    if (!scorer.evaluate(tokens, flags.context, tokenizer, total, [] { return !interrupted(); }))
      return kInterrupted;
  }
  if (total.tokens == 0)
    throw Error("nothing to evaluate", flags.files[0], "at least two tokens of text");
  const double loss = total.loss / static_cast<double>(total.tokens);
  const double bits_per_byte = total.loss / std::log(2.0) / static_cast<double>(total.bytes);
  if (flags.json) {
    print_json({{"loss", loss},
                {"perplexity", std::exp(loss)},
                {"bits_per_byte", bits_per_byte},
                {"tokens", total.tokens}});
    return 0;
  }
  char text[256];
  std::snprintf(
      text, sizeof text,
      "loss           %.4f\nperplexity     %.4f\nbits per byte  %.4f\ntokens         %lld\n", loss,
      std::exp(loss), bits_per_byte, static_cast<long long>(total.tokens));
  write_stdout(text);
  return 0;
}

}  // namespace

void add_eval_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand(
      "eval", "Loss, perplexity and bits per byte over text files; each file starts afresh");
  const auto flags = std::make_shared<EvalFlags>();
  flags->model.add_to(*command);
  command->add_option("--data", flags->files, "Text files")->required();
  command
      ->add_option("--context", flags->context,
                   "Read windows of that many tokens, each from a fresh state; "
                   "0: each file as one stream")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
  add_chunk(*command, flags->chunk);
  flags->compute.add_to(*command);
  flags->compute.add_inference_to(*command);
  command->add_flag("--json", flags->json,
                    "Print {\"loss\", \"perplexity\", \"bits_per_byte\", \"tokens\"}");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
