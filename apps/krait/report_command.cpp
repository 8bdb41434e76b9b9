// krait report: training runs as one self-contained HTML page.
#include <filesystem>

#include "command.h"
#include "core/mapped_file.h"
#include "train/report.h"

namespace krait {
namespace {

struct ReportFlags {
  std::vector<std::string> runs;
  std::string output;
};

int run(const ReportFlags& flags) {
  const std::vector<std::filesystem::path> folders(flags.runs.begin(), flags.runs.end());
  check_metrics(folders);
  const std::string html = report_html(folders);
  if (flags.output == "-") {
    write_stdout(html);
    return 0;
  }
  const std::filesystem::path path =
      flags.output.empty() ? folders.front() / "report.html" : std::filesystem::path(flags.output);
  write_file_atomic(path, html);
  write_stdout(path.string() + "\n");
  return 0;
}

}  // namespace

void add_report_command(CLI::App& app, CommandList& out) {
  CLI::App* const command =
      app.add_subcommand("report", "Write the curves of training runs as one HTML page");
  const auto flags = std::make_shared<ReportFlags>();
  command
      ->add_option("runs", flags->runs, "Folders that krait train has written; several: compared")
      ->required();
  command->add_option("-o,--output", flags->output,
                      "The page; - for stdout (default: report.html in the first run's folder)");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
