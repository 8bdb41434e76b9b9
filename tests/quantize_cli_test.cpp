// --quantize on every command that runs a model.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/cli_fixture.h"

namespace krait {
namespace {

using nlohmann::json;
Arguments quantized(const Arguments& arguments) { return with(arguments, {"--quantize", "int8"}); }

using QuantizeCli = InferenceCli;

TEST_F(QuantizeCli, ScoresDifferALittle) {
  const std::string text = some_text(300);
  const Arguments score = {"score", "-m", model(), "--text", text, "--json"};
  const json exact = output_of(score), rounded = output_of(quantized(score));
  EXPECT_EQ(rounded["tokens"], exact["tokens"]);
  double difference = 0, sum = 0;
  for (size_t i = 1; i < 300; ++i) {
    const double a = exact["logprobs"][i], b = rounded["logprobs"][i];
    EXPECT_NEAR(b, a, 0.1) << i;
    difference += std::abs(a - b);
    sum += b;
  }
  EXPECT_GT(difference, 0);
  // eval and generate see the same model.
  const std::string file = folder.file("text.txt", text);
  const json eval = output_of(quantized({"eval", "-m", model(), "--data", file, "--json"}));
  EXPECT_NEAR(eval["loss"].get<double>(), -sum / 299, 1e-4);
  const json top =
      output_of(quantized({"score", "-m", model(), "-f", file, "--top", "1", "--json"}));
  const Arguments generate = {"generate", "-m",     model(), "-f",     file,          "-n",
                              "1",        "--temp", "0",     "--json", "--ignore-eos"};
  EXPECT_EQ(output_of(quantized(generate))["tokens"][0], top["top"][0][0]);
}

TEST_F(QuantizeCli, WritesTheSameTwice) {
  expect_repeatable({"--quantize", "int8"}, {"--quantize", "none"});
}

// A state belongs to the file's weights, whatever is computed with.
TEST_F(QuantizeCli, StatesGoBothWays) {
  const std::string exact = path("exact.state"), rounded = path("rounded.state");
  output_of({"state", "save", "-m", model(), "-p", "To be, or not", "-o", exact, "--json"});
  const json saved = output_of(
      quantized({"state", "save", "-m", model(), "-p", "To be, or not", "-o", rounded, "--json"}));
  EXPECT_EQ(saved["model"], output_of({"state", "load", exact, "--json"})["model"]);
  EXPECT_NE(saved["checksum"], output_of({"state", "load", exact, "--json"})["checksum"]);
  for (const std::string& state : {exact, rounded}) {
    const Arguments generate = {"generate", "-m",     model(), "--state", state,         "-n",
                                "5",        "--temp", "0",     "--json",  "--ignore-eos"};
    EXPECT_EQ(output_of(generate)["tokens"].size(), 5u);
    EXPECT_EQ(output_of(quantized(generate))["tokens"].size(), 5u);
  }
}

TEST_F(QuantizeCli, BenchSaysWhatItMeasured) {
  const Arguments bench = small_bench();
  EXPECT_EQ(output_of(bench)["quantize"], "none");
  const json rounded = output_of(quantized(bench));
  EXPECT_EQ(rounded["quantize"], "int8");
  EXPECT_GT(rounded["decode_tokens_per_s"], 0);
}

TEST_F(QuantizeCli, RefusesWhatItCannotDo) {
  for (const Arguments& arguments : commands())
    expect_failure(with(arguments, {"--quantize", "int4"}), 2, {"--quantize", "int4"});
  expect_failure(quantized({"train", "--data", model(), "--out", path("run")}), 2, {"--quantize"});
  expect_failure(quantized({"bench", "op", "linear"}), 2, {"--quantize"});

  Model broken = make_random_model(tiny_config(), DType::f32, 1);
  broken.weights.parameters.layers[0].in_proj.ptr<float>()[7] = NAN;
  save_model(path("nan"), broken.config(), broken.weights.parameters, Dialect::hf, DType::f32);
  expect_failure(quantized({"score", "-m", path("nan"), "--text", "abc", "--json"}), 1,
                 {"model.safetensors", "layers.0.mixer.in_proj.weight", "finite"});
}

}  // namespace
}  // namespace krait
