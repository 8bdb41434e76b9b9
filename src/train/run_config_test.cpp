#include "train/run_config.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "model/config.h"
#include "train/test_folder.h"

namespace krait {
namespace {

const std::string kMinimal = "[data]\ntrain = [\"/text\"]\n[train]\nsteps = 100\n";

std::string error_of(const std::string& text, const std::vector<std::string>& settings = {}) {
  return message_of<Error>([&] { parse_run_config(text, "run.toml", settings); });
}

TEST(RunConfig, DefaultsAreThePapersImprovedRecipe) {
  const RunConfig c = parse_run_config(kMinimal, "run.toml", {});
  EXPECT_EQ(c.optim.beta1, 0.9);
  EXPECT_EQ(c.optim.beta2, 0.95);
  EXPECT_EQ(c.optim.weight_decay, 0.1);
  EXPECT_EQ(c.optim.clip, 1.0);
  EXPECT_EQ(c.optim.min_lr, 1e-5);
  EXPECT_EQ(c.optim.warmup_fraction, 0.1);
  EXPECT_EQ(c.model.d_state, 16);
  EXPECT_EQ(c.model.d_model, 256);
}

TEST(RunConfig, WhatIsWrittenReadsBackAndIsComplete) {
  const RunConfig c = parse_run_config(
      kMinimal, "run.toml",
      {"optim.lr=0.0123", "data.separator=a\"b\\\n\t\x01 é", "train.sample_prompts=[\"x\", 'y']",
       "model.size=130m", "optim.eps=1e-12", "data.shuffle=false", "train.seconds=90"});
  const std::string text = write_run_config(c);
  const RunConfig again = parse_run_config(text, "config.toml", {});
  EXPECT_EQ(write_run_config(again), text);
  EXPECT_EQ(again.data.separator, "a\"b\\\n\t\x01 é");
  EXPECT_EQ(again.optim.lr, 0.0123);
  EXPECT_EQ(again.optim.eps, 1e-12);
  EXPECT_EQ(again.train.sample_prompts, (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(again.model.d_model, 768);
  EXPECT_EQ(again.model.n_layer, 24);
  EXPECT_FALSE(again.data.shuffle);
  EXPECT_EQ(run_config_digest(again), run_config_digest(c));
}

TEST(RunConfig, LaterSettingsWin) {
  const RunConfig c =
      parse_run_config(kMinimal + "seed = 5\n", "run.toml",
                       {"train.seed=6", "train.seed=7", "data.train=other", "optim.lr=1"});
  EXPECT_EQ(c.train.seed, 7);
  EXPECT_EQ(c.optim.lr, 1.0);  // a whole number is a number
  EXPECT_EQ(c.data.train.size(), 1u);
  EXPECT_EQ(c.data.train[0], std::filesystem::absolute("other").string());
}

TEST(RunConfig, ErrorsNameFileKeyAndExpectation) {
  EXPECT_EQ(error_of("[data]\ntrain=['a']\nsedd = 1\n").substr(0, 47),
            "run.toml: unknown key \"data.sedd\"; expected one");
  EXPECT_EQ(
      error_of("[dat]\n"),
      "run.toml: unknown key \"dat\"; expected one of the sections [model] [data] [optim] [train]");
  EXPECT_EQ(error_of("steps = 3\n").substr(0, 30), "run.toml: unknown key \"steps\";");
  EXPECT_EQ(error_of("[optim]\nlr = \"high\"\n"),
            "run.toml, optim.lr: wrong type; expected a number above 0, at most 10, got \"high\"");
  EXPECT_EQ(
      error_of("[model]\nd_conv = 5\n"),
      "run.toml, model.d_conv: value out of range; expected a whole number from 2 to 4, got 5");
  EXPECT_EQ(error_of("[train]\nsteps = 1.5\n"),
            "run.toml, train.steps: wrong type; expected a whole number of at least 0, got 1.5");
  EXPECT_EQ(error_of("[data]\nmode = \"streams\"\n"),
            "run.toml, data.mode: unknown value; expected one of \"documents\" \"stream\", got "
            "\"streams\"");
  EXPECT_EQ(error_of("[data]\ntrain = \"x\"\n"),
            "run.toml, data.train: wrong type; expected a list of strings, got \"x\"");
  EXPECT_EQ(error_of("[data]\ntrain = [1]\n"),
            "run.toml, data.train: wrong type; expected a list of strings, got a list with 1");
  EXPECT_EQ(error_of("[data\n").substr(0, 34), "run.toml, line 1: not valid TOML: ");
  EXPECT_EQ(error_of("[data]\nshuffle = 1\n"),
            "run.toml, data.shuffle: wrong type; expected true or false, got 1");
  EXPECT_EQ(
      error_of("[optim]\nlr = nan\n"),
      "run.toml, optim.lr: value out of range; expected a number above 0, at most 10, got nan");
}

TEST(RunConfig, ErrorsInSettingsNameTheSetting) {
  EXPECT_EQ(error_of(kMinimal, {"optim.lr"}),
            "--set optim.lr: no \"=\" in the setting; expected section.key=value");
  EXPECT_EQ(error_of(kMinimal, {"optim.lrr=1"}).substr(0, 44),
            "--set optim.lrr=1: unknown key \"optim.lrr\"; ");
  EXPECT_EQ(
      error_of(kMinimal, {"train.steps=many"}),
      "--set train.steps=many: wrong type; expected a whole number of at least 0, got \"many\"");
  EXPECT_EQ(error_of(kMinimal, {"data.batch_size=0"}).substr(0, 41),
            "--set data.batch_size=0: value out of ran");
  // A value cannot smuggle in further keys.
  EXPECT_NE(error_of(kMinimal, {"train.steps=1\nlog_every = 2"}), "");
}

TEST(RunConfig, ContradictionsAreErrors) {
  EXPECT_EQ(error_of("[train]\nsteps = 1\n"),
            "run.toml, data.train: no training text; expected at least one file or folder");
  EXPECT_EQ(error_of("[data]\ntrain = ['a']\n"),
            "run.toml: the run has no end; expected train.steps or train.seconds above 0");
  EXPECT_NE(error_of(kMinimal, {"optim.lr=1e-6"}).find("optim.min_lr"), std::string::npos);
  EXPECT_NE(error_of(kMinimal, {"optim.warmup_steps=101"}).find("optim.warmup_steps"),
            std::string::npos);
  EXPECT_NE(error_of(kMinimal, {"model.size=130m", "model.d_model=8"}).find("both given"),
            std::string::npos);
}

// What a run has written, with the command that began it.
TEST(RunConfig, ThePresetMayBeGivenAgain) {
  const std::vector<std::string> command = {"model.size=tiny"};
  const std::string text = write_run_config(parse_run_config(kMinimal, "run.toml", command));
  const RunConfig again = parse_run_config(text, "config.toml", command);
  EXPECT_EQ(write_run_config(again), text);
  EXPECT_EQ(parse_run_config(text, "config.toml", {"model.size=130m"}).model.d_model, 768);
}

TEST(RunConfig, SizesOfAModelToFineTuneComeFromIt) {
  const TestFolder folder;
  Config base = make_config(300, 96, 5);
  base.d_state = 8;
  base.d_inner = 160;
  base.tie_embeddings = false;
  folder.file("config.json", config_to_json(base, Dialect::hf));
  const std::string init = "model.init_from=" + folder.path().string();
  const RunConfig c = parse_run_config(kMinimal, "run.toml", {init, "model.d_state=8"});
  EXPECT_EQ(c.model.d_model, 96);
  EXPECT_EQ(c.model.n_layer, 5);
  EXPECT_EQ(c.model.d_inner, 160);
  EXPECT_EQ(c.model.vocab_size, 300);
  EXPECT_FALSE(c.model.tie_embeddings);
  const std::string text = write_run_config(c);
  EXPECT_EQ(write_run_config(parse_run_config(text, "config.toml", {})), text);
  for (const char* other :
       {"model.d_model=64", "model.n_layer=4", "model.d_state=16", "model.d_inner=192",
        "model.vocab_size=304", "model.tie_embeddings=true", "model.selective_B=false",
        "model.size=tiny"}) {
    const std::string key = std::string(other).substr(0, std::string(other).find('='));
    const std::string error = error_of(kMinimal, {init, other});
    EXPECT_EQ(error.substr(0, 10 + key.size()), "run.toml, " + key) << error;
    EXPECT_NE(error.find("not the size of the model to fine-tune"), std::string::npos) << error;
  }
  EXPECT_NE(error_of(kMinimal, {"model.init_from=/nowhere"}).find("/nowhere"), std::string::npos);
}

TEST(RunConfig, DigestIsOfWhatAResumedRunMustKeep) {
  const auto digest = [](const std::string& setting) {
    return run_config_digest(parse_run_config(kMinimal, "run.toml", {setting}));
  };
  const uint32_t base = digest("train.steps=100");
  EXPECT_EQ(digest("train.steps=200"), base);
  EXPECT_EQ(digest("optim.lr=1e-4"), base);
  EXPECT_NE(digest("data.seed=9"), base);
  EXPECT_NE(digest("data.batch_size=9"), base);
  EXPECT_NE(digest("model.d_state=9"), base);
}

}  // namespace
}  // namespace krait
