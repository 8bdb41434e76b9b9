// krait state: what a model remembers of a text, in a file. Read a book once, ask it many times.
#include <filesystem>
#include <set>

#include "command.h"
#include "core/mapped_file.h"
#include "generate/state_file.h"
#include "model/weights.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

struct StateSaveFlags {
  ModelFlags model;
  ComputeFlags compute;
  std::string prompt, tokens, from, out;
  std::vector<std::string> files;
  bool json = false;
};

struct StateLoadFlags {
  std::string file, folder;
  bool json = false;
};

struct StateForkFlags {
  std::string file;
  std::vector<std::string> outs;
  bool json = false;
};

// owner_checked: it is the state of the model that was named.
void print_state(const StateFileInfo& info, bool owner_checked, bool json) {
  nlohmann::ordered_json out = {
      {"file", info.path},       {"version", info.version},
      {"model", info.model},     {"tokens", info.tokens},
      {"n_layer", info.n_layer}, {"d_inner", info.d_inner},
      {"d_state", info.d_state}, {"d_conv", info.d_conv},
      {"dtype", info.dtype},     {"state_dtype", name_of(info.state_dtype)},
      {"bytes", info.bytes},     {"checksum", info.checksum},
      {"checksum_ok", true}};  // else there was an error
  if (owner_checked) out["model_ok"] = true;
  if (json) return print_json(out);
  std::string text;
  for (const auto& [name, value] : out.items())
    text += name + std::string(14 - name.size(), ' ') +
            (value.is_boolean()  ? "yes"
             : value.is_string() ? value.get<std::string>()
                                 : value.dump()) +
            "\n";
  write_stdout(text);
}

// Reads what the flags name into the generator, one file after another. Returns false when
// interrupted.
bool read_texts(const StateSaveFlags& flags, const Tokenizer& tokenizer, Generator& generator) {
  const bool empty_before = generator.empty();
  int64_t read = 0;
  const auto feed = [&](const std::vector<int32_t>& tokens) {
    read += static_cast<int64_t>(tokens.size());
    return generator.feed(tokens, [] { return !interrupted(); });
  };
  // What the tokenizer puts in front of a text belongs to its beginning only.
  const auto feed_text = [&](std::string_view text) {
    return feed(tokenizer.encode(text, true, empty_before && read == 0));
  };
  if (!flags.tokens.empty()) {
    if (!feed(parse_tokens(flags.tokens, "--tokens"))) return false;
  } else if (flags.files.empty()) {
    if (!feed_text(flags.prompt)) return false;
  }
  for (const std::string& file : flags.files)
    if (!(file == "-" ? feed_text(read_text_file(file)) : feed_text(MappedFile(file).text())))
      return false;
  if (read == 0)
    throw Error("nothing to read", flags.files.empty() ? "prompt" : flags.files[0],
                "at least one token", "none");
  return true;
}

int run(const StateSaveFlags& flags) {
  check_state_place(flags.out);
  const Tokenizer tokenizer = flags.model.load_tokenizer();
  for (const std::string& file : flags.files)
    if (file != "-") MappedFile{fs::path(file)};  // all can be opened before the work begins
  const std::unique_ptr<Context> ctx = flags.compute.make_context();
  const Model model = flags.compute.load(flags.model.folder, *ctx);
  const StateOwner owner = state_owner_of(model);
  Generator generator(*ctx, model.weights, tokenizer, flags.compute.states_dtype());
  if (!flags.from.empty()) generator.restore(load_state_file(flags.from, owner));
  catch_interrupts();
  if (!read_texts(flags, tokenizer, generator)) return kInterrupted;
  save_state_file(flags.out, generator.save(), owner);
  print_state(inspect_state_file(flags.out), true, flags.json);
  return 0;
}

int run(const StateLoadFlags& flags) {
  const StateFileInfo info = inspect_state_file(flags.file);
  if (!flags.folder.empty()) check_state_owner(info, state_owner_of(load_model(flags.folder)));
  print_state(info, !flags.folder.empty(), flags.json);
  return 0;
}

// All copies or none.
StateFileInfo copy_all(const StateForkFlags& flags) {
  StateFileInfo info;
  size_t begun = 0;
  try {
    while (begun < flags.outs.size()) info = copy_state_file(flags.file, flags.outs[begun++]);
  } catch (...) {
    std::error_code ignored;
    for (size_t i = 0; i < begun; ++i) fs::remove(flags.outs[i], ignored);
    throw;
  }
  return info;
}

int run(const StateForkFlags& flags) {
  std::set<std::string> names;
  for (const std::string& out : flags.outs)
    if (!names.insert(fs::weakly_canonical(out).string()).second)
      throw UsageError("the copy " + out + " is named twice");
  inspect_state_file(flags.file);
  for (const std::string& out : flags.outs)
    if (fs::exists(fs::symlink_status(out))) throw Error("already there", out, "a new file");
  const StateFileInfo info = copy_all(flags);
  if (flags.json)
    print_json({{"file", flags.file},
                {"copies", flags.outs},
                {"tokens", info.tokens},
                {"bytes", info.bytes},
                {"checksum", info.checksum}});
  else
    for (const std::string& out : flags.outs) write_stdout(out + "\n");
  return 0;
}

void add_state_save(CLI::App& state, CommandList& out) {
  CLI::App* const command =
      state.add_subcommand("save", "Read a text of any length and write the state behind it");
  const auto flags = std::make_shared<StateSaveFlags>();
  flags->model.add_to(*command);
  CLI::Option_group* const input = command->add_option_group("input");
  input->add_option("-p,--prompt", flags->prompt, "The text");
  input->add_option("-f,--file", flags->files,
                    "The text from files, one after another, each encoded by itself; -: from "
                    "standard input");
  input->add_option("--tokens", flags->tokens, "Token ids instead, \"1 2 3\"");
  input->require_option(1);
  command->add_option("-o,--out", flags->out, "The state file to write")->required();
  command->add_option("--from", flags->from, "Go on from this state file");
  flags->compute.add_to(*command);
  flags->compute.add_inference_to(*command);
  command->add_flag("--json", flags->json, "Print what state load --json prints");
  out.push_back({command, [flags] { return run(*flags); }});
}

void add_state_load(CLI::App& state, CommandList& out) {
  CLI::App* const command =
      state.add_subcommand("load", "Verify a state file and show what it holds");
  const auto flags = std::make_shared<StateLoadFlags>();
  command->add_option("FILE", flags->file, "The state file")->required();
  command->add_option("-m,--model", flags->folder, "Also check that it is this model's state");
  command->add_flag("--json", flags->json,
                    "Print {\"file\", \"version\", \"model\", \"tokens\", \"n_layer\", "
                    "\"d_inner\", \"d_state\", \"d_conv\", \"dtype\", \"state_dtype\", "
                    "\"bytes\", \"checksum\", \"checksum_ok\"}, and with --model "
                    "\"model_ok\"");
  out.push_back({command, [flags] { return run(*flags); }});
}

void add_state_fork(CLI::App& state, CommandList& out) {
  CLI::App* const command = state.add_subcommand(
      "fork", "Copy a state file, verifying original and copies, to go on from it in several ways");
  const auto flags = std::make_shared<StateForkFlags>();
  command->add_option("FILE", flags->file, "The state file")->required();
  command->add_option("OUT", flags->outs, "The copies; they must not be there yet")->required();
  command->add_flag(
      "--json", flags->json,
      "Print {\"file\", \"copies\", \"tokens\", \"bytes\", \"checksum\"}; else the copies' names");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace

void add_state_command(CLI::App& app, CommandList& out) {
  CLI::App* const state = app.add_subcommand(
      "state", "Keep what a model remembers of a text in a file, to go on from later");
  state->require_subcommand(1);
  add_state_save(*state, out);
  add_state_load(*state, out);
  add_state_fork(*state, out);
}

}  // namespace krait
