// The command line on the golden models: what transformers computes from the same folders.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "formats/tensor_file.h"
#include "tests/program.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kGolden = fs::path(KRAIT_SOURCE_DIR) / "tests/golden/model";

class GoldenCli : public testing::TestWithParam<const char*> {
 protected:
  std::string folder = kGolden / GetParam();
  TensorFile expected = TensorFile::open(fs::path(folder) / "expected.safetensors");

  std::vector<int32_t> ints(const char* name) const {
    const Tensor& t = expected.at(name);
    return {t.ptr<int32_t>(), t.ptr<int32_t>() + t.size()};
  }
  std::string prompt() const {
    std::string text;
    for (const int32_t token : ints("tokens")) text += std::to_string(token) + " ";
    return text;
  }
  json output_of(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--tokens", prompt(), "--dtype", "f32", "--json"});
    const ProgramResult r = run_krait(arguments);
    EXPECT_EQ(r.status, 0) << r.err;
    return json::parse(r.out);
  }
  // log softmax of the last row of the logits that transformers computed in double.
  std::vector<double> expected_logprobs() const {
    const Tensor& logits = expected.at("logits_f64");
    const double* const row = logits.row<double>(logits.shape[0] - 1);
    double sum = 0;
    for (int64_t i = 0; i < logits.shape[1]; ++i) sum += std::exp(row[i]);
    std::vector<double> logprobs;
    for (int64_t i = 0; i < logits.shape[1]; ++i) logprobs.push_back(row[i] - std::log(sum));
    return logprobs;
  }
  void expect_scores(const std::string& at) const {
    const std::vector<double> wanted = expected_logprobs();
    const json top = output_of({"score", "-m", at, "--top", std::to_string(wanted.size())})["top"];
    ASSERT_EQ(top.size(), wanted.size());
    for (const json& t : top)
      EXPECT_NEAR(t[1].get<double>(), wanted.at(t[0].get<size_t>()), 1e-3) << t[0];
  }
};

TEST_P(GoldenCli, GreedyTextIsIdentical) {
  const json r = output_of({"generate", "-m", folder, "-n", "256", "--temp", "0", "--ignore-eos"});
  EXPECT_EQ(r["tokens"].get<std::vector<int32_t>>(), ints("greedy"));
}

TEST_P(GoldenCli, ScoresAreTheSameInBothDialects) {
  expect_scores(folder);
  const TestFolder work;
  for (const std::string dialect : {"hf", "state-spaces"}) {
    const std::string out = work.path() / dialect;
    const ProgramResult r = run_krait({"convert", folder, out, "--to", dialect});
    // intermediate_size has no place in the config of state-spaces unless it is a multiple.
    if (r.status != 0) {
      EXPECT_EQ(dialect, "state-spaces");
      EXPECT_NE(r.err.find("state-spaces"), std::string::npos) << r.err;
      continue;
    }
    expect_scores(out);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, GoldenCli,
                         testing::Values("bias_sharded", "bias_untied_residual_bf16",
                                         "intermediate_not_double", "large_state_f16",
                                         "state_spaces_odd", "state_spaces_padded",
                                         "untied_no_conv_bias_bf16"),
                         [](const auto& model) { return std::string(model.param); });

}  // namespace
}  // namespace krait
