#include "generate/tokenizer_json.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "generate/tokenizer.h"

namespace krait {
namespace {

using nlohmann::json;
using Path = std::filesystem::path;

class File {
 public:
  explicit File(const std::string& text)
      : path_(Path(testing::TempDir()) /
              ("krait_tokenizer_" + std::to_string(getpid()) + ".json")) {
    std::ofstream(path_, std::ios::binary) << text;
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { std::filesystem::remove(path_); }
  const Path& path() const { return path_; }

 private:
  Path path_;
};

json good() {
  std::ifstream file(Path(KRAIT_SOURCE_DIR) / "tests/golden/tokenizer/llama3.json");
  return json::parse(file);
}

std::string message(const std::string& text) {
  const File file(text);
  try {
    Tokenizer::from_file(file.path());
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

struct Case {
  const char* expected;  // part of the message
  std::function<void(json&)> change;
};

void check(const std::vector<Case>& cases) {
  ASSERT_EQ(message(good().dump()), "no error");
  for (const Case& c : cases) {
    json root = good();
    c.change(root);
    const std::string got = message(root.dump());
    EXPECT_NE(got.find(c.expected), std::string::npos)
        << "got: " << got << "\nwant: " << c.expected;
    EXPECT_EQ(got.find('\n'), std::string::npos) << got;
    EXPECT_NE(got.find("krait_tokenizer_"), std::string::npos) << "the file is not named: " << got;
  }
}

TEST(TokenizerJson, RefusesWhatItDoesNotKnow) {
  check({
      {": field \"extra\" is not supported", [](json& r) { r["extra"] = 1; }},
      {": version: unknown version; expected \"1.0\", got \"2.0\"",
       [](json& r) { r["version"] = "2.0"; }},
      {": normalizer: type: not supported; expected NFC",
       [](json& r) { r["normalizer"]["type"] = "Lowercase"; }},
      {": normalizer: normalizers[0]: type: not supported",
       [](json& r) {
         r["normalizer"] = {{"type", "Sequence"},
                            {"normalizers", {{{"type", "Prepend"}, {"prepend", "x"}}}}};
       }},
      {": pre_tokenizer: type: not supported; expected ByteLevel, Split, Digits or Sequence, got "
       "\"Metaspace\"",
       [](json& r) {
         r["pre_tokenizer"] = {{"type", "Metaspace"}};
       }},
      {": pre_tokenizer: not a byte-level tokenizer",
       [](json& r) { r["pre_tokenizer"] = nullptr; }},
      {": pre_tokenizer: not a byte-level tokenizer",
       [](json& r) {
         auto& parts = r["pre_tokenizer"]["pretokenizers"];
         std::swap(parts[0], parts[1]);
       }},
      {": pre_tokenizer: pretokenizers[0]: behavior: not supported; expected Removed",
       [](json& r) { r["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Sideways"; }},
      {": pre_tokenizer: pretokenizers[0]: pattern: wrong members",
       [](json& r) { r["pre_tokenizer"]["pretokenizers"][0]["pattern"] = json::object(); }},
      {": pre_tokenizer: pretokenizers[1]: field \"speed\" is not supported",
       [](json& r) { r["pre_tokenizer"]["pretokenizers"][1]["speed"] = 1; }},
      {": post_processor: type: not supported; expected ByteLevel, TemplateProcessing or Sequence",
       [](json& r) {
         r["post_processor"] = {{"type", "RobertaProcessing"}};
       }},
      {": decoder: type: not supported", [](json& r) { r["decoder"]["type"] = "WordPiece"; }},
      {": model: type: not supported; expected BPE, got \"Unigram\"",
       [](json& r) { r["model"]["type"] = "Unigram"; }},
      {": model: dropout: dropout is not supported", [](json& r) { r["model"]["dropout"] = 0.1; }},
      {": model: continuing_subword_prefix: not supported",
       [](json& r) { r["model"]["continuing_subword_prefix"] = "##"; }},
      {": model: end_of_word_suffix: not supported",
       [](json& r) { r["model"]["end_of_word_suffix"] = "</w>"; }},
      {": model: byte_fallback: not supported; expected false",
       [](json& r) { r["model"]["byte_fallback"] = true; }},
  });
}

TEST(TokenizerJson, RefusesWhatIsBroken) {
  check({
      {": model: field missing", [](json& r) { r.erase("model"); }},
      {": model: vocab: field missing", [](json& r) { r["model"].erase("vocab"); }},
      {": model: vocab: wrong type", [](json& r) { r["model"]["vocab"] = json::array(); }},
      {": model: vocab: no tokens", [](json& r) { r["model"]["vocab"] = json::object(); }},
      {": model: vocab \"zz\": wrong type", [](json& r) { r["model"]["vocab"]["zz"] = 1.5; }},
      {": model: vocab \"zz\": token id out of range",
       [](json& r) { r["model"]["vocab"]["zz"] = -1; }},
      {": model: vocab \"zz\": token id out of range",
       [](json& r) { r["model"]["vocab"]["zz"] = 4000000000u; }},
      {": model: vocab \"zz\": token id out of range",
       [](json& r) { r["model"]["vocab"]["zz"] = UINT64_MAX; }},
      {": token id given twice", [](json& r) { r["model"]["vocab"]["zz"] = 0; }},
      {": model: merges: wrong type", [](json& r) { r["model"]["merges"] = "a b"; }},
      {": model: merges[0]: bad merge", [](json& r) { r["model"]["merges"][0] = "ab"; }},
      {": model: merges[0]: bad merge", [](json& r) { r["model"]["merges"][0] = "a b c"; }},
      {": model: merges[0]: bad merge",
       [](json& r) {
         r["model"]["merges"][0] = {"a", "b", "c"};
       }},
      {": model: merges[0]: bad merge", [](json& r) { r["model"]["merges"][0] = 7; }},
      {": model: merges[1]: merge of a token that is not in the vocabulary",
       [](json& r) {
         r["model"]["merges"][1] = {"zzz", "a"};
       }},
      {": model: unk_token: not in the vocabulary",
       [](json& r) { r["model"]["unk_token"] = "<unk>"; }},
      {": model: fuse_unk: wrong type", [](json& r) { r["model"]["fuse_unk"] = "yes"; }},
      {": added_tokens: wrong type", [](json& r) { r["added_tokens"] = json::object(); }},
      {": added_tokens[0]: id: id of the added token \"<s>\"; expected 320, got 5",
       [](json& r) { r["added_tokens"][0]["id"] = 5; }},
      {": added_tokens[0]: id: number out of range",
       [](json& r) { r["added_tokens"][0]["id"] = -1; }},
      {": added_tokens[1]: content: field missing",
       [](json& r) { r["added_tokens"][1].erase("content"); }},
      {": added_tokens[1]: content: bad added token",
       [](json& r) { r["added_tokens"][1]["content"] = ""; }},
      {": added_tokens[1]: content: bad added token",
       [](json& r) { r["added_tokens"][1]["content"] = std::string(300, 'x'); }},
      {": added_tokens[3]: added token given twice",
       [](json& r) { r["added_tokens"].push_back(r["added_tokens"][0]); }},
      {": post_processor: processors[1]: special_tokens: <s>: field missing",
       [](json& r) { r["post_processor"]["processors"][1]["special_tokens"].erase("<s>"); }},
      {": special_tokens: <s>: ids[0]: no such token",
       [](json& r) {
         r["post_processor"]["processors"][1]["special_tokens"]["<s>"]["ids"][0] = 999;
       }},
      {": single: the text does not occur",
       [](json& r) { r["post_processor"]["processors"][1]["single"].erase(1); }},
      {": normalizer: type: wrong type", [](json& r) { r["normalizer"]["type"] = 3; }},
  });
}

TEST(TokenizerJson, RefusesPatternsItCannotKeepTo) {
  const std::pair<const char*, const char*> patterns[] = {
      {"", "empty pattern"},
      {"(", "bad regular expression: missing closing parenthesis"},
      {"a\\", "bad regular expression"},
      {"\\p{NoSuchThing}", "bad regular expression"},
      {"\\h+", "\\h in a pattern is not supported"},
      {"a\\Kb", "\\K in a pattern is not supported"},
      {"[\\W]", "\\W inside a class in a pattern is not supported"},
      {"[a[bc]]", "a class inside a class"},
      {"[a-z&&[^b]]", "an intersection of classes"},
      {"(?m:a.b)", "the option (?m)"},
      {"((((a{1,999}){1,999}){1,999}){1,999})", "bad regular expression"},
  };
  for (const auto& [pattern, expected] : patterns) {
    json root = good();
    root["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern;
    const std::string got = message(root.dump());
    EXPECT_NE(got.find("pre_tokenizer: pretokenizers[0]: pattern: Regex"), std::string::npos)
        << got;
    EXPECT_NE(got.find(expected), std::string::npos) << pattern << "\n" << got;
  }
  json root = good();
  root["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = std::string(100000, 'a');
  EXPECT_NE(message(root.dump()).find("pattern too long"), std::string::npos);
}

TEST(TokenizerJson, RefusesWhatIsNoJson) {
  const std::string text = good().dump();
  for (const size_t length : {size_t{0}, size_t{1}, text.size() / 2, text.size() - 1}) {
    EXPECT_NE(message(text.substr(0, length)), "no error") << length;
  }
  EXPECT_NE(message(std::string(100000, '[')).find("nested too deeply"), std::string::npos);
  EXPECT_NE(message("[]").find("wrong type"), std::string::npos);
  EXPECT_THROW(Tokenizer::from_file("/no/such/tokenizer.json"), Error);
}

// A pattern that backtracks without end is an error in time, not a hang.
TEST(TokenizerJson, HostilePatternsEnd) {
  const std::pair<const char*, std::string> cases[] = {
      {"(a+)+$", std::string(5000, 'a') + "b"},
      {"(?:a|aa)+$", std::string(5000, 'a') + "b"},
      {"(?:(?:a*)*)*b", std::string(5000, 'a')},
      {"(a|b|ab)*c", std::string(3000, 'a')},
  };
  for (const auto& [pattern, text] : cases) {
    json root = good();
    root["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern;
    const File file(root.dump());
    const Tokenizer tokenizer = Tokenizer::from_file(file.path());
    const auto start = std::chrono::steady_clock::now();
    try {
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, true, false)), text);
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("the pattern takes too"), std::string::npos) << e.what();
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    EXPECT_LT(seconds.count(), 60) << pattern;  // without limits: longer than the universe is old
  }
}

// Empty matches cut, once at each place, and end.
TEST(TokenizerJson, EmptyMatchesEnd) {
  json root = good();
  root["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x*";
  const File file(root.dump());
  const Tokenizer tokenizer = Tokenizer::from_file(file.path());
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("axxb", true, false)), "axxb");
}

// Every single-byte change of a file: a tokenizer or an Error, nothing else.
TEST(TokenizerJson, ChangedBytesNeverCrash) {
  const std::string text = good().dump();
  for (size_t at = 0; at < text.size(); at += 7) {
    std::string changed = text;
    changed[at] = static_cast<char>(changed[at] ^ (1 << (at % 8)));
    const File file(changed);
    try {
      Tokenizer::from_file(file.path()).encode("The snake's 123 caf\u00e9 <s>");
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace krait
