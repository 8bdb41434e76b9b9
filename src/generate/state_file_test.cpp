#include "generate/state_file.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>

#include "core/mapped_file.h"
#include "core/rng.h"
#include "core/xxh64.h"
#include "formats/safetensors.h"
#include "generate/scorer.h"
#include "model/model_digest.h"
#include "ops/deferred_engine.h"
#include "ops/op_test.h"
#include "tests/tiny_model.h"
#include "train/test_folder.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

std::vector<int32_t> some_tokens(size_t count, uint64_t seed = 3) {
  Rng rng(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& t : tokens) t = static_cast<int32_t>(1 + rng.below(255));
  return tokens;
}

GenerateOptions greedy(int64_t count) {
  GenerateOptions options;
  options.max_tokens = count;
  options.sampling.temperature = 0;
  options.sampling.repeat_penalty = 1.1f;
  options.sampling.repeat_last_n = -1;
  options.ignore_eos = true;
  return options;
}

void expect_same(const SavedConversation& a, const SavedConversation& b) {
  EXPECT_EQ(a.state, b.state);
  EXPECT_EQ(a.pending, b.pending);
  EXPECT_EQ(a.recent, b.recent);
  EXPECT_EQ(a.tokens, b.tokens);
}

class StateFileTest : public testing::Test {
 protected:
  static Model write_and_load(const fs::path& at, const Config& config = tiny_config()) {
    write_remembering_model(at, config);
    return load_model(at);
  }
  SavedConversation after(const std::vector<int32_t>& tokens, DType state_dtype = DType::f32) {
    Generator generator(ctx, model.weights, tokenizer, state_dtype);
    generator.feed(tokens);
    return generator.save();
  }
  // A state file to damage.
  fs::path good() {
    save_state_file(path, after(some_tokens(5)), owner);
    return path;
  }

  TestFolder folder;
  const fs::path path = folder.path() / "book.state";
  Context ctx{cpu_engine(), 2};
  Model model = write_and_load(folder.path() / "model");
  Tokenizer tokenizer = Tokenizer::bytes();
  StateOwner owner = state_owner_of(model);
};

// f throws an Error whose message names the file and holds all the parts.
template <class F>
void expect_refusal(F&& f, const std::vector<std::string>& parts) {
  try {
    f();
    ADD_FAILURE() << "no Error; expected one with " << testing::PrintToString(parts);
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_NE(message.find("book.state"), std::string::npos) << message;
    for (const std::string& part : parts)
      EXPECT_NE(message.find(part), std::string::npos) << "no \"" << part << "\" in: " << message;
  }
}

TEST_F(StateFileTest, RoundTripsBitForBitInConstantSize) {
  uintmax_t size = 0;
  for (const size_t count : {1u, 5u, 65535u, 65536u, 65537u, 140000u}) {
    const SavedConversation kept = after(some_tokens(count));
    save_state_file(path, kept, owner);
    expect_same(load_state_file(path, owner), kept);
    if (size == 0) size = fs::file_size(path);
    EXPECT_EQ(fs::file_size(path), size) << count;
    const StateFileInfo info = inspect_state_file(path);
    EXPECT_EQ(info.tokens, static_cast<int64_t>(count));
    EXPECT_EQ(info.n_layer, 2);
    EXPECT_EQ(info.d_inner, 64);
    EXPECT_EQ(info.d_state, 16);
    EXPECT_EQ(info.d_conv, 4);
    EXPECT_EQ(info.dtype, "f32");
    EXPECT_EQ(info.model, owner.digest);
    EXPECT_EQ(info.bytes, static_cast<int64_t>(size));
  }
}

TEST_F(StateFileTest, WritesWhatTheWholeTextGives) {
  const std::vector<int32_t> tokens = some_tokens(1300);
  Generator whole(ctx, model.weights, tokenizer);
  whole.feed(tokens);
  const std::vector<int32_t> expected = whole.generate(greedy(60))[0].tokens;
  Generator of_the_end(ctx, model.weights, tokenizer);
  of_the_end.feed(std::span(tokens).last(20));
  ASSERT_NE(of_the_end.generate(greedy(60))[0].tokens, expected) << "the text before must matter";
  for (const size_t cut : {1u, 511u, 512u, 513u, 1299u, 1300u}) {
    save_state_file(path, after({tokens.begin(), tokens.begin() + static_cast<int64_t>(cut)}),
                    owner);
    Generator generator(ctx, model.weights, tokenizer);
    generator.restore(load_state_file(path, owner));
    generator.feed(std::span(tokens).subspan(cut));
    EXPECT_EQ(generator.generate(greedy(60))[0].tokens, expected) << cut;
    EXPECT_EQ(generator.save().tokens, 1360);
  }
}

TEST_F(StateFileTest, ScoresWhatTheWholeTextGives) {
  const std::vector<int32_t> tokens = some_tokens(1300);
  const auto scored = [&](Scorer& scorer, std::span<const int32_t> some) {
    std::vector<double> logprobs;
    scorer.score(some, [&](std::span<const float> p) {
      logprobs.insert(logprobs.end(), p.begin(), p.end());
      return true;
    });
    return logprobs;
  };
  Scorer of_whole(ctx, model.weights);
  const std::vector<double> whole = scored(of_whole, tokens);
  for (const size_t cut : {1u, 512u, 700u, 1299u}) {
    save_state_file(path, after({tokens.begin(), tokens.begin() + static_cast<int64_t>(cut)}),
                    owner);
    Scorer scorer(ctx, model.weights);
    scorer.continue_from(load_state_file(path, owner));
    // Token `cut` is the first that is scored, given the last of the state's.
    const std::vector<double> expected(whole.begin() + static_cast<int64_t>(cut) - 1, whole.end());
    for (int round = 0; round < 2; ++round)
      EXPECT_TRUE(op_test::close(scored(scorer, std::span(tokens).subspan(cut)), expected, 1e-5))
          << cut;
    EXPECT_EQ(scorer.top(1)[0].first, of_whole.top(1)[0].first);
  }
}

TEST_F(StateFileTest, KeepsTheTypeOfStates) {
  const std::vector<int32_t> tokens = some_tokens(700);
  const SavedConversation exact = after(tokens), rounded = after(tokens, DType::bf16);
  save_state_file(path, exact, owner);
  const StateFileInfo in_f32 = inspect_state_file(path);
  EXPECT_EQ(in_f32.state_dtype, DType::f32);
  save_state_file(path, rounded, owner);
  const StateFileInfo in_bf16 = inspect_state_file(path);
  EXPECT_EQ(in_bf16.state_dtype, DType::bf16);
  EXPECT_NEAR(static_cast<double>(in_f32.bytes - in_bf16.bytes),
              static_cast<double>(model.config().state_bytes_per_sequence(DType::bf16)), 64);
  EXPECT_NE(in_f32.checksum, in_bf16.checksum);
  expect_same(load_state_file(path, owner), rounded);
  // Into a generator of the other type: exactly, and rounded.
  Generator wide(ctx, model.weights, tokenizer), narrow(ctx, model.weights, tokenizer, DType::bf16);
  wide.restore(load_state_file(path, owner));
  save_state_file(path, wide.save(), owner);
  EXPECT_EQ(inspect_state_file(path).state_dtype, DType::f32);
  narrow.restore(load_state_file(path, owner));
  expect_same(narrow.save(), rounded);
  narrow.restore(exact);
  EXPECT_EQ(DecodeState::saved_dtype(narrow.save().state), DType::bf16);
}

// Written on one engine, read on the other.
void expect_states_to_cross(Context& other) {
  const TestFolder folder;
  write_remembering_model(folder.path() / "model", tiny_config());
  Context cpu(cpu_engine(), 1);
  const Model here = load_model(folder.path() / "model");
  const Model there = load_model(folder.path() / "model", {}, other.memory());
  const StateOwner owner = state_owner_of(here);
  EXPECT_EQ(state_owner_of(there).digest, owner.digest);
  const Tokenizer tokenizer = Tokenizer::bytes();
  Generator a(cpu, here.weights, tokenizer), b(other, there.weights, tokenizer);
  a.feed(some_tokens(1300));
  b.feed(some_tokens(1300));
  save_state_file(folder.path() / "a", a.save(), owner);
  save_state_file(folder.path() / "b", b.save(), state_owner_of(there));
  const std::vector<int32_t> expected = a.generate(greedy(40))[0].tokens;
  for (const char* file : {"a", "b"})
    for (Generator* const g : {&a, &b}) {
      g->restore(load_state_file(folder.path() / file, owner));
      EXPECT_EQ(g->generate(greedy(40))[0].tokens, expected) << file;
    }
}

TEST(StateFileDeferred, CrossesEngines) {
  Context ctx(op_test::deferred_engine(), 1);
  expect_states_to_cross(ctx);
}

TEST(StateFileCuda, CrossesEngines) { op_test::on_cuda(expect_states_to_cross); }

TEST_F(StateFileTest, BelongsToTheWeightsAndNothingElse) {
  const SavedConversation kept = after(some_tokens(5));
  good();
  // The other dialect, computed with in bf16: the same weights.
  save_model(folder.path() / "ss", model.config(), model.weights.parameters, Dialect::state_spaces,
             DType::f32);
  expect_same(load_state_file(path, state_owner_of(load_model(folder.path() / "ss"))), kept);
  expect_same(
      load_state_file(path, state_owner_of(load_model(folder.path() / "model", DType::bf16))),
      kept);
  // One bit of one weight, in each parameter.
  for (const ParameterInfo& info : parameter_table(model.config())) {
    const Model other = copy_model(model, host_memory());
    const Tensor& t = info.of(other.weights.parameters);
    static_cast<std::byte*>(t.data)[t.bytes() - 4] ^= std::byte{1};
    save_model(folder.path() / "other", other.config(), other.weights.parameters, Dialect::hf,
               DType::f32);
    const StateOwner other_owner = state_owner_of(load_model(folder.path() / "other"));
    expect_refusal([&] { load_state_file(path, other_owner); },
                   {"another model", "model", owner.digest, other_owner.digest});
  }
  Config config = tiny_config();
  config.norm_eps = 1e-6f;
  const Model eps = write_and_load(folder.path() / "eps", config);
  expect_refusal([&] { load_state_file(path, state_owner_of(eps)); }, {"another model"});
  const Model larger = write_and_load(folder.path() / "larger", make_config(256, 48, 2));
  expect_refusal([&] { load_state_file(path, state_owner_of(larger)); },
                 {"another shape", "d_inner 96", "d_inner 64"});
}

TEST_F(StateFileTest, RefusesEveryFlippedByte) {
  std::string bytes{MappedFile(good()).text()};
  const size_t header = 8 + static_cast<unsigned char>(bytes[0]) +
                        256 * static_cast<size_t>(static_cast<unsigned char>(bytes[1]));
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  const auto put = [&](size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at));
    file.put(byte).flush();
  };
  for (size_t at = 0; at < bytes.size(); at += at < header + 16 ? 1 : 61)
    for (const int mask : {0x01, 0x80, 0xff}) {
      put(at, static_cast<char>(bytes[at] ^ mask));
      expect_refusal([&] { inspect_state_file(path); }, {});
      put(at, bytes[at]);
      if (HasFailure()) FAIL() << "byte " << at << " of " << bytes.size() << ", mask " << mask;
    }
  EXPECT_EQ(inspect_state_file(path).tokens, 5);
}

TEST_F(StateFileTest, RefusesEveryTruncation) {
  const auto size = fs::file_size(good());
  for (uintmax_t left = size - 1;; left -= std::min<uintmax_t>(left, left < 2000 ? 1 : 997)) {
    fs::resize_file(path, left);
    expect_refusal([&] { inspect_state_file(path); }, {});
    ASSERT_FALSE(HasFailure()) << left << " of " << size << " bytes";
    if (left == 0) break;
  }
  good();
  fs::resize_file(path, size + 1);
  expect_refusal([&] { inspect_state_file(path); }, {"bytes after the last tensor"});
}

// The contents of a state file, to be written again with other contents and a checksum that fits
// them, computed as docs/formats.md says.
struct Contents {
  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor> tensors;
  std::vector<Buffer> buffers;

  explicit Contents(const fs::path& path) {
    const MappedFile file(path);
    TensorTable table = read_safetensors({file.data(), file.size()}, path.string());
    metadata = table.metadata;
    for (const TensorEntry& entry : table.entries) {
      buffers.emplace_back(entry.tensor.bytes());
      std::memcpy(buffers.back().data(), entry.tensor.data, entry.tensor.bytes());
      tensors[entry.name] = entry.tensor;
      tensors[entry.name].data = buffers.back().data();
    }
  }

  void write(const fs::path& path) {
    Xxh64 hash;
    metadata.erase("checksum");
    for (const auto& [key, value] : metadata) hash.update(key + "=" + value + "\n");
    std::vector<NamedTensor> list;
    for (const auto& [name, t] : tensors) {
      std::string shape = "(";
      for (int i = 0; i < t.rank; ++i) shape += (i > 0 ? ", " : "") + std::to_string(t.shape[i]);
      hash.update(name + " " + shape + ") " + name_of(t.dtype) + "\n");
      hash.update(t.data, t.bytes());
      list.push_back({name, t});
    }
    metadata["checksum"] = hex_digits(hash.value());
    write_safetensors(path, list, metadata);
  }
};

TEST_F(StateFileTest, RefusesForgedContentsByName) {
  const fs::path original = folder.path() / "original";
  fs::copy_file(good(), original);
  std::vector<float> zeros(size_t{1} << 12);
  std::vector<double> doubles(size_t{1} << 12);
  const auto forged = [&](const std::function<void(Contents&)>& change,
                          const std::vector<std::string>& parts) {
    Contents contents(original);
    change(contents);
    contents.write(path);
    expect_refusal([&] { load_state_file(path, owner); }, parts);
  };
  Contents(original).write(path);
  EXPECT_EQ(load_state_file(path, owner).tokens, 5) << "the forger must be able to write";

  forged([](Contents& c) { c.metadata["krait.state"] = "2"; }, {"krait.state", "expected 1", "2"});
  forged([](Contents& c) { c.metadata.erase("krait.state"); }, {"not a generation state file"});
  forged([](Contents& c) { c.metadata.erase("model"); }, {"__metadata__: model", "none"});
  forged([](Contents& c) { c.metadata["model"] = "\x1b[31m"; }, {"model", "16 hexadecimal"});
  forged([](Contents& c) { c.metadata["dtype"] = "f8"; }, {"dtype", "f32 or bf16", "f8"});
  forged([](Contents& c) { c.metadata["model"][3] ^= 1; }, {"another model"});
  forged([](Contents& c) { c.tensors["ssm.1"].ptr<float>()[7] = NAN; },
         {"\"ssm.1\"", "element 7", "finite"});
  forged([](Contents& c) { c.tensors["conv.0"].ptr<float>()[0] = INFINITY; }, {"\"conv.0\""});
  // In bf16 infinite.
  forged([](Contents& c) { c.tensors["conv.0"].ptr<float>()[0] = -3.4e38f; }, {"\"conv.0\""});
  forged([](Contents& c) { c.tensors.erase("ssm.1"); }, {"unexpected tensor"});
  forged([](Contents& c) { c.tensors.erase("tokens"); }, {"\"tokens\"", "missing"});
  forged([](Contents& c) { c.tensors.erase("conv.0"); }, {"\"conv.0\"", "missing"});
  forged([](Contents& c) { c.tensors.clear(); }, {"missing"});
  forged([&](Contents& c) { c.tensors["x"] = Tensor(zeros.data(), DType::f32, {4}); },
         {"unexpected tensor"});
  forged(
      [&](Contents& c) {
        c.tensors["conv.1"] = Tensor(zeros.data(), DType::f32, {4, 64});
      },
      {"\"conv.1\"", "(3, 64)", "(4, 64)"});
  forged(
      [&](Contents& c) {
        c.tensors["ssm.0"] = Tensor(doubles.data(), DType::f64, {64, 16});
      },
      {"\"ssm.0\"", "f32", "f64"});
  forged(
      [&](Contents& c) {
        c.tensors["conv.0"].dtype = DType::f16, c.tensors["conv.0"].shape[0] = 6;
      },
      {"\"conv.0\"", "f32 or bf16", "f16"});
  for (const char* name : {"conv.0", "ssm.0", "conv.1", "ssm.1"})  // not all of one type
    forged([&](Contents& c) { c.tensors[name].dtype = DType::bf16, c.tensors[name].shape[0] *= 2; },
           {name == std::string("conv.0") ? "\"ssm.0\"" : name, "f32", "bf16"});
  forged(
      [&](Contents& c) {
        c.tensors["conv.0"] = Tensor(zeros.data(), DType::f32, {INT64_MAX, 0});
      },
      {"conv.0", "out of range"});
  forged(
      [&](Contents& c) {
        c.tensors["ssm.0"] = Tensor(zeros.data(), DType::f32, {0, 16});
      },
      {"ssm.0", "out of range"});
  forged([](Contents& c) { *c.tensors["tokens"].ptr<int64_t>() = 0; },
         {"\"tokens\"", "at least 1"});
  forged([](Contents& c) { *c.tensors["tokens"].ptr<int64_t>() = INT64_MIN; }, {"\"tokens\""});
  forged([](Contents& c) { *c.tensors["tokens"].ptr<int64_t>() = INT64_MAX; },
         {"\"recent_tokens\"", "element 0", "-1"});
  forged([](Contents& c) { *c.tensors["tokens"].ptr<int64_t>() = 4; }, {"element 65531"});
  forged([](Contents& c) { c.tensors["recent_tokens"].ptr<int32_t>()[65535] = 256; },
         {"\"recent_tokens\"", "0 to 255", "256"});
  forged([](Contents& c) { c.tensors["recent_tokens"].shape[0] = 65535; },
         {"\"recent_tokens\"", "65536", "65535"});
}

// Headers that no writer writes.
TEST_F(StateFileTest, RefusesForgedHeaders) {
  const auto with_header = [&](uint64_t length, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof length);
    file << text;
    file.close();
    expect_refusal([&] { inspect_state_file(path); }, {});
  };
  for (const uint64_t length : {uint64_t{0}, uint64_t{1} << 40, UINT64_MAX, UINT64_MAX - 7})
    with_header(length, "{}");
  for (const std::string text :
       {"{}", "{\"__metadata__\":{\"krait.state\":1}}", "{\"__metadata__\":{\"krait.state\":NaN}}",
        "{\"tokens\":{\"dtype\":\"I64\",\"shape\":[18446744073709551615],\"data_offsets\":[0,8]}}",
        "{\"tokens\":{\"dtype\":\"I64\",\"shape\":[1e99],\"data_offsets\":[0,8]}}",
        "{\"tokens\":{\"dtype\":\"I64\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,8]}"
        "}"})
    with_header(text.size(), text);
}

TEST_F(StateFileTest, RefusesForgedStatesInBf16) {
  save_state_file(path, after(some_tokens(5), DType::bf16), owner);
  Contents contents(path);
  contents.write(path);
  EXPECT_EQ(load_state_file(path, owner).tokens, 5) << "the forger must be able to write";
  bf16& element = contents.tensors["ssm.1"].ptr<bf16>()[7];
  element = bf16(INFINITY);
  contents.write(path);
  expect_refusal([&] { load_state_file(path, owner); }, {"\"ssm.1\"", "element 7", "finite"});
}

TEST_F(StateFileTest, LeavesWhatWasThere) {
  const SavedConversation kept = after(some_tokens(5));
  good();
  Generator empty(ctx, model.weights, tokenizer);
  expect_refusal([&] { save_state_file(path, empty.save(), owner); }, {"at least one token"});
  SavedConversation broken = kept;
  const float nan = NAN;
  std::memcpy(broken.state.data() + broken.state.size() - sizeof nan, &nan, sizeof nan);
  expect_refusal([&] { save_state_file(path, broken, owner); }, {"layer 1", "not a number"});
  expect_same(load_state_file(path, owner), kept);
  EXPECT_THROW(save_state_file(folder.path() / "nowhere" / "x", kept, owner), Error);
  EXPECT_THROW(check_state_place(folder.path() / "nowhere" / "x"), Error);
  EXPECT_THROW(check_state_place(folder.path()), Error);
  check_state_place(path);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 2) << "model, book.state";
}

TEST_F(StateFileTest, CopiesAndVerifies) {
  good();
  const fs::path copy = folder.path() / "copy";
  EXPECT_EQ(copy_state_file(path, copy).tokens, 5);
  EXPECT_EQ(MappedFile(copy).text(), MappedFile(path).text());
  fs::resize_file(path, fs::file_size(path) - 1);
  expect_refusal([&] { copy_state_file(path, folder.path() / "second"); }, {"truncated"});
  EXPECT_FALSE(fs::exists(folder.path() / "second"));
}

}  // namespace
}  // namespace krait
