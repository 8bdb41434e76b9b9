// The synthetic tasks: the sequences, scoring in chunks, and runs that stop and go on.
#include "train/experiment.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "ops/deferred_engine.h"
#include "ops/op_test.h"
#include "train/experiment_results.h"
#include "train/report.h"
#include "train/test_folder.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

Batch batch_of(const TaskSettings& s, int64_t length, int64_t count, uint64_t seed, int64_t step) {
  Batch batch;
  make_batch(s, length, count, seed, Purpose::training, step, batch);
  return batch;
}

TEST(Task, SelectiveCopyingAsksForTheDataTokensInTheirOrder) {
  const TaskSettings s = paper_settings(Task::selective_copying).task;
  const Batch batch = batch_of(s, s.length, 20, 1, 7);
  ASSERT_EQ(batch.num_seqs(), 20);
  EXPECT_EQ(batch.target_count, 20 * 16);
  std::set<int32_t> values;
  std::set<std::vector<int64_t>> arrangements;
  for (int64_t i = 0; i < 20; ++i) {
    const int64_t begin = batch.seq_start[i], end = batch.seq_start[i + 1];
    ASSERT_EQ(end - begin, 4096 + 16 + 16);
    std::vector<int32_t> data, targets;
    std::vector<int64_t> places;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t token = batch.tokens[t];
      const bool marker = t >= end - 16;
      EXPECT_EQ(token == 15, marker);
      EXPECT_EQ(batch.targets[t] >= 0, marker);
      if (marker) targets.push_back(batch.targets[t]);
      if (token != 0 && !marker) {
        data.push_back(token);
        places.push_back(t - begin);
      }
    }
    EXPECT_EQ(data.size(), 16u);
    EXPECT_EQ(data, targets);
    values.insert(data.begin(), data.end());
    arrangements.insert(places);
  }
  EXPECT_EQ(*values.begin(), 1);
  EXPECT_EQ(*values.rbegin(), 14);
  EXPECT_EQ(values.size(), 14u);
  EXPECT_EQ(arrangements.size(), 20u);
}

TEST(Task, InductionAsksForTheTokenAfterTheFirstSpecialOne) {
  const TaskSettings s = paper_settings(Task::induction_heads).task;
  std::set<int64_t> places;
  std::set<int32_t> answers;
  const Batch batch = batch_of(s, 256, 400, 1, 7);
  EXPECT_EQ(batch.target_count, 400);
  for (int64_t i = 0; i < 400; ++i) {
    const auto begin = batch.tokens.begin() + batch.seq_start[i],
               end = batch.tokens.begin() + batch.seq_start[i + 1];
    ASSERT_EQ(end - begin, 256);
    EXPECT_EQ(std::count(begin, end, 16), 2);
    EXPECT_EQ(end[-1], 16);
    const auto first = std::find(begin, end, 16);
    const int64_t last = batch.seq_start[i + 1] - 1;
    EXPECT_EQ(batch.targets[last], first[1]);
    EXPECT_EQ(std::count_if(batch.targets.begin() + batch.seq_start[i],
                            batch.targets.begin() + batch.seq_start[i + 1],
                            [](int32_t t) { return t >= 0; }),
              1);
    places.insert(first - begin);
    answers.insert(first[1]);
  }
  EXPECT_EQ(places.size(), 10u);
  EXPECT_EQ(*places.rbegin(), 9);
  EXPECT_EQ(answers.size(), 16u);
}

TEST(Task, SequencesAreAFunctionOfSeedStreamAndPurpose) {
  for (const Task task : {Task::selective_copying, Task::induction_heads}) {
    const TaskSettings s = paper_settings(task).task;
    const auto tokens = [&](uint64_t seed, int64_t step) {
      return batch_of(s, 100, 3, seed, step).tokens;
    };
    EXPECT_EQ(tokens(1, 5), tokens(1, 5));
    EXPECT_NE(tokens(1, 5), tokens(1, 6));
    EXPECT_NE(tokens(1, 5), tokens(2, 5));
    Batch other;
    make_batch(s, 100, 3, 1, Purpose::test, 5, other);
    EXPECT_NE(tokens(1, 5), other.tokens);
    // In pieces of any size a sequence is the same.
    TaskSequence sequence(s, 100, 1, Purpose::training, 5, 0);
    std::vector<int32_t> pieces(static_cast<size_t>(s.tokens_of(100)));
    for (size_t at = 0, n = 1; at < pieces.size(); at += n, n = n % 7 + 1) {
      n = std::min(n, pieces.size() - at);
      sequence.write({pieces.data() + at, n});
    }
    const std::vector<int32_t> whole = tokens(1, 5);
    EXPECT_TRUE(std::equal(pieces.begin(), pieces.end(), whole.begin()));
  }
}

ExperimentSettings tiny(Task task) {
  ExperimentSettings s = paper_settings(task);
  s.threads = 1;
  s.task.length = 24;
  s.task.data_tokens = 3;
  s.d_model = 16;
  s.d_state = 4;
  s.batch_size = 4;
  s.steps = 30;
  s.log_every = 5;
  s.eval_every = 10;
  s.eval_sequences = 8;
  s.test_lengths = {24, 40};
  s.min_test_sequences = s.max_test_sequences = 8;
  return s;
}

// Long sequences, so that several chunks are read, against the mean loss of the whole batch.
void expect_chunks_as_whole(const Engine& engine) {
  for (const Task task : {Task::selective_copying, Task::induction_heads}) {
    const TaskSettings s = tiny(task).task;
    Config config = make_config(s.embeddings(), 16, 2);
    Learner learner(engine, config, {.threads = 1});
    learner.initialize(1);
    const int64_t length = 5000, sequences = 30;
    Batch batch;
    make_batch(s, length, sequences, 3, Purpose::test, 2, batch);
    const double whole = learner.score(batch, nullptr) / static_cast<double>(batch.target_count);
    const TaskScore score = *score_task(learner.context(), learner.model().weights(), s,
                                        {length, sequences, 3, Purpose::test, 2});
    EXPECT_EQ(score.answers, batch.target_count);
    EXPECT_NEAR(score.loss, whole, 1e-5);
    EXPECT_LE(score.right_sequences, score.right_answers);
  }
}

TEST(TaskScore, InChunksAsWhole) { expect_chunks_as_whole(cpu_engine()); }
TEST(TaskScore, InChunksAsWholeOnAnAsynchronousEngine) {
  expect_chunks_as_whole(op_test::deferred_engine());
}
TEST(TaskScoreCuda, InChunksAsWhole) {
  op_test::on_cuda([](Context& ctx) { expect_chunks_as_whole(ctx.engine()); });
}

// A model that always says the same is right as often as that token is asked for.
TEST(TaskScore, CountsRightAnswers) {
  const TaskSettings s = tiny(Task::selective_copying).task;
  Config config = make_config(s.embeddings(), 16, 1);
  config.tie_embeddings = false;
  Learner learner(cpu_engine(), config, {.threads = 1});
  learner.initialize(1);
  const Parameters& p = learner.model().masters().parameters();
  std::fill_n(p.lm_head.ptr<float>(), p.lm_head.size(), 0.0f);
  learner.masters_changed();
  const TaskScore score =
      *score_task(learner.context(), learner.model().weights(), s, {24, 500, 1, Purpose::test, 0});
  EXPECT_NEAR(score.loss, std::log(16), 1e-6);
  EXPECT_EQ(score.right_answers, 0);  // of equals the first, which is the noise token
  EXPECT_EQ(score.right_sequences, 0);
}

ExperimentResult run(const Engine& engine, const ExperimentSettings& s, const fs::path& folder,
                     bool resume, int64_t stop_after = -1) {
  int64_t asked = 0;
  ExperimentEvents events;
  events.stop = [&] { return stop_after >= 0 && asked++ >= stop_after; };
  Experiment experiment(engine, s, folder, resume, events);
  return experiment.run();
}

void expect_resumed_as_straight(const Engine& engine) {
  for (const Task task : {Task::selective_copying, Task::induction_heads}) {
    const ExperimentSettings s = tiny(task);
    const TestFolder folder;
    const fs::path straight = folder.path() / "straight", resumed = folder.path() / "resumed";
    const ExperimentResult expected = run(engine, s, straight, false);
    EXPECT_EQ(expected.step, 30);
    EXPECT_TRUE(expected.tested);
    for (const int64_t steps : {7, 3, 0, 12}) {
      const ExperimentResult part = run(engine, s, resumed, true, steps);
      EXPECT_FALSE(part.trained);
    }
    EXPECT_FALSE(run(engine, s, resumed, true, 9).tested);  // between the tests
    const ExperimentResult r = run(engine, s, resumed, true);
    EXPECT_EQ(r.step, 30);
    ASSERT_TRUE(r.tested);
    ASSERT_EQ(r.tests.size(), 2u);
    for (size_t i = 0; i < 2; ++i) EXPECT_EQ(r.tests[i].loss, expected.tests[i].loss);
    for (const char* file : {"step-30/model.safetensors", "step-30/optimizer.safetensors",
                             "model/model.safetensors", "config.toml"})
      EXPECT_EQ(read_text(resumed / file), read_text(straight / file)) << file;
    // Once more: nothing is left to do.
    EXPECT_EQ(run(engine, s, resumed, true).tests.size(), 2u);
    EXPECT_NE(report_html({resumed}).find("\"accuracy\":["), std::string::npos);
  }
}

TEST(Experiment, ResumedAsStraight) { expect_resumed_as_straight(cpu_engine()); }
TEST(Experiment, ResumedAsStraightOnAnAsynchronousEngine) {
  expect_resumed_as_straight(op_test::deferred_engine());
}
TEST(ExperimentCuda, ResumedAsStraight) {
  op_test::on_cuda([](Context& ctx) { expect_resumed_as_straight(ctx.engine()); });
}

// Two answers are possible, so guesses will do: the first validation is confirmed. A session that
// ends meanwhile has not ended training; the next one confirms that step, not a later one.
TEST(Experiment, StopsWhileItConfirms) {
  ExperimentSettings s = tiny(Task::selective_copying);
  s.task.vocab_size = 4;
  s.lr = 0.03;
  s.steps = 60;
  s.eval_every = 20;
  s.eval_sequences = s.min_test_sequences = s.max_test_sequences = 64;
  s.goal = 0.01;
  s.max_loss = 100;
  const TestFolder folder;
  const fs::path straight = folder.path() / "straight", resumed = folder.path() / "resumed";
  const ExperimentResult expected = run(cpu_engine(), s, straight, false);
  ASSERT_TRUE(expected.tested);
  ASSERT_EQ(expected.step, s.eval_every);
  // Asked before each step, then in the confirmation.
  const ExperimentResult part = run(cpu_engine(), s, resumed, false, s.eval_every);
  EXPECT_FALSE(part.trained);
  EXPECT_EQ(part.step, s.eval_every);
  const ExperimentResult r = run(cpu_engine(), s, resumed, true);
  EXPECT_EQ(r.step, expected.step);
  ASSERT_TRUE(r.tested);
  EXPECT_EQ(r.tests.back().loss, expected.tests.back().loss);
  EXPECT_TRUE(read_text(resumed / "model/model.safetensors") ==
              read_text(straight / "model/model.safetensors"));
}

// Why a model whose validations are good enough goes on training: guesses are, for this goal, but
// new sequences have to be better.
TEST(Experiment, SaysWhatIsNotConfirmed) {
  ExperimentSettings s = tiny(Task::induction_heads);
  s.goal = 0.01;
  std::vector<std::string> lines;
  ExperimentEvents events;
  events.log = [&](const std::string& line) { lines.push_back(line); };
  const TestFolder folder;
  s.max_loss = 100;
  EXPECT_TRUE(Experiment(cpu_engine(), s, folder.path() / "a", false, events).run().tested);
  ASSERT_FALSE(lines.empty());
  EXPECT_NE(lines[0].find("not yet at length"), std::string::npos) << lines[0];
  lines.clear();
  s.max_loss = 0.01;  // of the validation, too
  EXPECT_TRUE(Experiment(cpu_engine(), s, folder.path() / "b", false, events).run().tested);
  EXPECT_TRUE(lines.empty());
}

TEST(Experiment, MoreStepsGoOnWithTraining) {
  ExperimentSettings s = tiny(Task::induction_heads);
  const TestFolder folder;
  const fs::path path = folder.path() / "run";
  EXPECT_TRUE(run(cpu_engine(), s, path, false).tested);
  s.steps = 40;
  const ExperimentResult r = run(cpu_engine(), s, path, true);
  EXPECT_EQ(r.step, 40);
  EXPECT_TRUE(r.tested);
}

// Settings that no step was made with are not written down for the run.
TEST(Experiment, ResumesWithItsOwnSettingsOnly) {
  const ExperimentSettings mine = tiny(Task::induction_heads);
  const TestFolder folder;
  const fs::path done = folder.path() / "done", part = folder.path() / "part";
  run(cpu_engine(), mine, done, false);
  run(cpu_engine(), mine, part, false, 7);
  const std::string written = read_text(done / "config.toml");
  EXPECT_EQ(read_text(part / "config.toml"), written);
  const auto refused = [&](auto change, const std::string& expected) {
    ExperimentSettings s = mine;
    change(s);
    for (const fs::path& path : {done, part}) {
      const std::string error = message_of<Error>([&] { run(cpu_engine(), s, path, true); });
      EXPECT_EQ(error, (path / "config.toml").string() + ": " + expected);
      EXPECT_EQ(read_text(path / "config.toml"), written);
    }
  };
  using S = ExperimentSettings;
  refused([](S& s) { s.lr = 0.5; },
          "--lr cannot change at --resume; expected lr = 0.001 as the run has, got 0.5");
  refused([](S& s) { s.adam.beta2 = 0.9; },
          "--beta2 cannot change at --resume; expected beta2 = 0.999 as the run has, got 0.9");
  refused([](S& s) { s.adam.clip = 0; },
          "--clip cannot change at --resume; expected clip = 1.0 as the run has, got 0.0");
  refused([](S& s) { s.steps = 20; },
          "--steps cannot become less at --resume; expected at least steps = 30 as the run has, "
          "got 20");
  refused([](S& s) { s.selective = false; },
          "--no-selection cannot change at --resume; expected selective = true as the run has, got "
          "false");
  refused([](S& s) { s.dtype = "bf16"; },
          "--dtype cannot change at --resume; expected dtype = \"f32\" as the run has, got "
          "\"bf16\"");
  refused([](S& s) { s.test_lengths = {24}; },
          "--max-test-length cannot change at --resume; expected test_lengths = [24, 40] as the "
          "run has, got [24]");
  refused([](S& s) { s.eval_every = 5; },
          "--eval-every cannot change at --resume; expected eval_every = 10 as the run has, got 5");
  S other = mine;
  other.goal = 0.9;
  other.max_loss = 2;
  other.save_every = 7;
  EXPECT_TRUE(run(cpu_engine(), other, part, true).tested);
}

TEST(Experiment, RefusesWhatDoesNotFit) {
  ExperimentSettings s = tiny(Task::induction_heads);
  const TestFolder folder;
  const fs::path path = folder.path() / "run";
  run(cpu_engine(), s, path, false);
  const auto error = [&](bool resume) {
    return message_of<Error>([&] { run(cpu_engine(), s, path, resume); });
  };
  EXPECT_NE(error(false).find("already holds a run"), std::string::npos) << error(false);
  s.seed = 2;
  EXPECT_NE(error(true).find("seed cannot change"), std::string::npos) << error(true);
  fs::rename(path / "config.toml", path / "kept.toml");
  EXPECT_NE(error(true).find("not those of the checkpoint"), std::string::npos) << error(true);
  fs::rename(path / "kept.toml", path / "config.toml");
  s.seed = 1;
  folder.file("run/result.json", "{\"seed\": 1, \"steps\": 30, \"train_s\": -");
  EXPECT_NE(error(true).find("result.json"), std::string::npos) << error(true);
  s.lr = NAN;
  EXPECT_NE(error(true).find("--lr"), std::string::npos);
  s = tiny(Task::induction_heads);
  s.task.length = 4;
  EXPECT_NE(error(true).find("--length"), std::string::npos);
  s = tiny(Task::induction_heads);
  s.dtype = "f16";
  EXPECT_NE(error(true).find("f16"), std::string::npos);
}

TEST(ExperimentResults, TableAndOutcome) {
  ExperimentSettings s = paper_settings(Task::induction_heads);
  s.test_lengths = {64, 1024};
  const auto of = [](uint64_t seed, int64_t right) {
    ExperimentResult r;
    r.seed = seed;
    r.step = 5000;
    r.train_s = 90;
    r.trained = r.tested = true;
    r.tests = {{64, 20000, 20000, 20000, 20000, 0.1}, {1024, 20000, 20000, right, right, 0.2}};
    return r;
  };
  const std::vector<ExperimentResult> two = {of(1, 20000), of(2, 19999), of(3, 20000)};
  EXPECT_TRUE(passed(s, two));
  EXPECT_FALSE(passed(s, {of(1, 20000), of(2, 19999), of(3, 10000)}));
  EXPECT_FALSE(passed(s, {of(1, 20000), of(2, 19999)}));
  EXPECT_FALSE(passed(s, {}));
  const std::string table = results_table(s, two);
  EXPECT_NE(table.find("| seed | steps | training | 2^6 | 2^10 |\n"), std::string::npos) << table;
  EXPECT_NE(table.find("| 1 | 5000 | 1.5 min | 100 | 100 |\n"), std::string::npos) << table;
  EXPECT_NE(table.find("| 2 | 5000 | 1.5 min | 100 | 99.99 |\n"), std::string::npos) << table;
  EXPECT_NE(table.find("2 of 3 seeds"), std::string::npos) << table;
  const auto json = results_json(s, two);
  EXPECT_EQ(json["reached"], 2);
  EXPECT_EQ(json["passed"], true);
  EXPECT_EQ(json["runs"][1]["tests"][1]["right_answers"], 19999);
  EXPECT_EQ(json["settings"]["max_loss"], 0.01);
  EXPECT_EQ(json["settings"]["eval_every"], 1000);
  EXPECT_EQ(json["settings"]["eval_sequences"], 256);
  EXPECT_EQ(json["settings"]["test_lengths"], nlohmann::ordered_json({64, 1024}));
  EXPECT_EQ(json["settings"]["max_test_sequences"], 256);
}

}  // namespace
}  // namespace krait
