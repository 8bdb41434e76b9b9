// krait experiment: the paper's two synthetic tasks, learned and tested for several seeds.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <limits>
#include <set>

#include "command.h"
#include "core/mapped_file.h"
#include "formats/json.h"
#include "ops/device.h"
#include "status_line.h"
#include "train/experiment.h"
#include "train/experiment_results.h"
#include "train/progress.h"
#include "train/report.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct ExperimentFlags {
  std::string task, out, device = "cpu", dtype = "f32";
  std::vector<uint64_t> seeds = {1, 2, 3};
  // Other than the paper's.
  std::optional<int64_t> steps, length, data_tokens, max_position, d_model, n_layer, d_state, batch,
      growth_steps, eval_every, save_every, eval_sequences, max_test_length, test_sequences;
  std::optional<double> lr, goal, max_loss, clip, beta2, dt_min;
  double seconds = 0;
  int threads = 0;
  bool no_selection = false, resume = false, quiet = false, json = false;
};

template <class T>
void put(const std::optional<T>& flag, T& setting) {
  if (flag) setting = *flag;
}

ExperimentSettings settings_of(const ExperimentFlags& f) {
  const Task task = task_from_name(f.task);
  const bool copying = task == Task::selective_copying;
  ExperimentSettings s = paper_settings(task);
  if (copying ? f.max_position || f.max_test_length : f.data_tokens.has_value())
    throw UsageError(copying ? "--max-position and --max-test-length are for induction-heads"
                             : "--data-tokens is for selective-copying");
  put(f.steps, s.steps);
  put(f.length, s.task.length);
  put(f.data_tokens, s.task.data_tokens);
  put(f.max_position, s.task.max_position);
  put(f.d_model, s.d_model);
  put(f.n_layer, s.n_layer);
  put(f.d_state, s.d_state);
  put(f.batch, s.batch_size);
  put(f.growth_steps, s.growth_steps);
  put(f.eval_every, s.eval_every);
  put(f.save_every, s.save_every);
  put(f.eval_sequences, s.eval_sequences);
  put(f.test_sequences, s.max_test_sequences);
  put(f.lr, s.lr);
  put(f.goal, s.goal);
  put(f.max_loss, s.max_loss);
  put(f.clip, s.adam.clip);
  put(f.beta2, s.adam.beta2);
  put(f.dt_min, s.dt_min);
  s.min_test_sequences = std::min(s.min_test_sequences, s.max_test_sequences);
  s.selective = !f.no_selection;
  s.dtype = f.dtype;
  s.threads = f.threads;
  if (copying) s.test_lengths = {s.task.length};
  if (f.max_test_length)
    std::erase_if(s.test_lengths, [&](int64_t l) { return l > *f.max_test_length; });
  check_settings(s);
  return s;
}

// Where a seed stands, on stderr: a line that is rewritten on a terminal, else one now and then.
class ExperimentDisplay : public StatusLine {
 public:
  ExperimentDisplay(const ExperimentSettings& settings, bool quiet)
      : StatusLine(quiet), steps_(settings.steps), timer_(terminal() ? 0.2 : 10) {}

  void begin(uint64_t seed) {
    seed_ = seed;
    accuracy_ = "";
    timer_ = ProgressTimer(terminal() ? 0.2 : 10);
    last_step_ = -1;
  }
  void step(const StepMetrics& m) {
    const double steps_per_s = last_step_ < 0 ? 0
                                              : static_cast<double>(m.step - last_step_) /
                                                    std::max(m.elapsed_s - last_elapsed_, 1e-9);
    if (quiet() || !timer_.due(m.elapsed_s, m.step == steps_)) return;
    char text[200];
    std::snprintf(text, sizeof text, "seed %llu  step %lld/%lld  loss %.4f%s  %.1f steps/s",
                  static_cast<unsigned long long>(seed_), static_cast<long long>(m.step),
                  static_cast<long long>(steps_), m.loss, accuracy_.c_str(), steps_per_s);
    show(text);
    last_step_ = m.step;
    last_elapsed_ = m.elapsed_s;
  }
  void eval(const TaskScore& s) {
    char text[64];
    std::snprintf(text, sizeof text, "  accuracy %.2f %%", 100 * s.token_accuracy());
    accuracy_ = text;
  }
  void test(const TaskScore& s) {
    char text[160];
    std::snprintf(text, sizeof text,
                  "seed %llu  tested at length %lld: %lld of %lld answers right, %lld of %lld "
                  "sequences",
                  static_cast<unsigned long long>(seed_), static_cast<long long>(s.length),
                  static_cast<long long>(s.right_answers), static_cast<long long>(s.answers),
                  static_cast<long long>(s.right_sequences), static_cast<long long>(s.sequences));
    line(text);
  }

 private:
  int64_t steps_, last_step_ = -1;
  uint64_t seed_ = 0;
  std::string accuracy_;
  double last_elapsed_ = 0;
  ProgressTimer timer_;
};

// results.json, table.md and report.html of the whole experiment.
void write_results(const ExperimentFlags& flags, const ExperimentSettings& settings,
                   const std::vector<ExperimentResult>& results) {
  const fs::path out = flags.out;
  std::vector<fs::path> runs;
  for (const ExperimentResult& r : results)
    runs.push_back(out / ("seed-" + std::to_string(r.seed)));
  write_file_atomic(out / "results.json", results_json(settings, results).dump(1) + "\n");
  write_file_atomic(out / "table.md", results_table(settings, results));
  write_file_atomic(out / "report.html", report_html(runs));
}

ExperimentResult run_seed(const ExperimentFlags& flags, const ExperimentSettings& settings,
                          ExperimentDisplay& display, const std::function<bool()>& stop) {
  ExperimentEvents events;
  events.step = [&](const StepMetrics& m) { display.step(m); };
  events.eval = [&](int64_t, const TaskScore& s) { display.eval(s); };
  events.test = [&](int64_t, const TaskScore& s) { display.test(s); };
  events.log = [&](const std::string& text) { display.line(text); };
  events.warn = [&](const std::string& text) { display.warning(text); };
  events.stop = stop;
  display.begin(settings.seed);
  Experiment experiment(engine_of_device(flags.device), settings,
                        fs::path(flags.out) / ("seed-" + std::to_string(settings.seed)),
                        flags.resume, events);
  const ExperimentResult result = experiment.run();
  display.clear();
  return result;
}

// All seeds, before anything is written: results.json has the settings once for all of them.
void check_resumed(const ExperimentFlags& flags, ExperimentSettings settings) {
  for (const uint64_t seed : flags.seeds) {
    settings.seed = seed;
    check_resumable(settings, fs::path(flags.out) / ("seed-" + std::to_string(seed)));
  }
  const fs::path file = fs::path(flags.out) / "results.json";
  if (!fs::exists(file)) return;
  const nlohmann::json results = parse_json_file(file);
  for (const nlohmann::json& r : get_array(results, "runs", file.string())) {
    const int64_t seed = get_int(r, "seed", file.string() + ": runs", 0);
    if (std::ranges::find(flags.seeds, static_cast<uint64_t>(seed)) == flags.seeds.end())
      throw Error("--seeds cannot leave out at --resume what is there", file.string(),
                  "seed " + std::to_string(seed) + " among them");
  }
}

int run(const ExperimentFlags& flags) {
  if (std::set(flags.seeds.begin(), flags.seeds.end()).size() != flags.seeds.size())
    throw UsageError("--seeds: a seed is given twice");
  ExperimentSettings settings = settings_of(flags);
  if (flags.resume) check_resumed(flags, settings);
  const Clock::time_point start = Clock::now();
  const auto stop = [&] {
    const double passed_s = std::chrono::duration<double>(Clock::now() - start).count();
    return interrupted() || (flags.seconds > 0 && passed_s >= flags.seconds);
  };
  ExperimentDisplay display(settings, flags.quiet);
  catch_interrupts();
  std::vector<ExperimentResult> results;
  for (const uint64_t seed : flags.seeds) {
    settings.seed = seed;
    results.push_back(run_seed(flags, settings, display, stop));
    write_results(flags, settings, results);
    if (!results.back().tested) break;
  }
  if (!results.back().tested || results.size() < flags.seeds.size())
    display.line("stopped at step " + std::to_string(results.back().step) + " of seed " +
                 std::to_string(results.back().seed) + "; the same command with --resume goes on");
  if (!flags.json) {
    write_stdout(results_table(settings, results));
    return 0;
  }
  nlohmann::ordered_json json = results_json(settings, results);
  json["complete"] = json["complete"].get<bool>() && results.size() == flags.seeds.size();
  json["out"] = flags.out;
  print_json(json);
  return 0;
}

void add_flags(CLI::App& app, ExperimentFlags& f) {
  app.add_option("task", f.task, "selective-copying or induction-heads")
      ->required()
      ->check(CLI::IsMember({"selective-copying", "induction-heads"}));
  app.add_option("--out", f.out, "Folder for the results and the runs")->required();
  app.add_option("--seeds", f.seeds, "Seeds, one run each: 1,2,3")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, std::numeric_limits<int64_t>::max()))
      ->capture_default_str();
  app.add_flag("--no-selection", f.no_selection,
               "The control: delta, B and C do not depend on the input");
  app.add_option("--seconds", f.seconds, "Stop after that time with everything saved; 0: never")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str();
  app.add_flag("--resume", f.resume,
               "Go on from what --out holds, or begin; with the settings it began with, but for "
               "more --steps, more --seeds, --goal, --max-loss and --save-every");
  app.add_option("--device", f.device, "Where to compute: cpu, or cuda: an NVIDIA GPU")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--dtype", f.dtype, "Type of activations and matrix products: f32, bf16")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  app.add_option("-t,--threads", f.threads, "Threads; 0: one per core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_flag("--quiet", f.quiet, "No progress, only warnings");
  app.add_flag("--json", f.json, "Print the results as one JSON object");
}

void add_settings(CLI::App& app, ExperimentFlags& f) {
  const char* const group = "Other than the paper's settings";
  const auto add = [&](const char* name, auto& value, const char* text) {
    app.add_option(name, value, text)->group(group);
  };
  add("--steps", f.steps, "Steps at most (400000; induction: 204800)");
  add("--lr", f.lr, "Learning rate, constant (1e-4; induction: 1e-3)");
  add("--batch", f.batch, "Sequences in a step (64; induction: 8)");
  add("--length", f.length, "Noise tokens (4096); induction: length of a sequence (256)");
  add("--data-tokens", f.data_tokens, "Copying: tokens to remember (16)");
  add("--max-position", f.max_position, "Induction: the special token is among the first (10)");
  add("--max-test-length", f.max_test_length, "Induction: longest test (1048576)");
  add("--test-sequences", f.test_sequences, "Sequences of a test at most (1024; induction: 256)");
  add("--n-layer", f.n_layer, "Layers (2)");
  add("--d-model", f.d_model, "Width (64)");
  add("--d-state", f.d_state, "State size (16)");
  add("--dt-min", f.dt_min, "Of delta's initialization (0.001)");
  add("--clip", f.clip, "Largest norm of the gradient (1); 0: none");
  add("--beta2", f.beta2, "Adam's second moment (0.999)");
  add("--growth-steps", f.growth_steps, "Steps over which the length grows from 8 (0: none)");
  add("--goal", f.goal,
      "Share of right answers that ends training: in a validation, then at every length of the "
      "test "
      "(0.995; induction: 1)");
  add("--max-loss", f.max_loss, "Mean loss of these answers, at most (1; induction: 0.01)");
  add("--eval-every", f.eval_every, "Steps between validations (1000)");
  add("--eval-sequences", f.eval_sequences, "Sequences of a validation (64; induction: 256)");
  add("--save-every", f.save_every, "Steps between checkpoints (10000; induction: 20000)");
}

}  // namespace

void add_experiment_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand(
      "experiment", "Learn and test one of the paper's synthetic tasks: docs/experiments.md");
  const auto flags = std::make_shared<ExperimentFlags>();
  add_flags(*command, *flags);
  add_settings(*command, *flags);
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
