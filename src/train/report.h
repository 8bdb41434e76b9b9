// `krait report`: one self-contained HTML page (no external resources) with the curves, final
// numbers and settings of one or several training runs.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace krait {

// Reads metrics.jsonl and config.toml of each run folder. Lines that are not metrics (an incomplete
// last line, say) are counted and shown, missing or empty files give an empty run. Throws Error
// when a folder is missing or holds neither file.
std::string report_html(const std::vector<std::filesystem::path>& run_folders);

// Throws Error where none of the runs has a loss that its page would show.
void check_metrics(const std::vector<std::filesystem::path>& run_folders);

}  // namespace krait
