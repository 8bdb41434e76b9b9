// krait tokenize: text to token ids and back.
#include <filesystem>
#include <nlohmann/json.hpp>

#include "command.h"

namespace krait {
namespace {

struct TokenizeFlags {
  std::string model, text, file;
  bool decode = false, plain = false, skip_special = false, json = false;
  CLI::Option* text_given = nullptr;
};

Tokenizer load(const std::string& path) {
  if (!std::filesystem::is_directory(path)) return Tokenizer::from_file(path);
  ModelFlags flags;
  flags.folder = path;
  return flags.load_tokenizer();
}

int run(const TokenizeFlags& flags) {
  if (flags.text_given->count() == 0 && flags.file.empty())
    throw UsageError("tokenize needs --text or --file");
  const Tokenizer tokenizer = load(flags.model);
  const std::string input = flags.file.empty() ? flags.text : read_text_file(flags.file);
  if (flags.decode) {
    const std::vector<int32_t> ids =
        parse_tokens(input, flags.file.empty() ? "--text" : flags.file);
    const std::string text = tokenizer.decode(ids, flags.skip_special);
    if (flags.json)
      print_json({{"text", text}});
    else
      write_stdout(text + "\n");
    return 0;
  }
  const std::vector<int32_t> ids = tokenizer.encode(input, !flags.plain, !flags.plain);
  std::string out;  // by hand: a text of many megabytes need not become a tree of JSON values
  for (const int32_t id : ids) {
    if (!out.empty()) out += flags.json ? "," : " ";
    out += std::to_string(id);
  }
  write_stdout(flags.json ? "{\"ids\":[" + out + "]}\n" : out + "\n");
  return 0;
}

}  // namespace

void add_tokenize_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand("tokenize", "Turn text into token ids, or back");
  const auto flags = std::make_shared<TokenizeFlags>();
  command
      ->add_option("-m,--model", flags->model,
                   "A model's folder (bytes where it has no tokenizer.json) or a tokenizer.json")
      ->required();
  flags->text_given = command->add_option("--text", flags->text, "The text; with --decode: ids");
  command->add_option("-f,--file", flags->file, "The same from a file; -: from standard input")
      ->excludes(flags->text_given);
  command->add_flag("--decode", flags->decode, "Ids to text; ids are written \"1 2 3\"");
  command->add_flag("--plain", flags->plain,
                    "Special tokens written in the text are text, and none are added");
  command->add_flag("--skip-special", flags->skip_special,
                    "With --decode: leave special tokens out");
  command->add_flag("--json", flags->json, "Print {\"ids\": [..]} or {\"text\": ..}");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
