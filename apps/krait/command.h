// What the subcommands share. Each lives in a file of its own, NAME_command.cpp, and offers
// add_NAME_command, which describes its flags to CLI11 and adds itself to the list; main runs the
// one that was asked for.
//
// Conventions: stdout carries results only, logs and progress go to stderr. A command returns 0, or
// 130 when it was interrupted; it throws krait::Error (exit status 1) or UsageError (2).
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
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
void add_report_command(CLI::App& app, CommandList& out);
void add_info_command(CLI::App& app, CommandList& out);
void add_tokenize_command(CLI::App& app, CommandList& out);
void add_convert_command(CLI::App& app, CommandList& out);
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

  void add_to(CLI::App& app);
  // Throws Error for a device that this program was built without.
  Context context() const;
  std::optional<DType> weights_dtype() const;  // none: as the file
};

// From here on SIGINT and SIGTERM only set a flag; a second one ends the program at once.
void catch_interrupts();
bool interrupted();

// Writes to stdout. Throws Error when that fails: a full disk, a closed pipe.
void write_stdout(std::string_view text);
void flush_stdout();

// A line on stderr.
void log_line(const std::string& text);

// The whole of a file, or of stdin for "-". Throws Error.
std::string read_text_file(const std::string& path);

}  // namespace krait
