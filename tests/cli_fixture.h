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

class Cli : public testing::Test {
 protected:
  void SetUp() override { write_random_model(model(), tiny_config()); }
  std::string model() const { return folder.path() / "model"; }
  std::string path(const std::string& name) const { return folder.path() / name; }

  TestFolder folder;
};

inline nlohmann::json output_of(const std::vector<std::string>& arguments) {
  const ProgramResult r = run_krait(arguments);
  EXPECT_EQ(r.status, 0) << r.err;
  return nlohmann::json::parse(r.out);
}

// The program fails with this status, prints nothing on stdout, and one line on stderr that holds
// all the parts.
inline void expect_failure(const std::vector<std::string>& arguments, int status,
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
