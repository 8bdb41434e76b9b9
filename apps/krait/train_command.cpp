// krait train: a training run from a TOML file and settings, with progress on stderr.
#include <sys/ioctl.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>

#include "command.h"
#include "core/mapped_file.h"
#include "generate/generator.h"
#include "ops/device.h"
#include "status_line.h"
#include "train/progress.h"
#include "train/report.h"
#include "train/trainer.h"

namespace krait {
namespace {

struct TrainFlags {
  std::string config, out, resume, device;
  std::vector<std::string> settings, data;
  bool quiet = false, json = false;
};

std::atomic<bool> stop_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // a signal handler sets it

extern "C" void on_signal(int signal) {
  if (stop_requested.exchange(true)) ::_exit(128 + signal);  // the second signal: at once
}

void catch_signals() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) ::sigaction(signal, &action, nullptr);
}

int terminal_width() {
  struct winsize size {};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col - 1 : 79;
}

// The state of the run on stderr: a bar on a terminal, else a line now and then.
class TrainDisplay : public StatusLine {
 public:
  TrainDisplay(const TrainSettings& train, bool quiet)
      : StatusLine(quiet), timer_(terminal() ? 0.1 : 10) {
    progress_.steps = train.steps;
    progress_.seconds = train.seconds;
  }

  void step(const StepMetrics& m) {
    progress_.step = m.step;
    progress_.loss = smoothed_.next(m.loss);
    progress_.tokens_per_s = rate_.next(m.tokens_per_s);
    progress_.elapsed_s = m.elapsed_s;
    const bool last = progress_.steps > 0 && m.step == progress_.steps;
    if (quiet() || !timer_.due(m.elapsed_s, last)) return;
    show(terminal() ? progress_bar(progress_, terminal_width()) : progress_line(progress_));
  }

  void eval(const EvalMetrics& m) {
    progress_.val_loss = m.loss;
    char text[160];
    std::snprintf(text, sizeof text,
                  "step %lld  validation loss %.4f  perplexity %.3f  bits per byte %.4f",
                  static_cast<long long>(m.step), m.loss, m.perplexity, m.bits_per_byte);
    line(text);
  }

 private:
  // Mean over about the last 20 values.
  struct Smoothed {
    double sum = 0, weight = 0;
    double next(double x) {
      sum = 0.95 * sum + x;
      weight = 0.95 * weight + 1;
      return sum / weight;
    }
  };

  Progress progress_;
  Smoothed smoothed_, rate_;
  ProgressTimer timer_;
};

// What the model writes so far, on stderr.
void show_samples(TrainDisplay& display, const TrainSettings& train, const Tokenizer& tokenizer,
                  int64_t step, const Weights& weights) {
  Context context(engine_of_device(train.device), static_cast<int>(train.threads));
  for (const std::string& prompt : train.sample_prompts) {
    Generator generator(context, weights, tokenizer);
    generator.feed(tokenizer.encode(prompt));
    GenerateOptions options;
    options.max_tokens = train.sample_tokens;
    options.sampling.seed = static_cast<uint64_t>(train.seed);
    const std::vector<Sample> samples = generator.generate(options);
    display.line("sample after step " + std::to_string(step) + ": " + prompt + samples.at(0).text);
  }
}

RunConfig read_config_of(const TrainFlags& flags) {
  std::filesystem::path file = flags.config;
  const std::filesystem::path written = std::filesystem::path(flags.out) / "config.toml";
  if (file.empty() && !flags.resume.empty() && std::filesystem::exists(written)) file = written;
  std::vector<std::string> settings;
  if (!flags.data.empty()) {
    nlohmann::json list = flags.data;  // a JSON list of strings is a TOML one
    settings.push_back("data.train=" + list.dump());
  }
  if (!flags.device.empty()) settings.push_back("train.device=" + flags.device);
  settings.insert(settings.end(), flags.settings.begin(), flags.settings.end());
  return load_run_config(file, settings);
}

void print_result(const TrainFlags& flags, const TrainResult& result) {
  if (!flags.json) {
    write_stdout(result.model.string() + "\n");
    return;
  }
  nlohmann::ordered_json json = {{"steps", result.step},
                                 {"interrupted", result.interrupted},
                                 {"model", result.model.string()},
                                 {"checkpoint", result.checkpoint.string()}};
  if (result.validation) {
    json["val_loss"] = result.validation->loss;
    json["perplexity"] = result.validation->perplexity;
    json["bits_per_byte"] = result.validation->bits_per_byte;
  }
  print_json(json);
}

int run(const TrainFlags& flags) {
  const RunConfig config = read_config_of(flags);
  TrainDisplay display(config.train, flags.quiet);
  TrainerEvents events;
  events.step = [&](const StepMetrics& m) { display.step(m); };
  events.eval = [&](const EvalMetrics& m) { display.eval(m); };
  events.log = [&](const std::string& text) { display.line(text); };
  events.warn = [&](const std::string& text) { display.warning(text); };
  const Tokenizer tokenizer = config.data.tokenizer == "bytes"
                                  ? Tokenizer::bytes()
                                  : Tokenizer::from_file(config.data.tokenizer);
  events.sample = [&](int64_t step, const Weights& weights) {
    show_samples(display, config.train, tokenizer, step, weights);
  };
  catch_signals();
  Trainer trainer(config, flags.out, flags.resume, events);
  display.line(std::to_string(parameter_count(trainer.model_config())) + " parameters, " +
               std::to_string(trainer.text().train.size()) + " training tokens, " +
               std::to_string(trainer.text().validation.size()) + " for validation");
  TrainResult result;
  try {
    result = trainer.run(stop_requested);
  } catch (...) {
    display.clear();
    throw;
  }
  display.clear();
  const std::filesystem::path report = std::filesystem::path(flags.out) / "report.html";
  if (result.logged || !std::filesystem::exists(report))
    write_file_atomic(report, report_html({flags.out}));
  if (result.interrupted)
    display.line("interrupted after step " + std::to_string(result.step) +
                 "; --resume auto continues");
  print_result(flags, result);
  return 0;
}

}  // namespace

void add_train_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand("train", "Train a model on text");
  const auto flags = std::make_shared<TrainFlags>();
  command->add_option("--config", flags->config,
                      "Run file (TOML); docs/training.md lists its keys");
  command
      ->add_option("--set", flags->settings,
                   "section.key=value: overrides the run file; may be repeated")
      ->allow_extra_args(false);
  command->add_option("--data", flags->data, "Text files and folders: the same as data.train");
  command->add_option("--device", flags->device, "cpu or cuda: the same as train.device")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--out", flags->out, "Folder of the run")->required();
  command->add_option("--resume", flags->resume,
                      "auto: the newest checkpoint in --out; or a checkpoint's folder");
  command->add_flag("--quiet", flags->quiet, "No progress, only warnings");
  command->add_flag("--json", flags->json, "Print the result as one JSON object");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
