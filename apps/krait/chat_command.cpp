// krait chat: a conversation, turn by turn. All that the model remembers is its state, so taking a
// turn back is putting an earlier state in place.
#include <editline/readline.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>

#include "command.h"
#include "generate/state_file.h"
#include "model/weights.h"

namespace krait {
namespace {

struct ChatFlags {
  ModelFlags model;
  ComputeFlags compute;
  SamplingFlags sampling;
  std::string state, system, user = "User:", assistant = "Assistant:";
};

constexpr const char* kHelp =
    "  /undo   take the last turn back\n  /reset  begin anew\n  /quit   leave (as does Ctrl-D)";

// One line; nullopt at the end of the input. On a terminal with editing and a history.
std::optional<std::string> read_line() {
  if (isatty(STDIN_FILENO)) {
    char* const line = ::readline("> ");
    if (!line) return std::nullopt;
    std::string text = line;
    std::free(line);
    if (!text.empty()) add_history(text.c_str());
    return text;
  }
  std::string text;
  if (!std::getline(std::cin, text)) return std::nullopt;
  return text;
}

class Chat {
 public:
  // start: what the conversation begins behind; none: at the beginning of a text.
  Chat(const ChatFlags& flags, std::optional<SavedConversation> start, Generator& generator,
       const Tokenizer& tokenizer)
      : flags_(flags),
        start_(std::move(start)),
        options_(flags.sampling.resolve()),
        generator_(generator),
        tokenizer_(tokenizer) {
    options_.stop.push_back("\n" + flags.user);
    begin();
  }

  void begin() {
    if (start_)
      generator_.restore(*start_);
    else
      generator_.reset();
    before_.clear();
    user_written_ = false;
    if (!flags_.system.empty())
      generator_.feed(tokenizer_.encode(flags_.system + "\n", true, generator_.empty()));
  }

  bool undo() {
    if (before_.empty()) return false;
    generator_.restore(before_.back().conversation);
    user_written_ = before_.back().user_written;
    before_.pop_back();
    return true;
  }

  void turn(const std::string& line) {
    before_.push_back({generator_.save(), user_written_});
    // Where the model itself has begun the user's turn, it is not begun again.
    const std::string intro = user_written_ ? "" : (generator_.empty() ? "" : "\n") + flags_.user;
    generator_.feed(
        tokenizer_.encode(intro + " " + line + "\n" + flags_.assistant, true, generator_.empty()),
        [] { return !interrupted(); });
    if (interrupted()) return;
    const std::vector<Sample> samples =
        generator_.generate(options_, [](int64_t, std::string_view text) {
          write_stdout(text);
          flush_stdout();
          return !interrupted();
        });
    user_written_ = samples[0].finish_reason == FinishReason::stop &&
                    samples[0].tokens.size() > 0 && ends_with_user(samples[0]);
    write_stdout("\n");
    flush_stdout();
    options_.sampling.seed += 1;
  }

 private:
  struct Before {
    SavedConversation conversation;
    bool user_written;
  };

  bool ends_with_user(const Sample& sample) const {
    const std::string written = tokenizer_.decode(sample.tokens, true);
    return written.size() >= flags_.user.size() &&
           written.compare(written.size() - flags_.user.size(), std::string::npos, flags_.user) ==
               0;
  }

  const ChatFlags& flags_;
  std::optional<SavedConversation> start_;
  GenerateOptions options_;
  Generator& generator_;
  const Tokenizer& tokenizer_;
  std::vector<Before> before_;  // each turn
  bool user_written_ = false;   // the model wrote the user's prefix
};

int run(const ChatFlags& flags) {
  const Tokenizer tokenizer = flags.model.load_tokenizer();
  const std::unique_ptr<Context> ctx = flags.compute.make_context();
  const Model model = flags.compute.load(flags.model.folder, *ctx);
  Generator generator(*ctx, model.weights, tokenizer, flags.compute.states_dtype());
  std::optional<SavedConversation> start;
  if (!flags.state.empty()) start = load_state_file(flags.state, state_owner_of(model));
  Chat chat(flags, std::move(start), generator, tokenizer);
  if (isatty(STDIN_FILENO)) log_line(kHelp);
  while (const std::optional<std::string> line = read_line()) {
    if (line->empty()) continue;
    if (*line == "/quit") break;
    if (*line == "/reset") {
      chat.begin();
    } else if (*line == "/undo") {
      if (!chat.undo()) log_line("nothing to take back");
    } else if (line->front() == '/') {
      log_line(kHelp);
    } else {
      forget_interrupt();  // Ctrl-C ends the answer, not the conversation
      chat.turn(*line);
    }
  }
  return 0;
}

}  // namespace

void add_chat_command(CLI::App& app, CommandList& out) {
  CLI::App* const command = app.add_subcommand("chat", "Talk with a model, turn by turn");
  const auto flags = std::make_shared<ChatFlags>();
  flags->sampling.options.max_tokens = 256;
  flags->model.add_to(*command);
  command->add_option("--state", flags->state,
                      "Talk behind the text of this state file (krait state save); /reset goes "
                      "back to it");
  command->add_option("--system", flags->system, "Text that the conversation begins with");
  command->add_option("--user-prefix", flags->user, "What stands before your lines")
      ->capture_default_str();
  command->add_option("--assistant-prefix", flags->assistant, "What stands before the answers")
      ->capture_default_str();
  flags->sampling.add_to(*command);
  flags->compute.add_to(*command);
  flags->compute.add_inference_to(*command);
  out.push_back({command, [flags] { return run(*flags); }});
}

}  // namespace krait
