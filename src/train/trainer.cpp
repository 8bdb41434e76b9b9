#include "train/trainer.h"

#include <chrono>
#include <cmath>
#include <deque>

#include "core/mapped_file.h"
#include "ops/device.h"
#include "train/host_copy.h"
#include "train/run_folder.h"
#include "train/schedule.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

Config new_model_config(const ModelSettings& m, const TrainingText& text) {
  const int64_t vocab_size = m.vocab_size > 0 ? m.vocab_size : (text.vocab_size + 7) / 8 * 8;
  Config config = make_config(vocab_size, m.d_model, m.n_layer);
  config.d_state = m.d_state;
  config.d_conv = m.d_conv;
  config.d_inner = m.d_inner > 0 ? m.d_inner : m.expand * m.d_model;
  if (m.dt_rank > 0) config.dt_rank = m.dt_rank;
  config.tie_embeddings = m.tie_embeddings;
  config.selective_delta = m.selective_delta;
  config.selective_B = m.selective_B;
  config.selective_C = m.selective_C;
  if (text.eos_id) {
    config.eos_token_ids = {*text.eos_id};
    config.bos_token_id = config.pad_token_id = *text.eos_id;
  }
  return config;
}

Config model_config_of(const RunConfig& config, const TrainingText& text) {
  const std::string& base = config.model.init_from;
  const Config model = base.empty() ? new_model_config(config.model, text) : read_config(base);
  check_config(model, base.empty() ? "model" : base + "/config.json");
  if (model.vocab_size < text.vocab_size) {
    throw Error("the model's vocabulary is smaller than the tokenizer's",
                base.empty() ? "model.vocab_size" : base,
                "at least " + std::to_string(text.vocab_size), std::to_string(model.vocab_size));
  }
  return model;
}

void copy_parameters(const fs::path& folder, TrainableModel& to) {
  const Model from = load_model(folder, DType::f32);
  const HostCopy masters(to.config(), to.masters());
  for (const ParameterInfo& info : parameter_table(to.config())) {
    const Tensor& source = info.of(from.weights.parameters);
    const Tensor& target = info.of(masters.parameters());
    std::copy_n(source.ptr<float>(), source.size(), target.ptr<float>());
  }
  masters.write_back(to.masters());
}

AdamWSettings adamw_settings(const OptimSettings& o) {
  return {o.beta1, o.beta2, o.eps, o.weight_decay, o.clip};
}

}  // namespace

// A step that was handed to the learner, until its result is there.
struct PendingStep {
  StepMetrics metrics;  // without what is measured
  int64_t targets, tokens;
  Clock::time_point begin;
};

struct Trainer::Run {
  RunConfig config;
  TrainerEvents events;
  RunFolder folder;
  TrainingText text;
  BatchSource source;
  Learner learner;
  std::optional<DecodeState> stream_state;
  TrainerState state;
  std::optional<MetricsWriter> metrics;  // none: nothing is left to record
  bool untouched = false;                // nothing is written into the folder
  std::optional<EvalMetrics> validation;
  fs::path checkpoint;
  Batch batch;
  Clock::time_point start = Clock::now();
  double elapsed_before = 0;        // of the sessions before this one
  double step_seconds = 0;          // of the last step, without validation and saving
  std::deque<PendingStep> pending;  // oldest first
  Clock::time_point last_result = start;
  int64_t last_eval = -1, last_save = -1;

  Run(const RunConfig& c, const fs::path& path, TrainerEvents e, const Engine& engine)
      : config(c),
        events(std::move(e)),
        folder(path),
        text(load_training_text(c.data)),
        source(text.train, c.data),
        learner(engine, model_config_of(c, text),
                {.dtype = dtype_from_name(c.train.dtype),
                 .threads = static_cast<int>(c.train.threads),
                 .recompute = recompute_from_name(c.train.recompute)}) {
    if (c.data.mode == "stream")
      stream_state.emplace(learner.model().config(), c.data.batch_size, DType::f32,
                           learner.context().memory());
  }

  double elapsed() const { return elapsed_before + seconds_since(start); }
  bool timed() const { return config.train.steps == 0; }
  bool over_after(double seconds) const {
    return (config.train.steps > 0 && state.step >= config.train.steps) ||
           (config.train.seconds > 0 && seconds >= config.train.seconds);
  }
  bool finished() const { return over_after(elapsed()); }
  fs::path tokenizer() const {
    return config.data.tokenizer == "bytes" ? fs::path() : fs::path(config.data.tokenizer);
  }
  void log(const std::string& line) const {
    if (events.log) events.log(line);
  }

  void begin(const std::string& resume);
  bool open_finished();
  void resume_from(const Checkpoint& from);
  double learning_rate() const;
  void begin_step();
  StepMetrics finish_step();
  void report_steps(size_t keep, bool last);
  void evaluate();
  void sample();
  void save();
};

void Trainer::Run::begin(const std::string& resume) {
  if (resume.empty() && folder.holds_a_run()) {
    throw Error("the folder already holds a run", folder.path().string(),
                "--resume auto, or another --out");
  }
  std::optional<Checkpoint> from;
  if (resume == "auto") {
    from = folder.newest_checkpoint(events.warn);
  } else if (!resume.empty()) {
    from = open_checkpoint(resume);
  }
  if (from) {
    resume_from(*from);
  } else if (config.model.init_from.empty()) {
    learner.initialize(static_cast<uint64_t>(config.train.seed));
  } else {
    copy_parameters(config.model.init_from, learner.model());
    learner.masters_changed();
  }
  if (from && open_finished()) return;
  abandon_checkpoints(folder.path(), state.step);
  state.config_digest = run_config_digest(config);
  state.text_digest = text.digest;
  write_file_atomic(folder.path() / "config.toml", write_run_config(config));
  metrics.emplace(folder.path(), state.step);
}

// Whether the folder's own run has nothing left to train. Its config.toml then stays that of the
// steps that were made; asked for again as it is there, a run that was killed at its end gets what
// it lacks.
bool Trainer::Run::open_finished() {
  const fs::path file = folder.path() / "config.toml";
  if (!over_after(elapsed_before) || !fs::exists(file)) return false;
  untouched = MappedFile(file).text() != write_run_config(config);
  const bool validates = text.validation.predictions() > 0;
  if (!untouched && validates && !validation_logged(folder.path(), state.step))
    metrics.emplace(folder.path(), state.step);
  log("nothing is left to train after step " + std::to_string(state.step));
  return true;
}

void Trainer::Run::resume_from(const Checkpoint& from) {
  const auto mismatch = [&](const char* what, const char* expected) {
    throw Error(std::string(what) + " of the checkpoint are not those of this run",
                from.folder.string(), expected);
  };
  const fs::path beside =
      (from.folder.has_filename() ? from.folder : from.folder.parent_path()).parent_path();
  if (fs::exists(beside / "config.toml")) check_resumable(config, beside / "config.toml");
  if (from.state.config_digest != run_config_digest(config)) {
    mismatch("the settings", "[model] and [data] as in the config.toml beside it");
  }
  if (from.state.text_digest != text.digest)
    mismatch("the tokens", "the text that the run began with");
  load_checkpoint(from, learner.model(), learner.moments(),
                  stream_state ? &*stream_state : nullptr);
  learner.masters_changed();
  state = from.state;
  source.seek(state.cursor);
  elapsed_before = state.elapsed_s;
  last_save = state.step;
  checkpoint = from.folder;
  log("resuming from " + from.folder.string());
}

double Trainer::Run::learning_rate() const {
  const OptimSettings& o = config.optim;
  Schedule schedule{o.lr, o.min_lr, o.schedule == "cosine"};
  double done = static_cast<double>(state.step + 1);
  if (timed()) {
    schedule.total = config.train.seconds;
    done = std::min(elapsed() + step_seconds, schedule.total);
    // In seconds, as the steps so far have taken on average.
    schedule.warmup = o.warmup_steps > 0 ? static_cast<double>(o.warmup_steps) * elapsed() /
                                               static_cast<double>(std::max<int64_t>(state.step, 1))
                                         : o.warmup_fraction * schedule.total;
  } else {
    schedule.total = static_cast<double>(config.train.steps);
    schedule.warmup = o.warmup_steps > 0 ? static_cast<double>(o.warmup_steps)
                                         : std::floor(o.warmup_fraction * schedule.total);
  }
  return schedule.at(done);
}

// Hands the next step to the learner. The run's state is then that after the step.
void Trainer::Run::begin_step() {
  PendingStep step = {.metrics = {}, .targets = 0, .tokens = 0, .begin = Clock::now()};
  step.metrics.lr = learning_rate();
  for (int64_t i = 0; i < config.optim.accumulation; ++i) {
    source.next(batch);
    if (stream_state && batch.reset_state) stream_state->reset();
    // Every batch has the same number of targets.
    const double scale = 1.0 / static_cast<double>(batch.target_count * config.optim.accumulation);
    learner.accumulate(batch, scale, stream_state ? &*stream_state : nullptr);
    step.targets += batch.target_count;
    step.tokens += static_cast<int64_t>(batch.tokens.size());
  }
  learner.update(adamw_settings(config.optim), step.metrics.lr, state.step + 1);
  ++state.step;
  state.tokens += step.tokens;
  state.cursor = source.cursor();
  step.metrics.step = state.step;
  step.metrics.tokens = state.tokens;
  pending.push_back(step);
}

// Waits for the oldest step.
StepMetrics Trainer::Run::finish_step() {
  const PendingStep step = pending.front();
  pending.pop_front();
  const StepResult result = learner.collect();
  StepMetrics m = step.metrics;
  m.loss = result.loss / static_cast<double>(step.targets);
  m.grad_norm = result.grad_norm;
  if (!std::isfinite(m.loss) || !std::isfinite(m.grad_norm)) {
    throw Error(
        "training has diverged at step " + std::to_string(m.step), folder.path().string(),
        "a finite loss and gradient; a lower optim.lr may help",
        "loss " + std::to_string(m.loss) + ", gradient norm " + std::to_string(m.grad_norm));
  }
  step_seconds = seconds_since(std::max(step.begin, last_result));
  last_result = Clock::now();
  m.tokens_per_s = static_cast<double>(step.tokens) / std::max(step_seconds, 1e-9);
  m.elapsed_s = elapsed();
  return m;
}

// Reports steps until only `keep` are under way. last: the newest ends the run.
void Trainer::Run::report_steps(size_t keep, bool last) {
  while (pending.size() > keep) {
    const StepMetrics m = finish_step();
    if (m.step % config.train.log_every == 0 || (last && pending.empty())) metrics->write(m);
    if (events.step) events.step(m);
  }
}

void Trainer::Run::evaluate() {
  if (text.validation.predictions() == 0 || last_eval == state.step) return;
  last_eval = state.step;
  ValidationSource validation_source(text.validation, config.data, config.train.eval_tokens);
  std::optional<DecodeState> rows;
  if (stream_state)
    rows.emplace(learner.model().config(), validation_source.rows(), DType::f32,
                 learner.context().memory());
  EvalMetrics m;
  double loss = 0;
  int64_t bytes = 0;
  while (validation_source.next(batch)) {
    loss += learner.score(batch, rows ? &*rows : nullptr);
    m.scored_tokens += batch.target_count;
    bytes += text.bytes_of(batch.targets);
  }
  m.step = state.step;
  m.tokens = state.tokens;
  m.loss = loss / static_cast<double>(m.scored_tokens);
  m.perplexity = std::exp(m.loss);
  m.bits_per_byte = loss / std::log(2.0) / static_cast<double>(bytes);
  m.elapsed_s = elapsed();
  if (metrics) metrics->write(m);
  validation = m;
  if (events.eval) events.eval(m);
}

void Trainer::Run::sample() {
  if (!events.sample) return;
  learner.context().engine().synchronize(learner.context());  // others compute with the weights
  events.sample(state.step, learner.model().weights());
}

void Trainer::Run::save() {
  if (last_save == state.step) return;
  state.elapsed_s = elapsed();
  checkpoint = save_checkpoint(folder.path(), state, learner.model(), learner.moments(),
                               stream_state ? &*stream_state : nullptr, tokenizer());
  last_save = state.step;
  prune_checkpoints(folder.path(), config.train.keep_last);
}

Trainer::Trainer(const RunConfig& config, const fs::path& folder, const std::string& resume,
                 TrainerEvents events)
    : Trainer(config, folder, resume, std::move(events), engine_of_device(config.train.device)) {}

Trainer::Trainer(const RunConfig& config, const fs::path& folder, const std::string& resume,
                 TrainerEvents events, const Engine& engine)
    : run_(std::make_unique<Run>(config, folder, std::move(events), engine)) {
  run_->begin(resume);
}

Trainer::~Trainer() = default;

const Config& Trainer::model_config() const { return run_->learner.model().config(); }
const TrainingText& Trainer::text() const { return run_->text; }
int64_t Trainer::first_step() const { return run_->state.step; }

TrainResult Trainer::run(const std::atomic<bool>& stop) {
  Run& r = *run_;
  const TrainSettings& t = r.config.train;
  const auto due = [&r](int64_t every) { return every > 0 && r.state.step % every == 0; };
  // The next step is prepared and queued while a GPU is at this one.
  const size_t ahead = r.learner.context().memory().on_host() ? 0 : 1;
  r.start = r.last_result = Clock::now();
  while (!r.finished() && !stop) {
    r.begin_step();
    const bool last = r.finished();
    const bool pause = last || due(t.eval_every) || due(t.sample_every) || due(t.save_every);
    r.report_steps(pause ? 0 : ahead, last);
    if (due(t.eval_every) && !last) r.evaluate();
    if (due(t.sample_every) && !last) r.sample();
    if (due(t.save_every)) r.save();
  }
  r.report_steps(0, r.finished());
  TrainResult result;
  result.interrupted = !r.finished();
  r.save();
  if (!r.untouched) export_model(r.checkpoint, r.folder.path());
  if (!result.interrupted) {
    r.evaluate();
    if (!t.sample_prompts.empty()) r.sample();
  }
  result.step = r.state.step;
  result.logged = r.metrics.has_value();
  result.validation = r.validation;
  result.model = r.folder.path() / "model";
  result.checkpoint = r.checkpoint;
  return result;
}

}  // namespace krait
