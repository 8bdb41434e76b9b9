// What an experiment has found, as JSON and as a table for people.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "train/experiment.h"

namespace krait {

inline constexpr const char* kResultFile = "result.json";  // of a seed, in its run folder

// {"seed", "steps", "train_s", "trained", "tested", "validation", "tests": [{"length", "sequences",
// "answers", "right_answers", "right_sequences", "token_accuracy", "sequence_accuracy", "loss"}]}
std::string result_text(const ExperimentResult& result);               // with the newline
ExperimentResult result_from_file(const std::filesystem::path& path);  // throws Error

// Of all seeds. passed: every length of the test has reached the goal with two of three seeds
// (of one or two: with each).
bool passed(const ExperimentSettings& settings, const std::vector<ExperimentResult>& results);
nlohmann::ordered_json results_json(const ExperimentSettings& settings,
                                    const std::vector<ExperimentResult>& results);
// Markdown: the settings in a sentence, a row for each seed, the outcome.
std::string results_table(const ExperimentSettings& settings,
                          const std::vector<ExperimentResult>& results);

}  // namespace krait
