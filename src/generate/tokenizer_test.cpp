#include "generate/tokenizer.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "core/rng.h"
#include "generate/normalizer.h"

namespace krait {
namespace {

using nlohmann::json;
using Path = std::filesystem::path;

const Path kGolden = Path(KRAIT_SOURCE_DIR) / "tests/golden/tokenizer";

Path data_folder() {
  const char* folder = std::getenv("KRAIT_DATA");
  return (folder ? Path(folder) : Path(KRAIT_SOURCE_DIR) / "../shared/data") / "text";
}

std::string read_text(const Path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

json read_golden(const char* name) { return json::parse(read_text(kGolden / name)); }

std::string shown(const std::string& text) { return json(text).dump(-1, ' ', true); }

// Compares with what the tokenizers library gave (scripts/make_golden_tokenizer.py says what a case
// holds).
void check_cases(const Tokenizer& tokenizer, const json& strings, const json& golden) {
  EXPECT_EQ(tokenizer.size(), golden["size"].get<int32_t>());
  ASSERT_EQ(strings.size(), golden["cases"].size());
  for (size_t i = 0; i < strings.size(); ++i) {
    const auto text = strings[i].get<std::string>();
    SCOPED_TRACE(shown(text));
    const json& want = golden["cases"][i];
    const auto ids = want["ids"].get<std::vector<int32_t>>();
    EXPECT_EQ(tokenizer.encode(text), ids);
    EXPECT_EQ(tokenizer.encode(text, false, false),
              want.value("as_text", want["ids"]).get<std::vector<int32_t>>());
    const json decoded = want.value("decoded", json(text));
    if (decoded.is_null()) continue;
    EXPECT_EQ(tokenizer.decode(ids), decoded.get<std::string>());
    EXPECT_EQ(tokenizer.decode(ids, true), want.value("skipped", decoded).get<std::string>());
    std::string pieces;
    for (const int32_t id : ids) pieces += tokenizer.token_bytes(id);
    EXPECT_EQ(pieces, tokenizer.decode(ids));
  }
}

class SmallTokenizers : public testing::TestWithParam<const char*> {};

TEST_P(SmallTokenizers, GiveTheLibrarysIds) {
  const json golden = read_golden("cases.json");
  ASSERT_EQ(golden["tokenizers"].size(), 5u);
  ASSERT_GT(golden["strings"].size(), 100u);
  const Path file = kGolden / (std::string(GetParam()) + ".json");
  check_cases(Tokenizer::from_file(file), golden["strings"], golden["tokenizers"][GetParam()]);
}

INSTANTIATE_TEST_SUITE_P(All, SmallTokenizers,
                         testing::Values("prefix_space", "llama3", "nfkc_digits", "nfd_splits",
                                         "removed_contiguous"),
                         [](const auto& test) { return std::string(test.param); });

class NeoX : public testing::Test {
 protected:
  void SetUp() override {
    const Path file = data_folder() / "gpt-neox-20b-tokenizer.json";
    if (!std::filesystem::exists(file)) GTEST_SKIP() << "no " << file;
    tokenizer.emplace(Tokenizer::from_file(file));
  }
  std::optional<Tokenizer> tokenizer;
};

TEST_F(NeoX, GivesTheLibrarysIds) {
  const json golden = read_golden("neox.json");
  check_cases(*tokenizer, golden["strings"], golden["golden"]);
}

uint64_t fnv1a(const std::vector<int32_t>& ids) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const int32_t id : ids) {
    for (int shift = 0; shift < 32; shift += 8) {
      hash = (hash ^ (static_cast<uint32_t>(id) >> shift & 0xFF)) * 0x100000001B3u;
    }
  }
  return hash;
}

TEST_F(NeoX, GivesTheLibrarysIdsForWholeFiles) {
  const json golden = read_golden("neox.json");
  ASSERT_EQ(golden["files"].size(), 3u);
  for (const auto& [name, want] : golden["files"].items()) {
    const std::string text = read_text(data_folder() / name);
    const std::vector<int32_t> ids = tokenizer->encode(text);
    EXPECT_EQ(ids.size(), want["count"].get<size_t>()) << name;
    char hash[17];
    std::snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(fnv1a(ids)));
    EXPECT_EQ(hash, want["fnv1a"].get<std::string>()) << name;
    EXPECT_EQ(tokenizer->decode(ids), text) << name;
  }
}

TEST_F(NeoX, HasItsSpecialTokens) {
  EXPECT_EQ(tokenizer->size(), 50277);
  EXPECT_EQ(tokenizer->eos_id(), 0);
  EXPECT_TRUE(tokenizer->is_special(0));
  EXPECT_FALSE(tokenizer->is_special(50276));
  EXPECT_EQ(tokenizer->token_bytes(50276), "  ");
  const std::optional<int32_t> the = tokenizer->id_of("\u0120the");
  ASSERT_TRUE(the);
  EXPECT_EQ(tokenizer->token_bytes(*the), " the");
  EXPECT_FALSE(tokenizer->id_of(" the"));
}

std::string random_bytes(Rng& rng, size_t count) {
  std::string text;
  while (text.size() < count) {
    switch (rng.below(4)) {
      case 0:
        text += static_cast<char>(rng.below(256));
        break;
      case 1:
        text += static_cast<char>(' ' + rng.below(95));
        break;
      case 2:
        text += "\xE6\x97\xA5 \xC3\xA9";
        break;
      default:
        text += static_cast<char>(0x80 + rng.below(128));
        break;
    }
  }
  return text;
}

TEST_F(NeoX, KeepsBytesThatAreNoUtf8) {
  Rng rng(1);
  std::string storage;
  for (int round = 0; round < 500; ++round) {
    const std::string text = random_bytes(rng, 1 + rng.below(60));
    std::string expected;  // 13 bytes have no token
    for (const char c : text) {
      const auto byte = static_cast<uint8_t>(c);
      const bool has_token = byte < 0xC0 || (byte > 0xC1 && byte < 0xF5);
      expected += has_token ? std::string(1, c) : "\uFFFD";
    }
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)),
              normalize(expected, NormalForm::kNfc, storage));
  }
}

TEST_F(NeoX, LongRunsTakeTimeInProportion) {
  for (const char* piece : {"a", " ", "!", "\n", "\u0301", "\x80", "\xE6\x97\xA5"}) {
    std::string text;
    while (text.size() < 1000000) text += piece;
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
  }
  // Marks in descending order of combining class, all to be reordered.
  std::string marks = "a";
  while (marks.size() < 400000) marks += "\u0301";
  while (marks.size() < 800000) marks += "\u0323";
  EXPECT_EQ(tokenizer->decode(tokenizer->encode(marks)).substr(0, 3), "\u1EA1");
}

TEST(Tokenizer, BytesAreIds) {
  const Tokenizer bytes = Tokenizer::bytes();
  EXPECT_EQ(bytes.size(), 256);
  EXPECT_EQ(bytes.encode("a\xFF\n"), (std::vector<int32_t>{97, 255, 10}));
  EXPECT_TRUE(bytes.encode("").empty());
  EXPECT_FALSE(bytes.eos_id());
  EXPECT_FALSE(bytes.is_special(0));
  EXPECT_EQ(bytes.token_bytes(200), "\xC8");
  EXPECT_EQ(bytes.id_of("a"), 97);
  Rng rng(2);
  const std::string text = random_bytes(rng, 5000);
  EXPECT_EQ(bytes.decode(bytes.encode(text)), text);
}

TEST(Tokenizer, RefusesIdsThatAreNoTokens) {
  const Tokenizer bytes = Tokenizer::bytes();
  for (const int32_t id : {-1, 256, INT32_MAX, INT32_MIN}) {
    EXPECT_THROW(bytes.token_bytes(id), Error);
    EXPECT_THROW(bytes.is_special(id), Error);
    try {
      bytes.decode(std::vector<int32_t>{5, id});
      FAIL();
    } catch (const Error& e) {
      EXPECT_EQ(e.what(), "token id: no such token; expected 0 to 255, got " + std::to_string(id));
    }
  }
}

TEST(Tokenizer, AddsTheTemplateOnlyWhenAsked) {
  const Tokenizer t = Tokenizer::from_file(kGolden / "llama3.json");
  const std::vector<int32_t> start_end = {*t.id_of("<s>"), *t.id_of("</s>")};
  EXPECT_EQ(t.encode(""), start_end);
  EXPECT_TRUE(t.encode("", true, false).empty());
  EXPECT_EQ(t.encode("<s></s>", true, false), start_end);
  EXPECT_EQ(t.decode(t.encode("<s>", false, false)), "<s>");
  EXPECT_GT(t.encode("<s>", false, false).size(), 1u);
}

// What stands around bytes that are no UTF-8 is tokenized as it is alone, with no space put before
// it.
TEST(Tokenizer, InvalidBytesSeparateTexts) {
  const Tokenizer t = Tokenizer::from_file(kGolden / "prefix_space.json");
  std::vector<int32_t> expected = t.encode("the");
  for (const uint8_t byte : {0xFF, 0xC3}) {
    const std::vector<int32_t> id = t.encode(std::string(1, static_cast<char>(byte)));
    ASSERT_EQ(id.size(), 1u);
    expected.push_back(id[0]);
  }
  EXPECT_EQ(t.encode("the\xFF\xC3"), expected);
  EXPECT_EQ(t.decode(t.encode("\xFFthe\xC3 stone")), "\xFFthe\xC3 stone");
  EXPECT_EQ(t.decode(t.encode("the\xFF")), " the\xFF");
}

}  // namespace
}  // namespace krait
