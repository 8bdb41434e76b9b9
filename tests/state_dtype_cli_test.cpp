// --state-dtype on every command that keeps states.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/cli_fixture.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
Arguments in_bf16(const Arguments& arguments) { return with(arguments, {"--state-dtype", "bf16"}); }

using StateDtypeCli = InferenceCli;

TEST_F(StateDtypeCli, ScoresDifferALittleTokenByToken) {
  const std::string text = some_text(300);
  const Arguments score = {"score", "-m", model(), "--text", text, "--json"};
  const Arguments one_by_one = with(score, {"--chunk", "1"});
  const json at_once = output_of(score), exact = output_of(one_by_one),
             rounded = output_of(in_bf16(one_by_one));
  EXPECT_EQ(output_of(in_bf16(score)), at_once) << "one chunk, behind which nothing is scored";
  double difference = 0, sum = 0;
  for (size_t i = 1; i < 300; ++i) {
    const double a = exact["logprobs"][i], b = rounded["logprobs"][i];
    EXPECT_NEAR(a, at_once["logprobs"][i], 1e-4) << i;
    EXPECT_NEAR(b, a, 0.1) << i;
    difference += std::abs(a - b);
    sum += b;
  }
  EXPECT_GT(difference, 1e-3);
  const json eval = output_of(in_bf16(
      {"eval", "-m", model(), "--data", folder.file("text.txt", text), "--chunk", "1", "--json"}));
  EXPECT_NEAR(eval["loss"].get<double>(), -sum / 299, 1e-4);
}

TEST_F(StateDtypeCli, WritesTheSameTwice) {
  expect_repeatable({"--state-dtype", "bf16"}, {"--state-dtype", "f32"});
}

TEST_F(StateDtypeCli, StatesGoBothWays) {
  const std::string exact = path("exact.state"), rounded = path("rounded.state");
  const Arguments save = {"state", "save", "-m", model(), "-p", "To be, or not", "--json", "-o"};
  EXPECT_EQ(output_of(with(save, {exact}))["state_dtype"], "f32");
  const json saved = output_of(in_bf16(with(save, {rounded})));
  EXPECT_EQ(saved["state_dtype"], "bf16");
  EXPECT_EQ(saved["dtype"], "f32");
  EXPECT_LT(fs::file_size(rounded), fs::file_size(exact));
  EXPECT_EQ(output_of({"state", "load", rounded, "-m", model(), "--json"}), saved);
  const Arguments on = {"state", "save", "-m",       model(),  "-p",
                        " to",   "-o",   path("on"), "--json", "--from"};
  for (const std::string& state : {exact, rounded}) {
    EXPECT_EQ(output_of(with(on, {state}))["state_dtype"], "f32");
    EXPECT_EQ(output_of(in_bf16(with(on, {state})))["state_dtype"], "bf16");
    for (const Arguments& arguments : std::vector<Arguments>{
             {"generate", "-m", model(), "--state", state, "-n", "5", "--json", "--ignore-eos"},
             {"score", "-m", model(), "--state", state, "--text", " to be", "--json"}}) {
      EXPECT_EQ(output_of(arguments)["tokens"].size(), arguments[0] == "score" ? 6u : 5u);
      EXPECT_EQ(output_of(in_bf16(arguments))["tokens"].size(), arguments[0] == "score" ? 6u : 5u);
    }
  }
  output_of({"state", "fork", rounded, path("copy"), "--json"});
  EXPECT_EQ(read_text(path("copy")), read_text(rounded));
}

TEST_F(StateDtypeCli, BenchSaysWhatItMeasured) {
  const Arguments bench = small_bench();
  EXPECT_EQ(output_of(bench)["state_dtype"], "f32");
  const json rounded = output_of(in_bf16(with(bench, {"--batch", "3"})));
  EXPECT_EQ(rounded["state_dtype"], "bf16");
  EXPECT_GT(rounded["decode_tokens_per_s"], 0);
}

TEST_F(StateDtypeCli, RefusesWhatItCannotDo) {
  for (const Arguments& arguments : commands())
    for (const std::string wrong : {"f16", "auto", "f64", ""})
      expect_failure(with(arguments, {"--state-dtype", wrong}), 2, {"--state-dtype", wrong});
  expect_failure(in_bf16({"train", "--data", model(), "--out", path("run")}), 2, {"--state-dtype"});
  expect_failure(in_bf16({"bench", "op", "selective_scan"}), 2, {"--state-dtype"});
  expect_failure(in_bf16({"state", "load", path("state")}), 2, {"--state-dtype"});
  expect_failure(in_bf16({"state", "fork", path("state"), path("copy")}), 2, {"--state-dtype"});
  for (const std::string wrong : {"-1", "1048577", "one"})
    expect_failure({"score", "-m", model(), "--text", "a", "--chunk", wrong}, 2,
                   {"--chunk", wrong});
}

}  // namespace
}  // namespace krait
