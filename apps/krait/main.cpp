// The command line. Exit status: 0, 1 (failed), 2 (bad usage), 130 (interrupted).
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>

#include "command.h"
#include "krait/version.h"

namespace krait {
namespace {

constexpr int kFailed = 1, kBadUsage = 2;

int report(std::string message, int status) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  log_line("error: " + message);
  return status;
}

int parse_and_run(int argc, char** argv) {
  CLI::App app("Trains and runs Mamba, the selective state space model.", "krait");
  app.set_version_flag("--version", std::string("krait ") + version());
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  app.footer("krait COMMAND --help tells what a command takes.");
  CommandList commands;
  for (const auto add :
       {add_generate_command, add_chat_command, add_score_command, add_eval_command,
        add_train_command, add_experiment_command, add_report_command, add_info_command,
        add_tokenize_command, add_convert_command, add_state_command, add_bench_command})
    add(app, commands);
  if (argc < 2) {
    std::fputs(app.help().c_str(), stderr);
    return kBadUsage;
  }
  const auto is_named = [&](const CLI::App* command) { return command->get_name() == argv[1]; };
  const bool known = argv[1][0] == '-' || !app.get_subcommands(is_named).empty();
  if (!known)
    return report("unknown command \"" + std::string(argv[1]) + "\"; krait --help lists them",
                  kBadUsage);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) {
      const int status = app.exit(e);  // --help, --version
      flush_stdout();
      return status;
    }
    return report(e.what(), kBadUsage);
  }
  for (const Command& command : commands) {
    if (!command.app->parsed()) continue;
    const int status = command.run();
    flush_stdout();
    return status;
  }
  return kBadUsage;  // require_subcommand saw to it that one was named
}

}  // namespace
}  // namespace krait

int main(int argc, char** argv) {
  try {
    return krait::parse_and_run(argc, argv);
  } catch (const krait::UsageError& e) {
    return krait::report(e.what(), krait::kBadUsage);
  } catch (const std::bad_alloc&) {
    return krait::report("not enough memory", krait::kFailed);
  } catch (const std::exception& e) {
    return krait::report(e.what(), krait::kFailed);
  }
}
