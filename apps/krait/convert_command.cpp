// krait convert: a model's folder in the other dialect, or in another element type.
#include <filesystem>

#include "command.h"
#include "model/weights.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

struct ConvertFlags {
  std::string in, out, to, dtype;
};

int run(const ConvertFlags& flags) {
  if (fs::exists(flags.out) && !(fs::is_directory(flags.out) && fs::is_empty(flags.out)))
    throw Error("already there", flags.out, "a new or empty folder");
  const Model model = load_model(flags.in);
  const DType dtype = flags.dtype.empty() ? model.file_dtype : dtype_from_name(flags.dtype);
  save_model(flags.out, model.config(), model.weights.parameters, dialect_from_name(flags.to),
             dtype);
  if (!model.config().selective() && flags.to == "hf")
    log_line("warning: only Krait loads " + flags.out + ": others know no model without selection");
  for (const char* const name : {"tokenizer.json", "tokenizer_config.json",
                                 "special_tokens_map.json", "generation_config.json"})
    if (fs::exists(fs::path(flags.in) / name))
      fs::copy_file(fs::path(flags.in) / name, fs::path(flags.out) / name);
  return 0;
}

}  // namespace

void add_convert_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand(
      "convert", "Write a model for transformers (hf) or for state-spaces' mamba_ssm");
  const auto flags = std::make_shared<ConvertFlags>();
  command->add_option("IN", flags->in, "A model's folder")->required();
  command->add_option("OUT", flags->out, "The folder to write; it must not hold anything yet")
      ->required();
  command->add_option("--to", flags->to, "Dialect: hf or state-spaces")
      ->required()
      ->check(CLI::IsMember({"hf", "state-spaces"}));
  command->add_option("--dtype", flags->dtype, "f32, bf16 or f16; without it as in IN")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
