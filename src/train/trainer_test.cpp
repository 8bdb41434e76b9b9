// Training runs: resuming gives the bits of a run without a stop, failures leave something to
// resume from.
#include "train/trainer.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/rng.h"
#include "model/weights.h"
#include "ops/deferred_engine.h"
#include "ops/device.h"
#include "ops/op_test.h"
#include "train/host_copy.h"
#include "train/test_folder.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

// Text with some structure to learn: words of a small vocabulary.
std::string toy_text(int words, uint64_t seed = 1) {
  static constexpr const char* kWords[] = {"the ", "cat ",   "sat ", "on ",
                                           "a ",   "mat.\n", "and ", "dog "};
  Rng rng(seed);
  std::string text;
  for (int i = 0; i < words; ++i) text += kWords[rng.below(8)];
  return text;
}

struct Toy {
  TestFolder folder;
  std::string text = folder.file("text.txt", toy_text(700));

  RunConfig config(const std::vector<std::string>& more = {}) const {
    std::vector<std::string> settings = {"data.train=" + text,
                                         "model.d_model=16",
                                         "model.n_layer=2",
                                         "model.d_state=4",
                                         "data.seq_len=16",
                                         "data.batch_size=4",
                                         "train.steps=24",
                                         "train.eval_every=10",
                                         "train.eval_tokens=64",
                                         "train.save_every=0",
                                         "data.validation_fraction=0.1",
                                         "train.threads=1",
                                         "optim.lr=0.01"};
    settings.insert(settings.end(), more.begin(), more.end());
    return parse_run_config("", "settings", settings);
  }
  fs::path out(const std::string& name) const { return folder.path() / name; }
};

// Runs until the end or until `stop_at` steps are done; each step takes `pause` longer than it
// must.
TrainResult train(const RunConfig& config, const fs::path& out, const std::string& resume = "",
                  int64_t stop_at = -1, std::chrono::milliseconds pause = {},
                  const Engine* engine = nullptr) {
  std::atomic<bool> stop{false};
  TrainerEvents events;
  events.step = [&](const StepMetrics& m) {
    stop = m.step == stop_at;
    std::this_thread::sleep_for(pause);
  };
  Trainer trainer(config, out, resume, events,
                  engine ? *engine : engine_of_device(config.train.device));
  return trainer.run(stop);
}

// All that must not depend on stops: metrics without the clock, the last checkpoint's tensors and
// cursor.
std::string fingerprint(const fs::path& out, const TrainResult& result) {
  std::string text;
  std::istringstream lines(read_text(out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    auto j = nlohmann::json::parse(line);
    j.erase("tokens_per_s");
    j.erase("elapsed_s");
    text += j.dump() + "\n";
  }
  const auto state = nlohmann::json::parse(read_text(result.checkpoint / "trainer_state.json"));
  return text + state["cursor"].dump() + state["files"].dump();
}

TEST(Trainer, LearnsAndWritesTheRun) {
  const Toy toy;
  const fs::path out = toy.out("run");
  const TrainResult result = train(toy.config({"train.steps=120"}), out);
  EXPECT_EQ(result.step, 120);
  EXPECT_FALSE(result.interrupted);
  ASSERT_TRUE(result.validation.has_value());
  EXPECT_LT(result.validation->loss,
            2.0);  // of log(256) = 5.5 at first; the words' own entropy is about 0.6
  EXPECT_GT(result.validation->loss, 0.4);
  EXPECT_NEAR(result.validation->perplexity, std::exp(result.validation->loss), 1e-9);
  EXPECT_NEAR(result.validation->bits_per_byte, result.validation->loss / std::log(2.0), 1e-9);
  for (const char* name :
       {"config.toml", "metrics.jsonl", "model/config.json", "model/model.safetensors",
        "step-120/optimizer.safetensors", "step-120/trainer_state.json"}) {
    EXPECT_TRUE(fs::exists(out / name)) << name;
  }
  const Model model = load_model(result.model);
  EXPECT_EQ(model.config().d_model, 16);
  EXPECT_EQ(model.config().vocab_size, 256);
  const RunConfig again = load_run_config(out / "config.toml", {});
  EXPECT_EQ(write_run_config(again), read_text(out / "config.toml"));
}

// The stops are before, on and after epoch borders (an epoch is about 42 batches of 64 tokens; 24
// steps of 2 batches cross one).
void expect_resumed_is_straight(const std::vector<std::string>& settings,
                                const Engine* engine = nullptr) {
  const Toy toy;
  const auto config = toy.config(settings);
  const TrainResult straight = train(config, toy.out("straight"), "", -1, {}, engine);
  TrainResult resumed;
  for (const int64_t stop_at : {int64_t{1}, int64_t{7}, int64_t{13}, int64_t{20}, int64_t{-1}}) {
    resumed = train(config, toy.out("resumed"), "auto", stop_at, {}, engine);
    EXPECT_EQ(resumed.interrupted, stop_at > 0);
  }
  EXPECT_EQ(fingerprint(toy.out("resumed"), resumed), fingerprint(toy.out("straight"), straight));
  EXPECT_EQ(read_text(toy.out("resumed") / "model/model.safetensors"),
            read_text(toy.out("straight") / "model/model.safetensors"));
}

TEST(Trainer, ResumedRunIsBitForBitTheStraightOne) {
  for (const std::string mode : {"documents", "stream"})
    for (const std::string accumulation : {"1", "3"})
      expect_resumed_is_straight({"data.mode=" + mode, "optim.accumulation=" + accumulation});
}

TEST(Trainer, OnAnAsynchronousEngineToo) {
  const int64_t before = op_test::deferred_replays();
  for (const std::string mode : {"documents", "stream"})
    for (const std::string accumulation : {"1", "3"})
      expect_resumed_is_straight({"data.mode=" + mode, "optim.accumulation=" + accumulation},
                                 &op_test::deferred_engine());
  EXPECT_GT(op_test::deferred_replays(), before + 100);
}

// Steps that are queued ahead, recorded and replayed give the CPU's run: in stream mode, where
// nothing is padded, every bit of it.
TEST(Trainer, AnAsynchronousEngineGivesTheSameRun) {
  const Toy toy;
  const auto config = toy.config({"data.mode=stream", "train.save_every=7", "train.eval_every=5"});
  const TrainResult cpu = train(config, toy.out("cpu"));
  const TrainResult deferred =
      train(config, toy.out("deferred"), "", -1, {}, &op_test::deferred_engine());
  EXPECT_EQ(fingerprint(toy.out("deferred"), deferred), fingerprint(toy.out("cpu"), cpu));
}

// Bits also do not depend on which steps were queued op by op, recorded or replayed.
TEST(TrainerCuda, ResumedRunIsBitForBitTheStraightOne) {
  op_test::on_cuda([](Context&) {
    for (const std::string mode : {"documents", "stream"})
      for (const std::string accumulation : {"1", "3"})
        for (const std::string dtype : {"f32", "bf16"})
          expect_resumed_is_straight({"train.device=cuda", "data.mode=" + mode,
                                      "optim.accumulation=" + accumulation,
                                      "train.dtype=" + dtype});
  });
}

TEST(Trainer, SameSettingsSameBitsWhateverTheLogging) {
  const Toy toy;
  const TrainResult a = train(toy.config(), toy.out("a"));
  const TrainResult b =
      train(toy.config({"train.save_every=5", "train.keep_last=100"}), toy.out("b"));
  EXPECT_EQ(fingerprint(toy.out("a"), a), fingerprint(toy.out("b"), b));
  const TrainResult c = train(toy.config({"train.seed=2"}), toy.out("c"));
  EXPECT_NE(fingerprint(toy.out("a"), a), fingerprint(toy.out("c"), c));
}

// Steps are reported in order, once each, with what belongs to them, wherever they are computed.
TEST(TrainerCuda, ReportsWhatTheCpuReports) {
  op_test::on_cuda([](Context&) {
    const Toy toy;
    std::map<std::string, std::vector<StepMetrics>> reported;
    for (const std::string device : {"cpu", "cuda"}) {
      TrainerEvents events;
      events.step = [&](const StepMetrics& m) { reported[device].push_back(m); };
      const std::atomic<bool> stop{false};
      Trainer(toy.config({"train.device=" + device}), toy.out(device), "", events).run(stop);
    }
    ASSERT_EQ(reported["cpu"].size(), 24u);
    ASSERT_EQ(reported["cuda"].size(), 24u);
    for (size_t i = 0; i < 24; ++i) {
      const StepMetrics &cpu = reported["cpu"][i], &gpu = reported["cuda"][i];
      EXPECT_EQ(gpu.step, cpu.step);
      EXPECT_EQ(gpu.tokens, cpu.tokens);
      EXPECT_EQ(gpu.lr, cpu.lr);
      EXPECT_NEAR(gpu.loss, cpu.loss, 1e-4) << "step " << i + 1;
      EXPECT_NEAR(gpu.grad_norm, cpu.grad_norm, 1e-3 * cpu.grad_norm) << "step " << i + 1;
    }
  });
}

TEST(TrainerCuda, ARunMayChangeItsDevice) {
  op_test::on_cuda([](Context&) {
    const Toy toy;
    train(toy.config({"train.device=cuda"}), toy.out("run"), "", 9);
    const TrainResult end = train(toy.config({"train.device=cpu"}), toy.out("run"), "auto");
    EXPECT_EQ(end.step, 24);
    const TrainResult cpu = train(toy.config(), toy.out("cpu"));
    EXPECT_NEAR(end.validation->loss, cpu.validation->loss, 1e-3);
  });
}

TEST(TrainerCuda, RecomputingChangesNothing) {
  op_test::on_cuda([](Context&) {
    const Toy toy;
    const TrainResult kept = train(toy.config({"train.device=cuda"}), toy.out("kept"));
    for (const std::string level : {"light", "full"}) {
      const TrainResult recomputed =
          train(toy.config({"train.device=cuda", "train.recompute=" + level}), toy.out(level));
      EXPECT_EQ(fingerprint(toy.out(level), recomputed), fingerprint(toy.out("kept"), kept));
    }
  });
}

TEST(Trainer, Bf16RunsAndResumes) {
  const Toy toy;
  const auto config = toy.config({"train.dtype=bf16"});
  const TrainResult straight = train(config, toy.out("straight"));
  train(config, toy.out("resumed"), "auto", 9);
  const TrainResult resumed = train(config, toy.out("resumed"), "auto");
  EXPECT_EQ(fingerprint(toy.out("resumed"), resumed), fingerprint(toy.out("straight"), straight));
}

TEST(Trainer, FineTunesAModelsFolder) {
  const Toy toy;
  const TrainResult base = train(toy.config({"train.steps=60"}), toy.out("base"));
  const auto config = toy.config({"model.init_from=" + base.model.string(), "train.steps=1",
                                  "optim.lr=1e-9", "optim.min_lr=1e-9"});
  const TrainResult tuned = train(config, toy.out("tuned"));
  ASSERT_TRUE(tuned.validation && base.validation);
  EXPECT_NEAR(tuned.validation->loss, base.validation->loss, 1e-5);
}

void expect_divergence_is_an_error(const std::string& device) {
  const Toy toy;
  const auto base = train(toy.config({"train.steps=2"}), toy.out("base"));
  // A weight that is not a number, as a broken checkpoint would bring.
  Model model = load_model(base.model, DType::f32);
  Parameters parameters = model.weights.parameters;
  OwnedTensor norm(DType::f32, {16});
  norm->ptr<float>()[3] = std::numeric_limits<float>::quiet_NaN();
  parameters.norm_f = norm;
  fs::create_directory(toy.out("nan"));
  save_model(toy.out("nan"), model.config(), parameters, Dialect::hf, DType::f32);
  const std::string message = message_of<Error>([&] {
    train(toy.config({"model.init_from=" + toy.out("nan").string(), "train.device=" + device}),
          toy.out("run"));
  });
  EXPECT_NE(message.find("training has diverged at step 1"), std::string::npos) << message;
  EXPECT_TRUE(list_checkpoints(toy.out("run")).empty());
  EXPECT_EQ(read_text(toy.out("run") / "metrics.jsonl"), "");
}

TEST(Trainer, DivergenceIsAnErrorAndTheOptimizerIsNotApplied) {
  expect_divergence_is_an_error("cpu");
}

TEST(TrainerCuda, DivergenceIsAnErrorAndTheOptimizerIsNotApplied) {
  op_test::on_cuda([](Context&) { expect_divergence_is_an_error("cuda"); });
}

// Also not in a step that was queued before the bad one was seen.
void expect_a_bad_step_changes_nothing(const Engine& engine) {
  const Config config = make_config(32, 16, 2);
  Learner learner(engine, config, {.threads = 1});
  learner.initialize(1);
  Batch batch;
  for (int32_t i = 0; i < 40; ++i) {
    batch.tokens.push_back(i * 7 % 32);
    batch.targets.push_back(i * 5 % 32);
  }
  batch.seq_start = {0, 1, 25, 40};
  batch.target_count = 40;
  const auto step = [&](double scale, int64_t number) {
    learner.accumulate(batch, scale, nullptr);
    learner.update({}, 1e-3, number);
  };
  const auto masters = [&] {
    const HostCopy copy(config, learner.model().masters());
    return op_test::to_double(copy.parameters().layers[1].in_proj);
  };
  const std::vector<double> initial = masters();
  step(1.0 / 40, 1);
  EXPECT_TRUE(std::isfinite(learner.collect().grad_norm));
  const std::vector<double> before = masters();
  EXPECT_NE(before, initial);
  step(std::numeric_limits<double>::infinity(), 2);
  step(1.0 / 40, 3);
  const StepResult bad = learner.collect();
  EXPECT_EQ(bad.step, 2);
  EXPECT_FALSE(std::isfinite(bad.grad_norm));
  EXPECT_EQ(learner.collect().step, 3);
  EXPECT_EQ(masters(), before);
}

TEST(Learner, ABadStepChangesNothing) {
  expect_a_bad_step_changes_nothing(cpu_engine());
  expect_a_bad_step_changes_nothing(op_test::deferred_engine());
}

TEST(LearnerCuda, ABadStepChangesNothing) {
  op_test::on_cuda([](Context& ctx) { expect_a_bad_step_changes_nothing(ctx.engine()); });
}

TEST(Trainer, RefusesWhatCannotContinue) {
  const Toy toy;
  train(toy.config({"train.steps=3"}), toy.out("run"));
  const auto error_of = [&](const std::vector<std::string>& more, const std::string& resume) {
    return message_of<Error>([&] { train(toy.config(more), toy.out("run"), resume); });
  };
  EXPECT_NE(error_of({}, "").find("already holds a run"), std::string::npos);
  const std::string before = read_text(toy.out("run") / "config.toml");
  const std::vector<std::array<std::string, 3>> fixed = {{"data.batch_size", "4", "5"},
                                                         {"model.d_model", "16", "32"},
                                                         {"train.seed", "1", "9"},
                                                         {"train.dtype", "\"f32\"", "\"bf16\""}};
  for (const auto& [key, has, asked] : fixed)
    for (const std::string steps : {"3", "5"})  // nothing left to train, and something
      EXPECT_EQ(error_of({"train.steps=" + steps, key + "=" + asked}, "auto"),
                (toy.out("run") / "config.toml").string() + ": " + key +
                    " cannot change when a run is resumed; expected " + has +
                    " as the run has, got " + asked);
  EXPECT_EQ(read_text(toy.out("run") / "config.toml"), before);
  fs::rename(toy.out("run") / "config.toml", toy.out("kept.toml"));
  EXPECT_NE(error_of({"data.batch_size=5"}, "auto").find("the settings of the checkpoint"),
            std::string::npos);
  fs::rename(toy.out("kept.toml"), toy.out("run") / "config.toml");
  EXPECT_NE(error_of({}, toy.out("none").string()).find("trainer_state.json"), std::string::npos);
  const Toy other;
  other.folder.file("text.txt", toy_text(700, 2));
  EXPECT_NE(error_of({"data.train=" + other.text}, "auto").find("the tokens of the checkpoint"),
            std::string::npos);
  const auto lock_error = [&] {
    TrainerEvents events;
    const Trainer first(toy.config(), toy.out("locked"), "", events);
    return message_of<Error>([&] { train(toy.config(), toy.out("locked")); });
  };
  EXPECT_NE(lock_error().find("another process trains"), std::string::npos);
  EXPECT_EQ(error_of({"train.steps=5"}, "auto"), "");  // longer: allowed
}

TEST(Trainer, ReturnsToAnOlderCheckpointOnRequest) {
  const Toy toy;
  const auto config = toy.config({"train.save_every=6", "train.keep_last=10"});
  const TrainResult straight = train(config, toy.out("run"));
  const std::string before = fingerprint(toy.out("run"), straight);
  const TrainResult again = train(config, toy.out("run"), (toy.out("run") / "step-12").string());
  EXPECT_EQ(fingerprint(toy.out("run"), again), before);
  EXPECT_TRUE(fs::exists(toy.out("run") / "abandoned-step-24"));
  EXPECT_EQ(list_checkpoints(toy.out("run")), (std::vector<int64_t>{6, 12, 18, 24}));
}

TEST(Trainer, SaysThatItStartsAnewWhereCheckpointsWere) {
  const Toy toy;
  const fs::path out = toy.out("run");
  std::vector<std::string> warnings;
  TrainerEvents events;
  events.warn = [&](const std::string& w) { warnings.push_back(w); };
  const std::atomic<bool> never = false;
  const auto run = [&] { Trainer(toy.config({"train.steps=2"}), out, "auto", events).run(never); };
  run();
  EXPECT_TRUE(warnings.empty());  // there was nothing
  std::ofstream(out / "step-2" / "trainer_state.json") << "x";
  run();
  ASSERT_EQ(warnings.size(), 2u);
  EXPECT_EQ(warnings[0].find("passing over a checkpoint"), 0u) << warnings[0];
  EXPECT_EQ(warnings[1], "no intact checkpoint in " + out.string() + ": training starts anew");
}

TEST(Checkpoint, DamageIsSeenAndPassedOver) {
  const Toy toy;
  const fs::path out = toy.out("run");
  train(toy.config({"train.save_every=8", "train.keep_last=3"}), out);
  ASSERT_EQ(list_checkpoints(out), (std::vector<int64_t>{8, 16, 24}));
  std::vector<std::string> warnings;
  const auto latest = [&] {
    return latest_checkpoint(out, [&](const std::string& w) { warnings.push_back(w); });
  };
  EXPECT_EQ(latest()->state.step, 24);
  const auto damage = [&](const std::string& name, auto&& change) {
    std::string bytes = read_text(out / name);
    change(bytes);
    std::ofstream(out / name, std::ios::binary) << bytes;
  };
  Rng rng(5);
  for (const char* name :
       {"model.safetensors", "optimizer.safetensors", "trainer_state.json", "config.json"}) {
    const std::string path = std::string("step-24/") + name, good = read_text(out / path);
    for (int i = 0; i < 40; ++i) {  // one bit anywhere
      damage(path, [&](std::string& b) {
        b[rng.below(b.size())] ^= static_cast<char>(1 << rng.below(8));
      });
      EXPECT_EQ(latest()->state.step, 16) << name;
      damage(path, [&](std::string& b) { b = good; });
    }
    damage(path, [](std::string& b) { b.resize(b.size() / 2); });
    EXPECT_EQ(latest()->state.step, 16);
    fs::remove(out / path);
    EXPECT_EQ(latest()->state.step, 16);
    damage(path, [&](std::string& b) { b = good; });
    EXPECT_EQ(latest()->state.step, 24);
  }
  EXPECT_EQ(warnings.size(), 4u * 42);
  EXPECT_NE(warnings[0].find("step-24/model.safetensors"), std::string::npos) << warnings[0];
  // The run goes on from the intact one.
  damage("step-24/model.safetensors", [](std::string& b) { b.pop_back(); });
  EXPECT_EQ(train(toy.config({"train.steps=30"}), out, "auto").step, 30);
}

TEST(Checkpoint, AFullDiskLeavesTheOlderOneIntact) {
  const Toy toy;
  const fs::path out = toy.out("run");
  train(toy.config({"train.steps=5"}), out);
  // Files may not grow beyond this: the write fails as on a full disk, with another errno.
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{20000, 20000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::string message =
        message_of<Error>([&] { train(toy.config({"train.steps=6"}), out, "auto"); });
    ::_exit(message.find("cannot write: File too large") != std::string::npos ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(list_checkpoints(out), (std::vector<int64_t>{5}));
  for (const auto& entry : fs::directory_iterator(out)) {
    EXPECT_EQ(entry.path().string().find(".tmp-"), std::string::npos) << entry.path();
  }
  EXPECT_EQ(train(toy.config({"train.steps=6"}), out, "auto").step, 6);
}

// kill -9 at random times: what remains is always resumable, and the end is that of a run left
// alone.
TEST(Checkpoint, SurvivesBeingKilled) {
  const Toy toy;
  const auto config = toy.config({"train.steps=120", "train.save_every=3", "train.eval_every=0"});
  const TrainResult straight = train(config, toy.out("straight"));
  const fs::path out = toy.out("killed");
  Rng rng(11);
  int kills = 0;
  for (int attempt = 0; attempt < 12; ++attempt) {
    const pid_t child = ::fork();
    if (child == 0) {
      // The first attempt cannot be over when it is killed, on any machine.
      train(config, out, "auto", -1, std::chrono::milliseconds(2));
      ::_exit(0);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5 + rng.below(120)));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    kills += WIFSIGNALED(status) ? 1 : 0;
    ASSERT_FALSE(WIFEXITED(status) && WEXITSTATUS(status) != 0);
  }
  EXPECT_GT(kills, 0);
  const TrainResult end = train(config, out, "auto");
  EXPECT_EQ(fingerprint(out, end), fingerprint(toy.out("straight"), straight));
}

// Every file with its contents.
std::map<std::string, std::string> contents_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files[entry.path().string()] = read_text(entry.path());
  return files;
}

// Asking again for a run that is over writes nothing, whatever the settings: no step is made with
// them.
TEST(Checkpoint, AFinishedRunStaysAsItIs) {
  const Toy toy;
  const std::vector<std::string> settings = {"train.steps=5", "train.save_every=2",
                                             "train.eval_every=0"};
  const fs::path out = toy.out("run");
  const TrainResult first = train(toy.config(settings), out);
  const auto once = contents_of(out);
  for (const std::string other : {"train.save_every=2", "optim.lr=0.1", "train.steps=4"}) {
    std::vector<std::string> again = settings;
    again.push_back(other);
    const TrainResult result = train(toy.config(again), out, "auto");
    EXPECT_EQ(contents_of(out), once) << other;
    EXPECT_EQ(result.step, 5);
    EXPECT_EQ(result.validation.value().loss, first.validation.value().loss);
  }
}

// Killed behind its last checkpoint, a run still gets its model and its last validation.
TEST(Checkpoint, AFinishedRunGetsWhatItLacks) {
  const Toy toy;
  const auto config = toy.config({"train.steps=5", "train.eval_every=0"});
  const fs::path out = toy.out("run");
  const std::string whole = fingerprint(out, train(config, out));
  const std::string model = read_text(out / "model/model.safetensors");
  std::string log = read_text(out / "metrics.jsonl");
  log.erase(log.rfind("{"));
  std::ofstream(out / "metrics.jsonl") << log;
  std::ofstream(out / "model/model.safetensors") << "of an earlier stop";
  EXPECT_EQ(fingerprint(out, train(config, out, "auto")), whole);
  EXPECT_EQ(read_text(out / "model/model.safetensors"), model);
}

}  // namespace
}  // namespace krait
