// The public interface, used as its headers say.
#include <gtest/gtest.h>
#include <krait/krait.h>

#include <cmath>

#include "ops/op_test.h"
#include "tests/tiny_model.h"
#include "train/test_folder.h"

namespace krait {
namespace {

class Api : public testing::Test {
 protected:
  static LanguageModel load(const TestFolder& folder) {
    write_random_model(folder.path(), tiny_config());
    return LanguageModel::load(folder.path());
  }
  static TextOptions options(uint64_t seed = 1) {
    TextOptions o;
    o.max_tokens = 30;
    o.seed = seed;
    o.ignore_eos = true;
    return o;
  }

  TestFolder folder;
  LanguageModel model = load(folder);
};

TEST_F(Api, TellsAboutTheModel) {
  EXPECT_EQ(model.info().parameters, parameter_count(tiny_config()));
  EXPECT_EQ(model.info().vocab_size, 256);
  EXPECT_EQ(model.info().state_bytes, tiny_config().state_bytes_per_sequence());
  EXPECT_EQ(model.info().dtype, "f32");
  EXPECT_EQ(model.decode(model.encode("h\xc3\xa9")), "h\xc3\xa9");
  EXPECT_STREQ(version(), "0.1.0");
}

TEST_F(Api, AStateIsAValue) {
  State state;
  EXPECT_TRUE(state.empty());
  model.read(state, "To be, or not to be");
  const State bookmark = state;
  const Text first = model.generate(state, options());
  EXPECT_EQ(first.tokens.size(), 30u);
  EXPECT_EQ(first.finish_reason, "length");
  EXPECT_FALSE(state == bookmark);

  State again = bookmark;
  EXPECT_NE(model.generate(again, options(2)).text, first.text);
  again = bookmark;
  EXPECT_EQ(model.generate(again, options()).text, first.text);
  EXPECT_TRUE(again == state);

  // Kept as bytes, it outlives the model.
  const State restored = State::from_bytes(bookmark.to_bytes());
  EXPECT_TRUE(restored == bookmark);
  LanguageModel other = LanguageModel::load(folder.path());
  again = restored;
  EXPECT_EQ(other.generate(again, options()).text, first.text);
}

TEST_F(Api, AStateIsAFile) {
  const TestFolder elsewhere;
  const std::filesystem::path file = elsewhere.path() / "book.state";
  State state;
  EXPECT_EQ(state.tokens(), 0);
  EXPECT_THROW(model.save_state(state, file), Error);
  model.read(state, "To be, or not to be");
  EXPECT_EQ(state.tokens(), 19);
  model.save_state(state, file);
  LanguageModel other = LanguageModel::load(folder.path());
  State again = other.load_state(file);
  EXPECT_TRUE(again == state);
  EXPECT_EQ(other.generate(again, options()).text, model.generate(state, options()).text);
  EXPECT_EQ(again.tokens(), 49);

  const TestFolder larger;
  write_random_model(larger.path(), make_config(256, 48, 2));
  EXPECT_THROW(LanguageModel::load(larger.path()).load_state(file), Error);
  EXPECT_THROW(model.load_state(elsewhere.path() / "nowhere"), Error);
}

TEST_F(Api, WeightsInEightBits) {
  LanguageModel small = LanguageModel::load(folder.path(), {.quantize = "int8"});
  State state;
  model.read(state, "To be, or not to be");
  const std::vector<float> a = model.next_logits(state), b = small.next_logits(state);
  EXPECT_NE(a, b);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 0.1f);
  const TestFolder elsewhere;
  small.save_state(state, elsewhere.path() / "book.state");
  EXPECT_TRUE(model.load_state(elsewhere.path() / "book.state") == state);
}

TEST_F(Api, StatesInBf16) {
  LanguageModel small = LanguageModel::load(folder.path(), {.state_dtype = "bf16"});
  EXPECT_EQ(2 * small.info().state_bytes, model.info().state_bytes);
  State exact, rounded;
  model.read(exact, "To be, or not to be");
  small.read(rounded, "To be, or not to be");
  EXPECT_LT(rounded.to_bytes().size(), exact.to_bytes().size());
  State restored = State::from_bytes(rounded.to_bytes());
  EXPECT_EQ(small.generate(restored, options()).text, small.generate(rounded, options()).text);
  // Either's states are the other's, too.
  const std::vector<float> a = model.next_logits(exact), b = small.next_logits(exact);
  EXPECT_NE(a, b);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 0.05f);
  const TestFolder elsewhere;
  const std::filesystem::path file = elsewhere.path() / "book.state";
  small.save_state(rounded, file);
  EXPECT_TRUE(model.load_state(file) == rounded);
  EXPECT_EQ(model.next_logits(model.load_state(file)), model.next_logits(rounded));
  EXPECT_THROW(LanguageModel::load(folder.path(), {.state_dtype = "f16"}), Error);
}

TEST_F(Api, TextInPiecesIsTheSameText) {
  State whole, pieces;
  model.read(whole, "To be, or not to be");
  model.read(pieces, "To be,");
  model.read(pieces, " or not to be");
  const std::vector<float> a = model.next_logits(whole), b = model.next_logits(pieces);
  ASSERT_EQ(a.size(), 256u);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-4f);
}

TEST_F(Api, ScoresAndLogitsAgree) {
  const std::vector<int32_t> tokens = model.encode("To be");
  const std::vector<float> scores = model.score(tokens);
  ASSERT_EQ(scores.size(), 4u);
  State state;
  model.read(state, std::span(tokens).first(4));
  const std::vector<float> logits = model.next_logits(state);
  double sum = 0;
  for (const float l : logits) sum += std::exp(static_cast<double>(l));
  EXPECT_NEAR(scores[3], logits[static_cast<size_t>(tokens[4])] - std::log(sum), 1e-4);
}

TEST_F(Api, StreamsUntilToldToStop) {
  State state;
  model.read(state, "To be");
  std::string seen;
  int left = 10;
  TextOptions o = options();
  o.on_text = [&](std::string_view text) {
    seen += text;
    return --left > 0;
  };
  const Text text = model.generate(state, o);
  EXPECT_EQ(text.finish_reason, "interrupted");
  EXPECT_EQ(text.tokens.size(), 10u);
  EXPECT_EQ(text.text, seen);
}

TEST_F(Api, RefusesWhatIsWrong) {
  State state;
  EXPECT_THROW(model.generate(state), Error);
  EXPECT_THROW(model.next_logits(state), Error);
  EXPECT_THROW(model.read(state, std::vector<int32_t>{256}), Error);
  EXPECT_TRUE(state.empty());
  EXPECT_THROW(LanguageModel::load(folder.path() / "nowhere"), Error);
  EXPECT_THROW(LanguageModel::load(folder.path(), {.device = "tpu"}), Error);
  EXPECT_THROW(LanguageModel::load(folder.path(), {.dtype = "f8"}), Error);
  EXPECT_THROW(LanguageModel::load(folder.path(), {.quantize = "int4"}), Error);

  for (const int threads : {-3, 4097, 1000000})
    EXPECT_EQ(message_of<Error>([&] { LanguageModel::load(folder.path(), {.threads = threads}); }),
              "threads: value out of range; expected 0 to 4096, got " + std::to_string(threads));

  model.read(state, "To be");
  const State before = state;
  TextOptions negative;
  negative.max_tokens = -5;
  negative.on_text = [](std::string_view) { return false; };  // else it would never return
  EXPECT_EQ(message_of<Error>([&] { model.generate(state, negative); }),
            "max_tokens: value out of range; expected at least 0, got -5");
  EXPECT_TRUE(state == before);
  std::vector<std::byte> bytes = state.to_bytes();
  for (size_t size = 0; size < bytes.size(); size += 7)
    EXPECT_THROW(State::from_bytes(std::span(bytes).first(size)), Error) << size;
  // The last token, in the header and among the last tokens, which must agree; the number of
  // tokens.
  for (const size_t at : {size_t{8}, size_t{16}, size_t{40 + 4 * 4}}) {
    std::vector<std::byte> other = bytes;
    other[at] ^= std::byte{1};
    EXPECT_THROW(State::from_bytes(other), Error) << at;
  }
  bytes[0] = std::byte{0};
  EXPECT_THROW(State::from_bytes(bytes), Error);

  const TestFolder larger;
  write_random_model(larger.path(), make_config(256, 48, 2));
  LanguageModel other = LanguageModel::load(larger.path());
  EXPECT_THROW(other.generate(state), Error);
}

// One device reads, the other writes on.
TEST(ApiCuda, AStateGoesFromDeviceToDevice) {
  op_test::on_cuda([](Context&) {
    const TestFolder folder;
    write_random_model(folder.path(), tiny_config());
    LanguageModel cpu = LanguageModel::load(folder.path());
    LanguageModel gpu = LanguageModel::load(folder.path(), {.device = "cuda"});
    State on_cpu, on_gpu;
    cpu.read(on_cpu, "To be, or not to be");
    gpu.read(on_gpu, "To be, or not to be");
    const std::vector<float> a = cpu.next_logits(on_cpu), b = cpu.next_logits(on_gpu),
                             c = gpu.next_logits(on_cpu);
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(b[i], a[i], 1e-4f);
      EXPECT_NEAR(c[i], a[i], 1e-4f);
    }
    TextOptions greedy;
    greedy.max_tokens = 20;
    greedy.temperature = 0;
    EXPECT_EQ(gpu.generate(on_gpu, greedy).tokens, cpu.generate(on_cpu, greedy).tokens);
  });
}

}  // namespace
}  // namespace krait
