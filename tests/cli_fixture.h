// What the tests of the command line share: a folder with a tiny model in it, and checks of a run.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/program.h"
#include "tests/tiny_model.h"

namespace krait {

using Arguments = std::vector<std::string>;

inline Arguments with(Arguments arguments, const Arguments& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

inline nlohmann::json output_of(const Arguments& arguments) {
  const ProgramResult r = run_krait(arguments);
  EXPECT_EQ(r.status, 0) << r.err;
  return nlohmann::json::parse(r.out);
}

class Cli : public testing::Test {
 protected:
  void SetUp() override { write_random_model(model(), tiny_config()); }
  std::string model() const { return folder.path() / "model"; }
  std::string path(const std::string& name) const { return folder.path() / name; }

  TestFolder folder;
};

// What commands that run a model have in common, with `more` options given to them, on a model with
// something to remember.
class InferenceCli : public Cli {
 protected:
  void SetUp() override { write_remembering_model(model(), tiny_config()); }

  // Each command, with enough to run.
  std::vector<Arguments> commands() const {
    return {{"generate", "-m", model(), "-p", "a"},
            {"chat", "-m", model()},
            {"score", "-m", model(), "--text", "a"},
            {"eval", "-m", model(), "--data", model()},
            {"state", "save", "-m", model(), "-p", "a", "-o", path("state")},
            {"bench", "model"}};
  }
  Arguments small_bench() const {
    return {"bench", "model",   "--config", model(),  "--prompt",  "4", "--gen",
            "4",     "--train", "0",        "--json", "--repeats", "1"};
  }
  static std::string some_text(int length) {
    std::string text;
    for (int i = 0; i < length; ++i) text += static_cast<char>('a' + i * i % 26);
    return text;
  }
  // The same tokens each time, and as without the options where `none` is given.
  void expect_repeatable(const Arguments& more, const Arguments& none) const {
    const Arguments generate = {"generate", "-m", model(), "-p",     "Hello",       "-n",
                                "20",       "-s", "3",     "--json", "--ignore-eos"};
    const nlohmann::json once = output_of(with(generate, more));
    EXPECT_EQ(once["tokens"].size(), 20u);
    EXPECT_EQ(output_of(with(generate, more)), once);
    EXPECT_EQ(output_of(with(generate, none)), output_of(generate));
    ProgramOptions options;
    options.input = "Hello\n/quit\n";
    const ProgramResult chat = run_krait(with({"chat", "-m", model(), "-n", "5"}, more), options);
    EXPECT_EQ(chat.status, 0) << chat.err;
  }
};

// The program fails with this status, prints nothing on stdout, and one line on stderr that holds
// all the parts.
inline void expect_failure(const Arguments& arguments, int status,
                           const std::vector<std::string>& parts) {
  const ProgramResult r = run_krait(arguments);
  EXPECT_EQ(r.status, status) << r.err;
  EXPECT_EQ(r.out, "");
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  EXPECT_EQ(r.err.rfind("error: ", 0), 0u) << r.err;
  for (const std::string& part : parts)
    EXPECT_NE(r.err.find(part), std::string::npos) << "no \"" << part << "\" in: " << r.err;
}

}  // namespace krait
