// The command line with good and with wrong input: results, exit statuses, messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/rng.h"
#include "generate/utf8.h"
#include "tests/cli_fixture.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

TEST_F(Cli, TellsItsVersionAndHelp) {
  const ProgramResult version = run_krait({"--version"});
  EXPECT_EQ(version.status, 0);
  EXPECT_EQ(version.out, "krait 0.1.0\n");
  for (const char* command : {"generate", "chat", "score", "eval", "train", "experiment", "report",
                              "info", "tokenize", "convert", "state", "bench"}) {
    const ProgramResult help = run_krait({command, "--help"});
    EXPECT_EQ(help.status, 0) << command;
    EXPECT_NE(help.out.find("Usage: krait " + std::string(command)), std::string::npos) << help.out;
    EXPECT_EQ(help.err, "");
  }
}

TEST_F(Cli, RefusesBadUsage) {
  EXPECT_EQ(run_krait({}).status, 2);
  expect_failure({"dance"}, 2, {"dance"});
  expect_failure({"generate", "-m", model(), "-p", "a", "--speed", "9"}, 2, {"--speed"});
  expect_failure({"generate", "-m", model()}, 2, {"--prompt"});
  expect_failure({"generate", "-p", "a"}, 2, {"--model"});
  expect_failure({"generate", "-m", model(), "-p", "a", "-n", "many"}, 2, {"many"});
  expect_failure({"generate", "-m", model(), "-p", "a", "--device", "tpu"}, 2, {"--device", "tpu"});
  expect_failure({"generate", "-m", model(), "-p", "a", "--dtype", "f8"}, 2, {"--dtype", "f8"});
  expect_failure({"generate", "-m", model(), "-p", "a", "-f", "b"}, 2, {"--file"});
  expect_failure({"score", "-m", model()}, 2, {"text"});
  expect_failure({"tokenize", "-m", model()}, 2, {"--text"});
  expect_failure({"convert", model(), path("out"), "--to", "gguf"}, 2, {"gguf"});
  expect_failure({"bench", "model", "--train", "8by512"}, 2, {"8by512"});
  for (const char* shape : {"2x64", "2x64x128x16x1", "0x1x1", "2x64x128x300", "2x64xa", "2x64x"})
    expect_failure({"bench", "op", "selective_scan", "--shapes", shape}, 2, {"--shapes", shape});
}

TEST_F(Cli, BenchesAnOpOnSeveralShapes) {
  const ProgramResult run =
      run_krait({"bench", "op", "selective_scan", "--shapes", "2x64x32,1x32x64x8", "--json"});
  ASSERT_EQ(run.status, 0) << run.err;
  std::vector<std::string> shapes;
  for (const auto& row : nlohmann::json::parse(run.out))
    if (row.at("pass") != "step") shapes.push_back(row.at("shape"));
  const std::vector<std::string> expected = {"2x32x64x16", "2x32x64x16", "1x64x32x8", "1x64x32x8"};
  EXPECT_EQ(shapes, expected);
  for (const char* op : {"selective_scan", "causal_conv1d"}) {
    const ProgramResult checked =
        run_krait({"bench", "op", op, "--check", "--shapes", "2x40x32", "--json"});
    ASSERT_EQ(checked.status, 0) << checked.err;
    for (const auto& row : nlohmann::json::parse(checked.out)) {
      EXPECT_EQ(row.contains("error"), row.at("pass") != "step") << row;
      EXPECT_LT(row.value("error", 0.0), 1e-5) << row;
    }
  }
  expect_failure({"bench", "op", "linear", "--check"}, 2, {"--check"});
}

TEST_F(Cli, GeneratesAsJsonAndAsText) {
  const std::vector<std::string> arguments = {"generate", "-m", model(),  "-p", "Hello",
                                              "-n",       "20", "--seed", "3",  "--ignore-eos"};
  std::vector<std::string> as_json = arguments;
  as_json.push_back("--json");
  const json r = output_of(as_json);
  EXPECT_EQ(r["tokens"].size(), 20u);
  EXPECT_EQ(r["finish_reason"], "length");
  const ProgramResult text = run_krait(arguments);
  EXPECT_EQ(text.out, r["text"].get<std::string>() + "\n");
  EXPECT_EQ(text.err, "");

  as_json.insert(as_json.end(), {"--samples", "3", "--batch-invariant"});
  const json several = output_of(as_json);
  ASSERT_EQ(several["samples"].size(), 3u);
  EXPECT_EQ(several["samples"][0]["text"], several["text"]);
}

TEST_F(Cli, ReadsPromptsFromFilesAndStandardInput) {
  const std::string file = folder.file("prompt.txt", "Hello");
  const std::vector<std::string> rest = {"-n", "8", "--temp", "0", "--json", "--ignore-eos"};
  const auto with = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), rest.begin(), rest.end());
    return arguments;
  };
  const json expected = output_of(with({"generate", "-m", model(), "-p", "Hello"}));
  EXPECT_EQ(output_of(with({"generate", "-m", model(), "-f", file})), expected);
  EXPECT_EQ(output_of(with({"generate", "-m", model(), "--tokens", "72 101 108 108 111"})),
            expected);
  ProgramOptions options;
  options.input = "Hello";
  EXPECT_EQ(json::parse(run_krait(with({"generate", "-m", model(), "-f", "-"}), options).out),
            expected);
}

TEST_F(Cli, ScoresAsChunksGiveIt) {
  std::string text;
  for (int i = 0; i < 700; ++i) text += static_cast<char>('a' + i * i % 26);
  const std::string file = folder.file("text.txt", text);
  const json whole = output_of({"score", "-m", model(), "-f", file, "--top", "256", "--json"});
  ASSERT_EQ(whole["tokens"].size(), 700u);
  ASSERT_EQ(whole["logprobs"].size(), 700u);
  EXPECT_TRUE(whole["logprobs"][0].is_null());
  ASSERT_EQ(whole["top"].size(), 256u);
  double sum = 0, last = 0;
  for (const json& t : whole["top"]) {
    sum += std::exp(t[1].get<double>());
    EXPECT_LE(t[1].get<double>(), last);
    last = t[1];
  }
  EXPECT_NEAR(sum, 1, 1e-6);
  // A prefix of the text, token by token and otherwise, has the same numbers.
  const json prefix = output_of({"score", "-m", model(), "--text", text.substr(0, 90), "--json"});
  for (size_t i = 1; i < 90; ++i)
    EXPECT_NEAR(prefix["logprobs"][i].get<double>(), whole["logprobs"][i].get<double>(), 1e-4) << i;
  // The likeliest continuation is what greedy generation writes.
  const json next =
      output_of({"generate", "-m", model(), "-f", file, "-n", "1", "--temp", "0", "--json"});
  EXPECT_EQ(next["tokens"][0], whole["top"][0][0]);
  // eval of the same text is the mean.
  double loss = 0;
  for (size_t i = 1; i < 700; ++i) loss -= whole["logprobs"][i].get<double>() / 699;
  const json eval = output_of({"eval", "-m", model(), "--data", file, "--json"});
  EXPECT_NEAR(eval["loss"], loss, 1e-5);
  EXPECT_NEAR(eval["perplexity"], std::exp(loss), 1e-2);
  EXPECT_NEAR(eval["bits_per_byte"], loss / std::log(2), 1e-5);
  EXPECT_EQ(eval["tokens"], 699);
  EXPECT_NE(output_of({"eval", "-m", model(), "--data", file, "--context", "16", "--json"})["loss"],
            eval["loss"]);
}

TEST_F(Cli, TellsAboutAModel) {
  const json info = output_of({"info", "-m", model(), "--json"});
  EXPECT_EQ(info["parameters"], parameter_count(tiny_config()));
  int64_t sum = 0;
  for (const auto& [group, count] : info["parameters_by_group"].items())
    sum += count.get<int64_t>();
  EXPECT_EQ(sum, parameter_count(tiny_config()));
  EXPECT_EQ(info["state_bytes_per_sequence"], tiny_config().state_bytes_per_sequence());
  EXPECT_EQ(info["config"]["hidden_size"], 32);
  EXPECT_NE(run_krait({"info", "-m", model()}).out.find("d_model"), std::string::npos);
}

TEST_F(Cli, TokenizesBothWays) {
  EXPECT_EQ(output_of({"tokenize", "-m", model(), "--text", "h\xc3\xa9", "--json"})["ids"],
            json({104, 195, 169}));
  EXPECT_EQ(run_krait({"tokenize", "-m", model(), "--text", "hi"}).out, "104 105\n");
  EXPECT_EQ(
      output_of({"tokenize", "-m", model(), "--text", "[104, 105]", "--decode", "--json"})["text"],
      "hi");
  expect_failure({"tokenize", "-m", model(), "--text", "104 x", "--decode"}, 1, {"--text", "x"});
  expect_failure({"tokenize", "-m", model(), "--text", "104 300", "--decode"}, 1, {"300"});
}

TEST_F(Cli, ConvertsThereAndBack) {
  const auto scored = [&](const std::string& at) {
    return output_of({"score", "-m", at, "--tokens", "1 2 3 4 5", "--json"});
  };
  EXPECT_EQ(run_krait({"convert", model(), path("ss"), "--to", "state-spaces"}).status, 0);
  EXPECT_TRUE(fs::exists(path("ss") + "/pytorch_model.bin"));
  EXPECT_EQ(scored(path("ss")), scored(model()));
  EXPECT_EQ(run_krait({"convert", path("ss"), path("hf"), "--to", "hf"}).status, 0);
  EXPECT_EQ(read_text(path("hf") + "/model.safetensors"),
            read_text(model() + "/model.safetensors"));
  EXPECT_EQ(run_krait({"convert", model(), path("bf16"), "--to", "hf", "--dtype", "bf16"}).status,
            0);
  EXPECT_LT(fs::file_size(path("bf16") + "/model.safetensors"),
            fs::file_size(model() + "/model.safetensors") * 3 / 4);
  expect_failure({"convert", model(), path("hf"), "--to", "hf"}, 1, {path("hf"), "already there"});
}

// What nobody else can load is not written as if it were theirs.
TEST_F(Cli, ConvertTellsOfModelsThatAreKraitsAlone) {
  Config control = tiny_config();
  control.selective_B = false;
  write_random_model(path("control"), control);
  expect_failure({"convert", path("control"), path("ss"), "--to", "state-spaces"}, 1,
                 {"cannot hold this model", "selective_B"});
  EXPECT_FALSE(fs::exists(path("ss")));
  const ProgramResult hf = run_krait({"convert", path("control"), path("hf"), "--to", "hf"});
  EXPECT_EQ(hf.status, 0);
  EXPECT_EQ(hf.err.find("warning: "), 0u) << hf.err;
  EXPECT_NE(hf.err.find("only Krait loads"), std::string::npos) << hf.err;
  EXPECT_EQ(run_krait({"convert", model(), path("other"), "--to", "hf"}).err, "");
}

TEST_F(Cli, RefusesMissingAndDamagedFiles) {
  expect_failure({"generate", "-m", path("nowhere"), "-p", "a"}, 1, {path("nowhere")});
  expect_failure({"generate", "-m", model(), "-f", path("nowhere")}, 1, {path("nowhere")});
  expect_failure({"eval", "-m", model(), "--data", path("nowhere")}, 1, {path("nowhere")});
  expect_failure({"eval", "-m", model(), "--data", folder.file("empty", "")}, 1, {"empty"});
  expect_failure({"tokenize", "-m", path("nowhere.json"), "--text", "a"}, 1,
                 {path("nowhere.json")});
  const std::string weights = model() + "/model.safetensors";
  for (const char* command : {"info", "convert", "generate"}) {
    const std::string kind = command;
    expect_failure(kind == "info"      ? Arguments{command, "-m", weights}
                   : kind == "convert" ? Arguments{command, weights, path("x"), "--to", "hf"}
                                       : Arguments{command, "-m", weights, "-p", "a"},
                   1, {weights, "not a folder"});
  }
  const auto bytes = fs::file_size(weights);
  fs::resize_file(weights, bytes - 100);
  expect_failure({"generate", "-m", model(), "-p", "a"}, 1, {"model.safetensors"});
  expect_failure({"info", "-m", model()}, 1, {"model.safetensors"});
  fs::resize_file(weights, 4);
  expect_failure({"info", "-m", model(), "--json"}, 1, {"model.safetensors"});
  fs::remove(weights);
  expect_failure({"generate", "-m", model(), "-p", "a"}, 1, {model(), "model.safetensors"});
}

TEST_F(Cli, RefusesAConfigThatDoesNotFit) {
  const std::string config = model() + "/config.json", good = read_text(config);
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    folder.file("model/config.json", text.replace(at, from.size(), to));
  };
  with("\"silu\"", "\"gelu\"");
  expect_failure({"info", "-m", model()}, 1, {"config.json", "hidden_act", "silu", "gelu"});
  with("\"state_size\": 16", "\"state_size\": 0");
  expect_failure({"info", "-m", model()}, 1, {"config.json", "0"});
  with("\"state_size\": 16", "\"state_size\": \"x\"");
  expect_failure({"info", "-m", model()}, 1, {"config.json", "state_size"});
  with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
  expect_failure({"score", "-m", model(), "--tokens", "1"}, 1, {"model.safetensors", "layers.2"});
  expect_failure({"info", "-m", model()}, 1, {"model.safetensors", "layers.2"});
  with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
  expect_failure({"info", "-m", model()}, 1, {"model.safetensors", "layers.1", "unexpected"});
  with("\"vocab_size\": 256", "\"vocab_size\": 264");
  expect_failure({"score", "-m", model(), "--tokens", "1"}, 1, {"model.safetensors", "264", "256"});
  folder.file("model/config.json", "{");
  expect_failure({"info", "-m", model()}, 1, {"config.json"});
}

TEST_F(Cli, RefusesBadTokensAndPrompts) {
  expect_failure({"generate", "-m", model(), "-p", ""}, 1, {"empty prompt"});
  expect_failure({"generate", "-m", model(), "--tokens", "1 256"}, 1, {"256", "0 to 255"});
  expect_failure({"generate", "-m", model(), "--tokens", "1 -2"}, 1, {"-2"});
  expect_failure({"score", "-m", model(), "--tokens", "1 99999999999"}, 1, {"99999999999"});
  expect_failure({"score", "-m", model(), "--tokens", "256", "--json"}, 1, {"256", "0 to 255"});
  expect_failure({"score", "-m", model(), "--tokens", " "}, 1, {"--tokens"});
  expect_failure({"score", "-m", model(), "--tokens", "1", "--top", "257"}, 1, {"--top", "256"});
  expect_failure({"generate", "-m", model(), "-p", "a", "--temp", "-1"}, 2, {"temp"});
  expect_failure({"generate", "-m", model(), "-p", "a", "--stop", ""}, 2, {"stop"});
  for (const char* seed : {"9223372036854775808", "010", "1.5", "x"})
    expect_failure({"generate", "-m", model(), "-p", "a", "--seed", seed}, 2, {"--seed", seed});
  expect_failure({"score", "-m", model(), "--tokens", "1", "--top", "-1"}, 2, {"--top", "-1"});
  expect_failure({"bench", "model", "--size", "10m", "--train", "1x16", "--quantize", "int8"}, 2,
                 {"--train"});
  expect_failure({"bench", "op", "sample", "--shapes", "8x100x10"}, 2, {"--shapes"});
}

// Weights that are not numbers are an error of every command, and leave nothing on stdout.
TEST_F(Cli, RefusesWeightsThatAreNotNumbers) {
  Model broken = make_random_model(tiny_config(), DType::f32, 1);
  broken.weights.parameters.layers[0].in_proj.ptr<float>()[7] = NAN;
  const std::string path = (folder.path() / "nan").string();
  save_model(path, broken.config(), broken.weights.parameters, Dialect::hf, DType::f32);
  const std::string text = folder.file("text", "some text");
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"score", "-m", path, "--text", "abc", "--json"},
                                             {"score", "-m", path, "--text", "a", "--json"},
                                             {"eval", "-m", path, "--data", text, "--json"}}) {
    const ProgramResult r = run_krait(arguments);
    EXPECT_EQ(r.status, 1) << arguments[0];
    EXPECT_EQ(r.out, "");
    EXPECT_FALSE(r.err.empty());
  }
}

TEST_F(Cli, ConvertDoesNotMakeInfinities) {
  Model large = make_random_model(tiny_config(), DType::f32, 1);
  large.weights.parameters.layers[0].in_proj.ptr<float>()[7] = 1e6f;
  const std::string path = (folder.path() / "large").string();
  save_model(path, large.config(), large.weights.parameters, Dialect::hf, DType::f32);
  const std::string out = (folder.path() / "converted").string();
  expect_failure({"convert", path, out, "--to", "hf", "--dtype", "f16"}, 1, {"in_proj", "65504"});
}

// What there is to compute with; without a GPU, or built without CUDA, that is no failure of the
// question, but one of a command that wants it.
TEST_F(Cli, SaysWhatItCanComputeWith) {
  const json devices = output_of({"info", "--devices", "--json"});
  EXPECT_GE(devices["cpu"]["cores"], 1);
  EXPECT_NE(devices["cpu"]["simd"], "");
  EXPECT_NE(run_krait({"info", "--devices"}).out.find("cores"), std::string::npos);
  expect_failure({"info"}, 2, {"--devices"});
  const json& gpus = devices["cuda"]["gpus"];
  if (!gpus.empty() && gpus[0]["usable"]) {
    const ProgramResult r =
        run_krait({"generate", "-m", model(), "--tokens", "1", "-n", "3", "--device", "cuda"});
    EXPECT_EQ(r.status, 0) << r.err;
    return;
  }
  const std::string data = (folder.path() / "data.txt").string();
  std::ofstream(data) << std::string(5000, 'a');
  const std::string why = (gpus.empty() ? devices["cuda"] : gpus[0])["problem"];
  for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
           {"generate", "-m", model(), "--tokens", "1"},
           {"score", "-m", model(), "--tokens", "1"},
           {"eval", "-m", model(), "--data", data},
           {"bench", "model", "--size", "10m"},
           {"train", "--data", data, "--out", (folder.path() / "run").string(), "--set",
            "train.steps=1"}}) {
    std::vector<std::string> with_device = arguments;
    with_device.insert(with_device.end(), {"--device", "cuda"});
    expect_failure(with_device, 1, {why});
  }
}

TEST_F(Cli, BenchesSeveralSequencesAtOnce) {
  const ProgramResult run =
      run_krait({"bench", "model", "--size", "10m", "--batch", "3", "--prompt", "700", "--gen", "2",
                 "--contexts", "5,9", "--train", "0", "--repeats", "1", "--json"});
  ASSERT_EQ(run.status, 0) << run.err;
  const auto result = nlohmann::json::parse(run.out);
  EXPECT_EQ(result["batch"], 3);
  EXPECT_EQ(result["contexts"], nlohmann::json({5, 9}));
  ASSERT_EQ(result["context_step_us"].size(), 2u);
  for (const auto& step : result["context_step_us"]) EXPECT_GT(step, 0);
  for (const char* rate : {"prefill_tokens_per_s", "first_token_ms", "steady_us_per_token",
                           "decode_tokens_per_s", "decode_gb_per_s"})
    EXPECT_GT(result[rate], 0) << rate;
}

// The CPU beside the reference: 200 tokens of three sequences are more than it reads at once.
TEST_F(Cli, BenchComparesAModelBeforeItTimesIt) {
  for (const char* dtype : {"f32", "bf16"}) {
    const ProgramResult run =
        run_krait({"bench",   "model",       "--config", model(),     "--dtype", dtype,   "--check",
                   "--batch", "3",           "--prompt", "200",       "--gen",   "2",     "--train",
                   "3x40",    "--recompute", "light",    "--repeats", "1",       "--json"});
    ASSERT_EQ(run.status, 0) << run.err;
    const auto error = nlohmann::json::parse(run.out).at("error");
    ASSERT_EQ(error.size(), 4u);
    for (const auto& [what, value] : error.items())
      EXPECT_LT(value, std::string(dtype) == "f32" ? 1e-5 : 2e-2) << dtype << " " << what;
    EXPECT_GT(error.at("gradients"), 0);
  }
  const ProgramResult text = run_krait({"bench", "model", "--config", model(), "--check",
                                        "--prompt", "5", "--gen", "0", "--train", "0"});
  EXPECT_NE(text.out.find("relative error"), std::string::npos) << text.out;
}

TEST_F(Cli, BenchRefusesContextsBehindWhichNothingIsWritten) {
  expect_failure({"bench", "model", "--size", "10m", "--gen", "0", "--contexts", "5"}, 2,
                 {"--contexts", "--gen"});
}

// A tiny experiment, in slices: results on stdout and in the folder.
TEST_F(Cli, RunsAnExperiment) {
  const std::string out = path("experiment");
  const std::vector<std::string> arguments = {"experiment",
                                              "induction-heads",
                                              "--out",
                                              out,
                                              "--seeds",
                                              "3,5",
                                              "--steps",
                                              "20",
                                              "--length",
                                              "16",
                                              "-t",
                                              "1",
                                              "--d-model",
                                              "16",
                                              "--d-state",
                                              "4",
                                              "--max-test-length",
                                              "128",
                                              "--json",
                                              "--eval-sequences",
                                              "8",
                                              "--test-sequences",
                                              "8",
                                              "--resume"};
  std::vector<std::string> slice = arguments;
  slice.insert(slice.end(), {"--seconds", "0.001", "--quiet"});
  const ProgramResult first = run_krait(slice);
  EXPECT_EQ(first.status, 0) << first.err;
  EXPECT_EQ(first.err, "");
  EXPECT_EQ(json::parse(first.out)["complete"], false);
  const json r = output_of(arguments);
  EXPECT_EQ(r["experiment"], "induction-heads");
  EXPECT_EQ(r["complete"], true);
  EXPECT_EQ(r["passed"], false);
  ASSERT_EQ(r["runs"].size(), 2u);
  EXPECT_EQ(r["runs"][1]["seed"], 5);
  EXPECT_EQ(r["runs"][1]["steps"], 20);
  ASSERT_EQ(r["runs"][1]["tests"].size(), 2u);
  EXPECT_EQ(r["runs"][1]["tests"][1]["length"], 128);
  for (const char* file : {"results.json", "table.md", "report.html", "seed-3/config.toml",
                           "seed-5/metrics.jsonl", "seed-5/model/model.safetensors"})
    EXPECT_TRUE(fs::exists(fs::path(out) / file)) << file;
  EXPECT_EQ(output_of({"info", "-m", out + "/seed-5/model", "--json"})["config"]["hidden_size"],
            16);
  std::vector<std::string> control = arguments;
  control.pop_back();
  expect_failure(control, 1, {"seed-3", "--resume"});
  // Refused before anything is written, also where a seed that is not there yet comes first.
  const std::string results = read_text(out + "/results.json");
  const auto refused = [&](const std::vector<std::string>& more,
                           const std::vector<std::string>& parts) {
    std::vector<std::string> other = arguments;
    for (size_t i = 0; i + 1 < more.size(); i += 2) {
      const auto at = std::find(other.begin(), other.end(), more[i]);
      if (at == other.end())
        other.insert(other.end(), {more[i], more[i + 1]});
      else
        at[1] = more[i + 1];
    }
    if (more.size() % 2) other.push_back(more.back());
    expect_failure(other, 1, parts);
    EXPECT_EQ(read_text(out + "/results.json"), results);
    EXPECT_FALSE(fs::exists(out + "/seed-4"));
  };
  refused({"--no-selection"}, {"seed-3/config.toml", "--no-selection", "selective = true"});
  refused({"--seeds", "4,3,5", "--lr", "0.5"}, {"--lr", "0.001", "0.5"});
  refused({"--steps", "10"}, {"--steps", "20", "10"});
  refused({"--test-sequences", "4"}, {"--test-sequences", "8", "4"});
  refused({"--seeds", "5"}, {"results.json", "--seeds", "seed 3"});
}

TEST_F(Cli, ReportsOnlyWhatHasMetrics) {
  const std::string page = path("page.html");
  for (const char* log : {"", "garbage\n\n{\"step\":", "{\"step\": 3}\n", "[1]\n"}) {
    const std::string file = folder.file("run/metrics.jsonl", log);
    expect_failure({"report", path("run"), "-o", page}, 1, {file, "no metrics"});
    expect_failure({"report", path("run")}, 1, {file, "no metrics"});
  }
  fs::rename(path("run") + "/metrics.jsonl", path("run") + "/config.toml");
  expect_failure({"report", path("run"), "-o", page}, 1, {"metrics.jsonl", "no metrics"});
  EXPECT_FALSE(fs::exists(page));
  EXPECT_FALSE(fs::exists(path("run") + "/report.html"));
  // Beside a run that has some, one that has none yet is shown as that.
  folder.file("good/metrics.jsonl", "{\"step\": 3, \"val_loss\": 2.5}\nx\n");
  EXPECT_EQ(run_krait({"report", path("run"), path("good"), "-o", page}).status, 0);
}

TEST_F(Cli, RefusesExperimentsThatDoNotFit) {
  const auto experiment = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"experiment"});
    more.insert(more.end(), {"--out", path("x")});
    return more;
  };
  expect_failure({"experiment", "induction-heads"}, 2, {"--out"});
  expect_failure(experiment({}), 2, {"task"});
  expect_failure(experiment({"sorting"}), 2, {"sorting"});
  expect_failure(experiment({"induction-heads", "--data-tokens", "4"}), 2, {"--data-tokens"});
  expect_failure(experiment({"selective-copying", "--max-position", "4"}), 2, {"--max-position"});
  expect_failure(experiment({"induction-heads", "--seeds", "1,1"}), 2, {"--seeds"});
  expect_failure(experiment({"induction-heads", "--seeds", "1,-1"}), 2, {"--seeds"});
  expect_failure(experiment({"induction-heads", "--steps", "0"}), 1, {"--steps", "0"});
  expect_failure(experiment({"induction-heads", "--lr", "-1"}), 1, {"--lr"});
  expect_failure(experiment({"induction-heads", "--max-test-length", "9"}), 1,
                 {"--max-test-length"});
  for (const auto& [flag, value] :
       std::vector<std::pair<std::string, std::string>>{{"--growth-steps", "-1"},
                                                        {"--max-position", "255"},
                                                        {"--dt-min", "0"},
                                                        {"--dt-min", "5"},
                                                        {"--clip", "-1"},
                                                        {"--beta2", "1"},
                                                        {"--eval-every", "0"}})
    expect_failure(experiment({"induction-heads", flag, value}), 1, {flag});
  EXPECT_FALSE(fs::exists(path("x")));
  const std::string file = folder.file("file", "");
  expect_failure({"experiment", "induction-heads", "--out", file, "--quiet"}, 1, {file});
}

TEST_F(Cli, NoticesAFullDisk) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  ProgramOptions options;
  options.output_to = "/dev/full";
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"info", "-m", model()},
                                             {"score", "-m", model(), "--tokens", "1 2"},
                                             {"generate", "-m", model(), "-p", "a", "-n", "3"},
                                             {"--version"}}) {
    const ProgramResult r = run_krait(arguments, options);
    EXPECT_EQ(r.status, 1) << arguments[0];
    EXPECT_NE(r.err.find("standard output"), std::string::npos) << r.err;
  }
}

TEST_F(Cli, StopsWhenInterrupted) {
  ProgramOptions options;
  options.interrupt_after_ms = 1500;
  const ProgramResult r =
      run_krait({"generate", "-m", model(), "-p", "a", "-n", "-1", "--ignore-eos"}, options);
  EXPECT_EQ(r.status, 130) << r.err;
  EXPECT_FALSE(r.out.empty());
  EXPECT_EQ(r.out.back(), '\n');
  EXPECT_EQ(valid_utf8_prefix(r.out), r.out.size());
}

TEST_F(Cli, ChatsTurnByTurn) {
  const auto chat = [&](const std::string& input) {
    ProgramOptions options;
    options.input = input;
    const ProgramResult r = run_krait({"chat", "-m", model(), "-n", "40", "--temp", "0",
                                       "--user-prefix", "U", "--assistant-prefix", "A"},
                                      options);
    EXPECT_EQ(r.status, 0) << r.err;
    EXPECT_EQ(r.err, "");
    return r.out;
  };
  const std::string first = chat("Hello\n"), both = chat("Hello\nb\n");
  ASSERT_GT(both.size(), first.size());
  EXPECT_EQ(both.substr(0, first.size()), first);
  const std::string second = both.substr(first.size());
  EXPECT_NE(second, chat("b\n")) << "the first turn must matter";
  // A turn that was taken back leaves no trace.
  const std::string undone = chat("Hello\nNonsense\n/undo\nb\n");
  EXPECT_EQ(undone.substr(undone.size() - second.size()), second);
  EXPECT_GT(undone.size(), both.size());
  EXPECT_EQ(chat("Hello\n/reset\nb\n"), first + chat("b\n"));
}

TEST_F(Cli, ScoringALongTextTakesNoMoreMemory) {
  write_random_model(path("wider"), make_config(256, 64, 2));
  const auto peak = [&](size_t tokens) {
    Rng rng(1);
    std::string text;
    for (size_t i = 0; i < tokens; ++i) text += static_cast<char>(1 + rng.below(127));
    const ProgramResult r =
        run_krait({"score", "-m", path("wider"), "-f", folder.file("long", text), "--top", "1",
                   "-t", "1", "--json"});
    EXPECT_EQ(r.status, 0) << r.err;
    EXPECT_EQ(std::count(r.out.begin(), r.out.end(), ','),
              static_cast<std::ptrdiff_t>(2 * tokens + 1));
    return r.peak_bytes;
  };
  const int64_t of_65536 = peak(65536), of_1048576 = peak(1048576);
  EXPECT_LE(of_1048576, of_65536 + (int64_t{64} << 20));
}

}  // namespace
}  // namespace krait
