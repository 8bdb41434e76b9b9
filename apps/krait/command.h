// What the subcommands share. Each lives in a file of its own, NAME_command.cpp, and offers
// add_NAME_command, which describes its flags to CLI11 and adds itself to the list; main runs the
// one that was asked for.
//
// Conventions: stdout carries results only, logs and progress go to stderr. A command returns 0, or
// 130 when it was interrupted; it throws krait::Error (exit status 1) or UsageError (2).
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "generate/generator.h"
#include "generate/tokenizer.h"
#include "model/weights.h"
#include "ops/engine.h"

namespace krait {

inline constexpr int kInterrupted = 130;  // exit status

struct Command {
  CLI::App* app;             // parsed() tells whether it was asked for
  std::function<int()> run;  // returns the exit status
};
using CommandList = std::vector<Command>;

void add_generate_command(CLI::App& app, CommandList& out);
void add_chat_command(CLI::App& app, CommandList& out);
void add_score_command(CLI::App& app, CommandList& out);
void add_eval_command(CLI::App& app, CommandList& out);
void add_train_command(CLI::App& app, CommandList& out);
void add_experiment_command(CLI::App& app, CommandList& out);
void add_report_command(CLI::App& app, CommandList& out);
void add_info_command(CLI::App& app, CommandList& out);
void add_tokenize_command(CLI::App& app, CommandList& out);
void add_convert_command(CLI::App& app, CommandList& out);
void add_state_command(CLI::App& app, CommandList& out);
void add_bench_command(CLI::App& app, CommandList& out);

// Flags that contradict each other or lack a partner: what CLI11 cannot see by itself.
class UsageError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Flags of the commands that compute.
struct ComputeFlags {
  std::string device = "cpu";  // cpu, cuda
  std::string dtype = "auto";  // auto, f32, bf16
  int threads = 0;             // 0: all cores
  bool batch_invariant = false;
  std::string quantize = "none";    // none, int8
  std::string state_dtype = "f32";  // f32, bf16

  void add_to(CLI::App& app);            // all but --quantize and --state-dtype
  void add_inference_to(CLI::App& app);  // these, of the commands that run a model, not train it
  // Throws Error for a device that is not there or that this program was built without.
  std::unique_ptr<Context> make_context() const;
  std::optional<DType> weights_dtype() const;  // none: as the file
  Quantization quantization() const;
  DType states_dtype() const;
  Model load(const std::string& folder, const Context& ctx) const;
};

// --chunk of the commands that score text.
void add_chunk(CLI::App& app, int64_t& chunk);

// Flags of the commands that write text.
struct SamplingFlags {
  GenerateOptions options;
  std::optional<int64_t> seed;  // none or -1: a new one every time

  void add_to(CLI::App& app);
  GenerateOptions resolve() const;
};

// From here on SIGINT and SIGTERM only set a flag; a second one ends the program at once.
void catch_interrupts();
bool interrupted();
void forget_interrupt();  // and catch the next one

// Adds -m/--model, a model's folder, and --tokenizer, where its tokenizer.json lies elsewhere.
struct ModelFlags {
  std::string folder, tokenizer;

  void add_to(CLI::App& app);
  // tokenizer.json of the folder; where there is none, bytes.
  Tokenizer load_tokenizer() const;
};

// Token ids as people write them: "1 2 3", "1,2,3", "[1, 2, 3]". where: the flag or file. Throws
// Error.
std::vector<int32_t> parse_tokens(std::string_view text, const std::string& where);

// Writes to stdout. Throws Error when that fails: a full disk, a closed pipe.
void write_stdout(std::string_view text);
void flush_stdout();
// One JSON object and a newline. Text that is no UTF-8 gets replacement characters.
void print_json(const nlohmann::ordered_json& json);

// A line on stderr.
void log_line(const std::string& text);

// The whole of a file, or of stdin for "-". Throws Error.
std::string read_text_file(const std::string& path);

// Text as a JSON string, quotes included.
std::string json_string(const std::string& text);

}  // namespace krait
