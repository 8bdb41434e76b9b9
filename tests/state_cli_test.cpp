// krait state, and the commands that begin at a state file: what they print, and what they refuse.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/cli_fixture.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string book_text() {
  std::string text;
  for (int i = 0; i < 700; ++i) text += static_cast<char>('a' + i * i % 26);
  return text;
}

class StateCli : public Cli {
 protected:
  void SetUp() override {
    write_remembering_model(model(), tiny_config());
    book = folder.file("book.txt", book_text());
    state = path("book.state");
  }
  json save(const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"state", "save", "-m", model(), "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return output_of(arguments);
  }
  json generate(const std::vector<std::string>& more, const std::string& count = "24") {
    std::vector<std::string> arguments = {"generate", "-m", model(),  "-n",          count,
                                          "--temp",   "0",  "--json", "--ignore-eos"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return output_of(arguments);
  }

  std::string book, state;
};

TEST_F(StateCli, SavesAndShows) {
  const json saved = save({"-f", book, "-o", state});
  EXPECT_EQ(saved["file"], state);
  EXPECT_EQ(saved["version"], 1);
  EXPECT_EQ(saved["tokens"], 700);
  EXPECT_EQ(saved["n_layer"], 2);
  EXPECT_EQ(saved["d_inner"], 64);
  EXPECT_EQ(saved["d_state"], 16);
  EXPECT_EQ(saved["d_conv"], 4);
  EXPECT_EQ(saved["dtype"], "f32");
  EXPECT_EQ(saved["bytes"], fs::file_size(state));
  EXPECT_EQ(saved["model"].get<std::string>().size(), 16u);
  EXPECT_EQ(saved["checksum"].get<std::string>().size(), 16u);
  EXPECT_EQ(saved["checksum_ok"], true);
  EXPECT_EQ(saved["model_ok"], true);
  EXPECT_EQ(output_of({"state", "load", state, "-m", model(), "--json"}), saved);
  json without_model = saved;
  without_model.erase("model_ok");
  EXPECT_EQ(output_of({"state", "load", state, "--json"}), without_model);
  const ProgramResult text = run_krait({"state", "load", state});
  EXPECT_EQ(text.err, "");
  EXPECT_NE(text.out.find("tokens        700\n"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("checksum_ok   yes\n"), std::string::npos) << text.out;
  // As long after a hundred times the text.
  std::string longer;
  for (int i = 0; i < 100; ++i) longer += book_text();
  const json later = save({"-f", folder.file("longer", longer), "-o", path("longer.state")});
  EXPECT_EQ(later["tokens"], 70000);
  EXPECT_EQ(later["bytes"], saved["bytes"]);
}

TEST_F(StateCli, GoesOnAsFromTheWholeText) {
  const std::string question = "What then?";
  const json expected = generate({"-p", book_text() + question});
  save({"-f", book, "-o", state});
  const std::string before = read_text(state);
  EXPECT_NE(generate({"-p", question}), expected) << "the text before must matter";
  EXPECT_EQ(generate({"--state", state, "-p", question}), expected);
  EXPECT_EQ(generate({"--state", state, "-f", folder.file("q", question)}), expected);
  EXPECT_EQ(generate({"--state", state, "--tokens", "87 104 97 116 32 116 104 101 110 63"}),
            expected);
  EXPECT_EQ(read_text(state), before) << "asking changes nothing";

  save({"-p", question, "--from", state, "-o", path("asked.state")});
  EXPECT_EQ(generate({"--state", path("asked.state")}), expected);
  const std::string half = folder.file("half", book_text().substr(0, 333)),
                    rest = folder.file("rest", book_text().substr(333));
  EXPECT_EQ(save({"-f", half, rest, "-o", path("two.state")})["tokens"], 700);
  EXPECT_EQ(generate({"--state", path("two.state"), "-p", question}), expected);
  save({"--tokens", "1 2 3", "-o", path("numbers.state")});
  EXPECT_EQ(generate({"--state", path("numbers.state"), "--tokens", "4 5"}),
            generate({"--tokens", "1 2 3 4 5"}));
  ProgramOptions input;
  input.input = book_text();
  EXPECT_EQ(run_krait({"state", "save", "-m", model(), "-f", "-", "-o", path("stdin.state")}, input)
                .status,
            0);
  EXPECT_EQ(read_text(path("stdin.state")), before);
}

TEST_F(StateCli, KeepsWhatWasWritten) {
  const json whole = generate({"-f", book}, "40");
  json first = generate({"-f", book, "--save-state", state}, "15");
  const json rest = generate({"--state", state, "--save-state", state}, "25");
  for (const json& token : rest["tokens"]) first["tokens"].push_back(token);
  EXPECT_EQ(first["tokens"], whole["tokens"]);
  EXPECT_EQ(output_of({"state", "load", state, "--json"})["tokens"], 740);
}

TEST_F(StateCli, ScoresTheBoundaryToo) {
  const std::string text = book_text();
  const json whole = output_of({"score", "-m", model(), "-f", book, "--top", "3", "--json"});
  save({"-p", text.substr(0, 650), "-o", state});
  const std::vector<std::string> arguments = {
      "score", "-m", model(), "--state", state, "--text", text.substr(650), "--top", "3"};
  std::vector<std::string> as_json = arguments;
  as_json.push_back("--json");
  const json rest = output_of(as_json);
  ASSERT_EQ(rest["tokens"].size(), 50u);
  ASSERT_EQ(rest["logprobs"].size(), 50u);
  for (size_t i = 0; i < 50; ++i)
    EXPECT_NEAR(rest["logprobs"][i].get<double>(), whole["logprobs"][650 + i].get<double>(), 1e-4)
        << i;
  EXPECT_EQ(rest["top"][0][0], whole["top"][0][0]);
  const ProgramResult shown = run_krait(arguments);
  EXPECT_EQ(std::count(shown.out.begin(), shown.out.end(), '\n'), 50 + 1 + 1 + 3) << shown.out;
}

TEST_F(StateCli, ChatsBehindAState) {
  const auto chat = [&](const std::string& input, std::vector<std::string> more) {
    ProgramOptions options;
    options.input = input;
    more.insert(more.begin(), {"chat", "-m", model(), "-n", "30", "--temp", "0", "--user-prefix",
                               "U", "--assistant-prefix", "A"});
    const ProgramResult r = run_krait(more, options);
    EXPECT_EQ(r.status, 0) << r.err;
    return r.out;
  };
  // --system is text before the conversation, and a line break.
  save({"-p", book_text() + "\n", "-o", state});
  const std::string answer = chat("b\n", {"--state", state});
  EXPECT_EQ(answer, chat("b\n", {"--system", book_text()}));
  EXPECT_NE(answer, chat("b\n", {}));
  EXPECT_EQ(chat("b\n/reset\nb\n", {"--state", state}), answer + answer);
}

TEST_F(StateCli, ForksIntoCheckedCopies) {
  save({"-f", book, "-o", state});
  EXPECT_EQ(run_krait({"state", "fork", state, path("a"), path("b")}).out,
            path("a") + "\n" + path("b") + "\n");
  EXPECT_EQ(read_text(path("a")), read_text(state));
  EXPECT_EQ(read_text(path("b")), read_text(state));
  const json forked = output_of({"state", "fork", state, path("c"), "--json"});
  EXPECT_EQ(forked["file"], state);
  EXPECT_EQ(forked["copies"], json({path("c")}));
  EXPECT_EQ(forked["tokens"], 700);
  EXPECT_EQ(forked["bytes"], fs::file_size(state));
  EXPECT_EQ(forked["checksum"].get<std::string>().size(), 16u);
  expect_failure({"state", "fork", state, path("d"), path("a")}, 1, {path("a"), "already there"});
  EXPECT_FALSE(fs::exists(path("d")));
  expect_failure({"state", "fork", state, state}, 1, {"already there"});
  expect_failure({"state", "fork", state, path("d"), path("d")}, 2, {path("d"), "twice"});
  expect_failure({"state", "fork", state, path("d"), path("e"), path("nowhere/f")}, 1,
                 {path("nowhere/f")});
  EXPECT_FALSE(fs::exists(path("d")));  // all or none
  EXPECT_FALSE(fs::exists(path("e")));
}

TEST_F(StateCli, RefusesBadUsage) {
  save({"-p", "Hello", "-o", state});
  EXPECT_EQ(run_krait({"state"}).status, 2);
  expect_failure({"state", "dance"}, 2, {"subcommand"});
  expect_failure({"state", "save", "-m", model(), "-p", "a"}, 2, {"--out"});
  expect_failure({"state", "save", "-m", model(), "-o", state}, 2, {"--prompt"});
  expect_failure({"state", "save", "-p", "a", "-o", state}, 2, {"--model"});
  expect_failure({"state", "save", "-m", model(), "-o", state, "-p", "a", "--tokens", "1"}, 2, {});
  expect_failure({"state", "load"}, 2, {"FILE"});
  expect_failure({"state", "load", state, "--speed"}, 2, {"--speed"});
  expect_failure({"state", "fork", state}, 2, {"OUT"});
  expect_failure({"generate", "-m", model()}, 2, {"--state"});
  expect_failure({"generate", "-m", model(), "-p", "a", "--samples", "2", "--save-state", state}, 2,
                 {"--save-state", "--samples"});
}

TEST_F(StateCli, RefusesFilesByName) {
  save({"-p", "Hello", "-o", state});
  const std::string good = read_text(state);
  write_random_model(path("other"), make_config(256, 32, 2));
  const auto everywhere = [&](const std::string& at, const std::vector<std::string>& parts) {
    for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
             {"state", "load", state, "-m", at},
             {"state", "load", state, "-m", at, "--json"},
             {"state", "save", "-m", at, "-p", "a", "--from", state, "-o", path("new")},
             {"generate", "-m", at, "--state", state, "-p", "a"},
             {"chat", "-m", at, "--state", state},
             {"score", "-m", at, "--state", state, "--text", "a", "--json"}}) {
      std::vector<std::string> all = parts;
      all.push_back(state);
      expect_failure(arguments, 1, all);
    }
    EXPECT_FALSE(fs::exists(path("new")));
  };
  everywhere(path("other"), {"another model"});
  std::string bytes = good;
  bytes[bytes.size() - 5] ^= 1;
  folder.file("book.state", bytes);
  everywhere(model(), {"damaged", "checksum"});
  expect_failure({"state", "load", state}, 1, {state, "damaged"});
  expect_failure({"state", "fork", state, path("new")}, 1, {state, "damaged"});
  folder.file("book.state", good.substr(0, good.size() - 1));
  everywhere(model(), {"truncated"});
  bytes = good;
  bytes.replace(bytes.find("\"krait.state\":\"1\""), 17, "\"krait.state\":\"7\"");
  folder.file("book.state", bytes);
  everywhere(model(), {"version", "krait.state", "expected 1", "7"});
  folder.file("book.state", read_text(model() + "/model.safetensors"));
  everywhere(model(), {"not a generation state file"});
  fs::remove(state);
  everywhere(model(), {});
}

TEST_F(StateCli, RefusesWhatCannotBeReadOrWritten) {
  const std::string empty = folder.file("empty", "");
  const auto saving = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"state", "save", "-m", model()});
    return more;
  };
  expect_failure(saving({"-p", "", "-o", state}), 1, {"nothing to read"});
  expect_failure(saving({"-f", empty, "-o", state}), 1, {empty, "nothing to read"});
  expect_failure(saving({"-f", book, path("nowhere"), "-o", state}), 1, {path("nowhere")});
  expect_failure(saving({"--tokens", "1 256", "-o", state}), 1, {"256", "0 to 255"});
  expect_failure(saving({"-p", "a", "-o", path("nowhere/x")}), 1, {path("nowhere/x")});
  expect_failure(saving({"-p", "a", "-o", folder.path()}), 1, {"a folder"});
  expect_failure({"generate", "-m", model(), "-p", "a", "--save-state", path("nowhere/x")}, 1,
                 {path("nowhere/x")});
  EXPECT_FALSE(fs::exists(state));
}

TEST_F(StateCli, ReadingALongTextTakesNoMoreMemory) {
  write_random_model(path("wider"), make_config(256, 64, 2));
  const auto peak = [&](size_t tokens) {
    std::string text;
    for (size_t i = 0; i < tokens; ++i) text += static_cast<char>('a' + i * i % 26);
    const ProgramResult r = run_krait({"state", "save", "-m", path("wider"), "-f",
                                       folder.file("long", text), "-o", state, "-t", "1"});
    EXPECT_EQ(r.status, 0) << r.err;
    return r.peak_bytes;
  };
  const int64_t of_65536 = peak(65536), of_1048576 = peak(1048576);
  EXPECT_LE(of_1048576, of_65536 + (int64_t{64} << 20));
}

}  // namespace
}  // namespace krait
