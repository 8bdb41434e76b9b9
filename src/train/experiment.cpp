#include "train/experiment.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <deque>

#include "core/mapped_file.h"
#include "train/checkpoint.h"
#include "train/digest.h"
#include "train/experiment_results.h"
#include "train/run_folder.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int64_t kFirstLength = 8;  // of a curriculum
constexpr int64_t kKeptCheckpoints = 2;
// Of the wrong answers that the goal allows, before training ends: the test draws other sequences.
constexpr double kMargin = 0.75;
// Sequences at a length before training ends, for each of the test's.
constexpr int64_t kConfirmation = 4;

Config model_config(const ExperimentSettings& s) {
  Config config = make_config(s.task.embeddings(), s.d_model, s.n_layer);
  config.d_state = s.d_state;
  config.dt_min = s.dt_min;
  config.dt_max = s.dt_max;
  config.tie_embeddings = false;
  config.selective_delta = config.selective_B = config.selective_C = s.selective;
  return config;
}

// What a resumed run must keep: all that its data and its model depend on.
uint32_t digest_of(const ExperimentSettings& s) {
  const TaskSettings& t = s.task;
  std::string text = config_to_json(model_config(s), Dialect::hf);
  for (const int64_t x : {static_cast<int64_t>(t.task), t.vocab_size, t.length, t.data_tokens,
                          t.max_position, s.batch_size, s.growth_steps,
                          static_cast<int64_t>(s.seed), static_cast<int64_t>(s.dtype == "bf16")})
    text += " " + std::to_string(x);
  return crc32c(text);
}

}  // namespace

// A step that was handed to the learner.
struct PendingTaskStep {
  int64_t step, tokens;
  double lr, targets;
};

struct Experiment::Run {
  ExperimentSettings settings;
  ExperimentEvents events;
  RunFolder folder;
  Learner learner;
  TrainerState state;
  ExperimentResult result;
  std::optional<MetricsWriter> metrics;
  Batch batch;
  std::deque<PendingTaskStep> pending;  // oldest first
  double loss_sum = 0;                  // of the steps since the last line
  int64_t loss_steps = 0, loss_tokens = 0;
  Clock::time_point start = Clock::now(), last_line = start;
  double elapsed_before = 0;
  int64_t last_save = -1;

  Run(const Engine& engine, const ExperimentSettings& s, const fs::path& path, ExperimentEvents e)
      : settings(s),
        events(std::move(e)),
        folder(path),
        learner(engine, model_config(s),
                {.dtype = dtype_from_name(s.dtype), .threads = s.threads}) {}

  double elapsed() const {
    return elapsed_before + std::chrono::duration<double>(Clock::now() - start).count();
  }
  bool stopped() const { return events.stop && events.stop(); }
  int64_t length_at(int64_t step) const;
  double learning_rate(int64_t step) const;

  void begin(bool resume);
  void read_result();
  void begin_step();
  void finish_steps(size_t keep);
  void write_line(const StepResult& last, const PendingTaskStep& step);
  // None: the session is to end.
  std::optional<TaskScore> score(int64_t length, int64_t sequences, Purpose purpose,
                                 int64_t stream);
  TaskScore score_validation();
  TaskScore validate();
  bool confirmed(const TaskScore& validation);
  int64_t test_sequences(int64_t length) const;
  void train();
  void test();
  void save();
  void write_result() const;
};

int64_t Experiment::Run::length_at(int64_t step) const {
  const int64_t length = settings.task.length;
  if (step >= settings.growth_steps) return length;
  return kFirstLength + (length - kFirstLength) * step / settings.growth_steps;
}

double Experiment::Run::learning_rate(int64_t step) const {
  const auto steps = static_cast<double>(settings.steps);
  const double left = steps - static_cast<double>(step), tail = settings.decay_fraction * steps;
  return tail > left ? settings.lr * left / tail : settings.lr;
}

void Experiment::Run::begin(bool resume) {
  if (!resume && folder.holds_a_run())
    throw Error("the folder already holds a run", folder.path().string(),
                "--resume, or another --out");
  result.seed = settings.seed;
  std::optional<Checkpoint> from;
  if (resume) from = folder.newest_checkpoint(events.warn);
  if (from) {
    check_resumable(settings, folder.path());
    if (from->state.config_digest != digest_of(settings))
      throw Error("the settings are not those of the checkpoint", from->folder.string(),
                  "task, model, batch and seed as in the config.toml beside it");
    load_checkpoint(*from, learner.model(), learner.moments(), nullptr);
    learner.masters_changed();
    state = from->state;
    elapsed_before = state.elapsed_s;
    last_save = state.step;
    read_result();
    if (events.log) events.log("resuming from " + from->folder.string());
  } else {
    learner.initialize(settings.seed);
    std::error_code ignored;
    fs::remove(folder.path() / kResultFile, ignored);
  }
  state.config_digest = digest_of(settings);
  write_file_atomic(folder.path() / "config.toml", settings_toml(settings));
  metrics.emplace(folder.path(), state.step);
}

// Of a session before this one: training was over then. It counts while the goal was reached or
// the steps have not been raised, and its tests while they are those of these settings.
void Experiment::Run::read_result() {
  const fs::path path = folder.path() / kResultFile;
  if (!fs::exists(path)) return;
  const ExperimentResult before = result_from_file(path);
  const bool goal = before.last && before.last->token_accuracy() >= settings.goal;
  if (before.step != state.step || !(goal || state.step >= settings.steps)) return;
  result.trained = true;
  result.last = before.last;
  for (size_t i = 0; i < std::min(before.tests.size(), settings.test_lengths.size()); ++i) {
    const TaskScore& test = before.tests[i];
    if (test.length != settings.test_lengths[i] || test.sequences != test_sequences(test.length))
      break;
    result.tests.push_back(test);
  }
}

void Experiment::Run::begin_step() {
  const int64_t step = ++state.step, length = length_at(step);
  const TaskSettings& task = settings.task;
  // Of a curriculum's shorter sequences more, so that the work of a step stays the same.
  const int64_t count = settings.batch_size * task.tokens_of(task.length) / task.tokens_of(length);
  make_batch(task, length, count, settings.seed, Purpose::training, step, batch);
  const auto targets = static_cast<double>(batch.target_count);
  const double lr = learning_rate(step);
  learner.accumulate(batch, 1.0 / targets, nullptr);
  learner.update(settings.adam, lr, step);
  const auto tokens = static_cast<int64_t>(batch.tokens.size());
  state.tokens += tokens;
  pending.push_back({step, tokens, lr, targets});
}

// Waits for steps until only `keep` are under way.
void Experiment::Run::finish_steps(size_t keep) {
  while (pending.size() > keep) {
    const PendingTaskStep step = pending.front();
    pending.pop_front();
    const StepResult r = learner.collect();
    if (!std::isfinite(r.loss) || !std::isfinite(r.grad_norm))
      throw Error("training has diverged at step " + std::to_string(step.step),
                  folder.path().string(), "a finite loss and gradient; a lower --lr may help");
    loss_sum += r.loss / step.targets;
    loss_tokens += step.tokens;
    ++loss_steps;
    if (step.step % settings.log_every == 0) write_line(r, step);
  }
}

void Experiment::Run::write_line(const StepResult& last, const PendingTaskStep& step) {
  const Clock::time_point now = Clock::now();
  StepMetrics m;
  m.step = step.step;
  m.tokens = state.tokens;
  for (const PendingTaskStep& later : pending) m.tokens -= later.tokens;
  m.loss = loss_sum / static_cast<double>(loss_steps);
  m.lr = step.lr;
  m.grad_norm = last.grad_norm;
  m.tokens_per_s = static_cast<double>(loss_tokens) /
                   std::max(std::chrono::duration<double>(now - last_line).count(), 1e-9);
  m.elapsed_s = elapsed();
  last_line = now;
  loss_sum = 0;
  loss_steps = loss_tokens = 0;
  metrics->write(m);
  if (events.step) events.step(m);
}

std::optional<TaskScore> Experiment::Run::score(int64_t length, int64_t sequences, Purpose purpose,
                                                int64_t stream) {
  return score_task(learner.context(), learner.model().weights(), settings.task,
                    {length, sequences, settings.seed, purpose, stream}, events.stop);
}

TaskScore Experiment::Run::score_validation() {
  return *score_task(learner.context(), learner.model().weights(), settings.task,
                     {settings.task.length, settings.eval_sequences, settings.seed,
                      Purpose::validation, state.step});
}

TaskScore Experiment::Run::validate() {
  const TaskScore s = score_validation();
  EvalMetrics m;
  m.step = state.step;
  m.tokens = state.tokens;
  m.loss = s.loss;
  m.perplexity = std::exp(s.loss);
  m.scored_tokens = s.answers;
  m.accuracy = s.token_accuracy();
  m.sequence_accuracy = s.sequence_accuracy();
  m.elapsed_s = elapsed();
  metrics->write(m);
  if (events.eval) events.eval(state.step, s);
  last_line = Clock::now();
  return s;
}

int64_t Experiment::Run::test_sequences(int64_t length) const {
  return std::clamp(settings.test_tokens / settings.task.tokens_of(length),
                    settings.min_test_sequences, settings.max_test_sequences);
}

// The longest first: they fail first. Also false when the session is to end.
bool Experiment::Run::confirmed(const TaskScore& validation) {
  const auto good = [&](const TaskScore& s, double margin) {
    return 1 - s.token_accuracy() <= margin * (1 - settings.goal) && s.loss <= settings.max_loss;
  };
  if (!good(validation, 1)) return false;
  return std::all_of(
      settings.test_lengths.rbegin(), settings.test_lengths.rend(), [&](int64_t length) {
        const int64_t stream = state.step << 6 | std::bit_width(static_cast<uint64_t>(length));
        const std::optional<TaskScore> s =
            score(length, kConfirmation * test_sequences(length), Purpose::confirmation, stream);
        if (!s) return false;
        if (good(*s, kMargin)) return true;
        char text[160];
        std::snprintf(
            text, sizeof text,
            "step %lld: not yet at length %lld, %lld of %lld new answers right, loss %.4f",
            static_cast<long long>(state.step), static_cast<long long>(length),
            static_cast<long long>(s->right_answers), static_cast<long long>(s->answers), s->loss);
        if (events.log) events.log(text);
        return false;
      });
}

void Experiment::Run::train() {
  // The next step is prepared and queued while a GPU is at this one.
  const size_t ahead = learner.context().memory().on_host() ? 0 : 1;
  start = last_line = Clock::now();
  if (state.step >= settings.steps) {  // stopped just at the end
    result.last = validate();
    result.trained = true;
  }
  // The session before may have ended while this step was being confirmed.
  if (!result.trained && state.step > 0 && state.step % settings.eval_every == 0) {
    result.last = score_validation();
    result.trained = confirmed(*result.last);
  }
  while (!result.trained && !stopped()) {
    begin_step();
    const bool last = state.step >= settings.steps;
    const bool eval = last || state.step % settings.eval_every == 0;
    const bool keep = last || state.step % settings.save_every == 0;
    finish_steps(eval || keep ? 0 : ahead);
    if (eval) {
      result.last = validate();
      result.trained = confirmed(*result.last) || last;
    }
    if (keep && !result.trained) save();
  }
  finish_steps(0);
  result.step = state.step;
  result.train_s = elapsed();
  // Before the checkpoint, which without it would be trained further.
  if (result.trained) write_result();
  save();
}

void Experiment::Run::test() {
  while (result.tests.size() < settings.test_lengths.size()) {
    if (stopped()) return;
    const int64_t length = settings.test_lengths[result.tests.size()];
    const auto stream = static_cast<int64_t>(result.tests.size());
    const std::optional<TaskScore> s = score(length, test_sequences(length), Purpose::test, stream);
    if (!s) return;
    result.tests.push_back(*s);
    write_result();
    if (events.test) events.test(state.step, result.tests.back());
  }
  result.tested = true;
  write_result();
}

void Experiment::Run::save() {
  if (last_save == state.step) return;
  state.elapsed_s = elapsed();
  const fs::path checkpoint = save_checkpoint(folder.path(), state, learner.model(),
                                              learner.moments(), nullptr, fs::path());
  last_save = state.step;
  prune_checkpoints(folder.path(), kKeptCheckpoints);
  export_model(checkpoint, folder.path());
}

void Experiment::Run::write_result() const {
  write_file_atomic(folder.path() / kResultFile, result_text(result));
}

Experiment::Experiment(const Engine& engine, const ExperimentSettings& settings,
                       const fs::path& folder, bool resume, ExperimentEvents events) {
  check_settings(settings);
  run_ = std::make_unique<Run>(engine, settings, folder, std::move(events));
  run_->begin(resume);
}

Experiment::~Experiment() = default;

ExperimentResult Experiment::run() {
  Run& r = *run_;
  if (r.result.trained) {
    r.result.step = r.state.step;
    r.result.train_s = r.state.elapsed_s;
  } else {
    r.train();
  }
  if (r.result.trained) r.test();
  return r.result;
}

}  // namespace krait
