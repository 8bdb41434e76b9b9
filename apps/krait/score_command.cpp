// krait score: log-probability of every token of a text.
#include <charconv>
#include <cmath>
#include <cstdio>
#include <utility>

#include "command.h"
#include "generate/scorer.h"
#include "generate/state_file.h"
#include "model/weights.h"

namespace krait {
namespace {

struct ScoreFlags {
  ModelFlags model;
  ComputeFlags compute;
  std::string text, tokens, file, tokens_file, state;
  size_t top = 0;
  int64_t chunk = 0;
  bool json = false;
};

// The shortest digits that give the number again; JSON knows no infinity.
template <class T>
std::string digits(T value) {
  if (!std::isfinite(value)) return "null";
  char buffer[32];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, value);
  return std::string(buffer, error == std::errc() ? end : buffer);
}

// {"tokens": [..], "logprobs": [null, ..], "top": [[id, logprob], ..]}. A long text's is written as
// it is computed, so that memory does not grow with it; of a short one nothing is written before
// all is known, so that an error leaves stdout empty.
class JsonOut {
 public:
  void add(const std::string& text) {
    pending_ += text;
    if (pending_.size() > size_t{1} << 20) flush();
  }
  void flush() {
    write_stdout(pending_);
    pending_.clear();
  }

 private:
  std::string pending_;
};

// What is scored: tokens[first], tokens[first + 1], ..; first is 0 where they go on from a state.
struct Scored {
  std::vector<int32_t> tokens;
  size_t first;
};

bool print_as_json(Scorer& scorer, const Scored& scored, size_t top) {
  const std::vector<int32_t>& tokens = scored.tokens;
  JsonOut out;
  out.add("{\"tokens\":[");
  for (size_t i = 0; i < tokens.size(); ++i)
    out.add((i > 0 ? "," : "") + std::to_string(tokens[i]));
  out.add(scored.first == 0 ? "],\"logprobs\":[" : "],\"logprobs\":[null");
  bool first = scored.first == 0;
  const bool complete = scorer.score(tokens, [&](std::span<const float> logprobs) {
    for (const float p : logprobs) out.add((std::exchange(first, false) ? "" : ",") + digits(p));
    return !interrupted();
  });
  out.add("],\"top\":[");
  first = true;
  if (complete)
    for (const auto& [id, logprob] : scorer.top(top))
      out.add((std::exchange(first, false) ? "[" : ",[") + std::to_string(id) + "," +
              digits(logprob) + "]");
  out.add(complete ? "]}\n" : "],\"interrupted\":true}\n");  // the log-probabilities so far
  out.flush();
  return complete;
}

std::string shown(const Tokenizer& tokenizer, int32_t id) {
  return id < tokenizer.size() ? json_string(std::string(tokenizer.token_bytes(id))) : "";
}

void print_row(const char* logprob, int32_t id, const Tokenizer& tokenizer) {
  char line[64];
  std::snprintf(line, sizeof line, "%10s %8d  ", logprob, id);
  write_stdout(line + shown(tokenizer, id) + "\n");
}

bool print_for_people(Scorer& scorer, const Scored& scored, size_t top,
                      const Tokenizer& tokenizer) {
  const std::vector<int32_t>& tokens = scored.tokens;
  if (scored.first == 1) print_row("", tokens[0], tokenizer);
  double sum = 0;
  size_t next = scored.first;
  char number[32];
  const bool complete = scorer.score(tokens, [&](std::span<const float> logprobs) {
    for (const float p : logprobs) {
      std::snprintf(number, sizeof number, "%.4f", static_cast<double>(p));
      print_row(number, tokens[next++], tokenizer);
      sum += p;
    }
    return !interrupted();
  });
  if (!complete) return false;
  if (next > scored.first) {
    char line[128];
    std::snprintf(line, sizeof line, "sum %.4f, perplexity %.4f\n", sum,
                  std::exp(-sum / static_cast<double>(next - scored.first)));
    write_stdout(line);
  }
  if (top > 0) write_stdout("most likely next:\n");
  if (top > 0)
    for (const auto& [id, logprob] : scorer.top(top)) {
      std::snprintf(number, sizeof number, "%.4f", logprob);
      print_row(number, id, tokenizer);
    }
  return true;
}

std::vector<int32_t> input_tokens(const ScoreFlags& flags, const Tokenizer& tokenizer) {
  const std::string& file = flags.file.empty() ? flags.tokens_file : flags.file;
  std::vector<int32_t> tokens;
  std::string where = "--text";
  if (!flags.tokens_file.empty()) {
    where = flags.tokens_file;
    tokens = parse_tokens(read_text_file(file), where);
  } else if (!flags.tokens.empty()) {
    where = "--tokens";
    tokens = parse_tokens(flags.tokens, where);
  } else {
    if (!file.empty()) where = file;
    // What the tokenizer puts in front of a text belongs to its beginning only.
    tokens = tokenizer.encode(file.empty() ? flags.text : read_text_file(file), true,
                              flags.state.empty());
  }
  if (tokens.empty()) throw Error("nothing to score", where, "at least one token", "none");
  return tokens;
}

int run(const ScoreFlags& flags) {
  const Tokenizer tokenizer = flags.model.load_tokenizer();
  const Scored scored = {input_tokens(flags, tokenizer), flags.state.empty() ? size_t{1} : 0};
  const std::unique_ptr<Context> ctx = flags.compute.make_context();
  const Model model = flags.compute.load(flags.model.folder, *ctx);
  check_tokens(scored.tokens, model.config().vocab_size);
  if (flags.top > static_cast<size_t>(model.config().vocab_size))
    throw Error("more tokens asked for than there are", "--top",
                "at most " + std::to_string(model.config().vocab_size), std::to_string(flags.top));
  catch_interrupts();
  Scorer scorer(*ctx, model.weights,
                {.state_dtype = flags.compute.states_dtype(), .chunk = flags.chunk});
  if (!flags.state.empty())
    scorer.continue_from(load_state_file(flags.state, state_owner_of(model)));
  const bool complete = flags.json ? print_as_json(scorer, scored, flags.top)
                                   : print_for_people(scorer, scored, flags.top, tokenizer);
  return complete ? 0 : kInterrupted;
}

}  // namespace

void add_score_command(CLI::App& app, CommandList& out) {
  CLI::App* const command =
      app.add_subcommand("score", "Log-probability of each token of a text (natural logarithm)");
  const auto flags = std::make_shared<ScoreFlags>();
  flags->model.add_to(*command);
  CLI::Option_group* const input = command->add_option_group("input");
  input->add_option("--text", flags->text, "The text");
  input->add_option("--tokens", flags->tokens, "Token ids instead, \"1 2 3\"");
  input->add_option("-f,--file", flags->file, "The text from a file; -: from standard input");
  input->add_option("--tokens-file", flags->tokens_file, "Token ids from a file");
  input->require_option(1);
  command->add_option("--state", flags->state,
                      "The text goes on from this state file (krait state save): its first token "
                      "is scored too");
  command->add_option("--top", flags->top, "Also the K most likely tokens that could follow")
      ->check(CLI::Range(0, 1 << 30));
  add_chunk(*command, flags->chunk);
  flags->compute.add_to(*command);
  flags->compute.add_inference_to(*command);
  command->add_flag("--json", flags->json,
                    "Print {\"tokens\", \"logprobs\", \"top\": [[id, logprob], ..]}");
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
