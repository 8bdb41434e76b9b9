#include "formats/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "core/mapped_file.h"
#include "formats/json.h"
#include "formats/test_files.h"

namespace krait {
namespace {

using test::bytes_of;
using test::error_of;
using test::little_endian;

std::string file_of(const std::string& header, size_t data_bytes = 0) {
  return little_endian(header.size(), 8) + header + std::string(data_bytes, '\1');
}
std::string entry(const std::string& name, const std::string& shape, uint64_t begin, uint64_t end,
                  const std::string& dtype = "F32") {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape +
         "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}
std::string error_in(const std::string& file) {
  return error_of([&] { read_safetensors(bytes_of(file), "m.safetensors"); });
}

TEST(Safetensors, ReadsTensorsInTheHeadersOrder) {
  const std::string file = file_of("{" + entry("b", "2,1", 4, 12) + "," + entry("a", "", 0, 4) +
                                       R"(,"__metadata__":{"k":"v"}})" + "  ",
                                   12);
  const TensorTable table = read_safetensors(bytes_of(file), "m");
  ASSERT_EQ(table.entries.size(), 2u);
  EXPECT_EQ(table.entries[0].name, "b");
  EXPECT_EQ(shape_string(table.entries[0].tensor), "(2, 1) f32");
  EXPECT_EQ(shape_string(table.entries[1].tensor), "(1) f32");
  EXPECT_EQ(static_cast<const char*>(table.entries[0].tensor.data), file.data() + file.size() - 8);
  EXPECT_EQ(table.metadata.at("k"), "v");
}

TEST(Safetensors, ReadsFilesWithoutTensors) {
  EXPECT_TRUE(read_safetensors(bytes_of(file_of("{}")), "m").entries.empty());
}

TEST(Safetensors, EmptyTensorsTakeNoSpace) {
  const std::string file = file_of("{" + entry("a", "0,5", 4, 4) + "," + entry("b", "1", 0, 4) +
                                       "," + entry("c", "3,0", 0, 0) + "}",
                                   4);
  EXPECT_EQ(read_safetensors(bytes_of(file), "m").entries[0].tensor.size(), 0);
}

TEST(Safetensors, OtherElementTypesAreListed) {
  const std::string file =
      file_of("{" + entry("a", "3", 0, 3, "I8") + "," + entry("f", "4", 3, 5, "F4") + "," +
                  entry("g", "2", 5, 7, "F8_E4M3") + "}",
              7);
  const TensorTable table = read_safetensors(bytes_of(file), "m");
  for (const TensorEntry& e : table.entries)
    EXPECT_EQ(e.problem, "unsupported element type " + e.dtype);
}

TEST(Safetensors, HostileFilesAreErrors) {
  const std::string max64 = "18446744073709551615", two63 = "9223372036854775808";
  const std::string good = "{" + entry("a", "2", 0, 8) + "}";
  const std::pair<std::string, const char*> cases[] = {
      {"", "file truncated; expected 8 bytes"},
      {"1234567", "file truncated; expected 8 bytes"},
      {little_endian(0, 8), "not a safetensors file"},
      {little_endian(1, 8), "header length: file truncated"},
      {little_endian(100'000'000, 8) + "{}", "header length: file truncated"},
      {little_endian(100'000'001, 8) + "{}", "header too long"},
      {little_endian(uint64_t{1} << 31, 8) + "{}", "header too long"},
      {little_endian(uint64_t{1} << 32, 8) + "{}", "header too long"},
      {little_endian(uint64_t{1} << 61, 8) + "{}", "header too long"},
      {little_endian(~uint64_t{0}, 8) + "{}", "header too long"},
      {little_endian(~uint64_t{0} - 7, 8) + "{}", "header too long"},
      {file_of(" " + good, 8), "expected { as its first character"},
      {file_of("[]"), "expected { as its first character"},
      {file_of("{"), "not valid JSON"},
      {file_of("{}x"), "not valid JSON"},
      {file_of("{}{}"), "not valid JSON"},
      {file_of("{\"\xff\":1}"), "not valid JSON"},
      {file_of(good.substr(0, good.size() - 1), 8), "not valid JSON"},
      {file_of(good, 7), "file truncated; expected 8 bytes of data, got 7"},
      {file_of(good, 9), "bytes after the last tensor"},
      {file_of(good + "  ", 0), "file truncated"},
      {file_of("{}", 1), "bytes after the last tensor"},
      {file_of("{" + entry("a", "2", 4, 12) + "}", 12), "hole in the data"},
      {file_of("{" + entry("a", "1", 0, 4) + "," + entry("b", "1", 8, 12) + "}", 12),
       "hole in the data"},
      {file_of("{" + entry("a", "2", 0, 8) + "," + entry("b", "2", 4, 12) + "}", 12),
       "data overlaps"},
      {file_of("{" + entry("a", "1", 0, 4) + "," + entry("b", "1", 0, 4) + "}", 4),
       "data overlaps"},
      {file_of("{" + entry("a", "2", 8, 0) + "}", 8), "tensor \"a\": data_offsets: hole"},
      {file_of("{" + entry("a", "0", 0, 0) + "," + entry("b", "1", 4, 0) + "}", 4),
       "\"b\": data_offsets"},
      {file_of("{" + entry("a", "3", 0, 8) + "}", 8),
       "size does not fit shape and dtype; expected 12 bytes, got 8"},
      {file_of("{" + entry("a", "2", 0, 8, "F16") + "}", 8), "expected 4 bytes, got 8"},
      {file_of("{" + entry("a", "2", 0, 8, "BF16") + "}", 8), "expected 4 bytes"},
      {file_of("{" + entry("a", "3", 0, 2, "F4") + "}", 2), "expected whole bytes"},
      {file_of("{" + entry("a", "2", 0, 8, "Q8") + "}", 8), "unknown element type"},
      {file_of("{" + entry("a", "2", 0, 8, "f32") + "}", 8), "unknown element type"},
      {file_of("{" + entry("a", max64, 0, 8) + "}", 8), "number too large"},
      {file_of("{" + entry("a", two63, 0, 8) + "}", 8), "number too large"},
      {file_of("{" + entry("a", "4294967296,4294967296", 0, 0) + "}"), "number too large"},
      {file_of("{" + entry("a", "2147483648,4294967296,0", 0, 0) + "}"), "number too large"},
      {file_of("{" + entry("a", "0,9223372036854775807,2", 0, 0) + "}"), "number too large"},
      {file_of("{" + entry("a", "2305843009213693952", 0, 8, "F64") + "}", 8), "number too large"},
      {file_of("{" + entry("a", "4611686018427387904", 0, 0) + "}"), "number too large"},
      {file_of("{" + entry("a", max64 + "0", 0, 8) + "}", 8), "expected whole numbers"},
      {file_of("{" + entry("a", "-2", 0, 8) + "}", 8), "\"shape\": unexpected content"},
      {file_of("{" + entry("a", "2.0", 0, 8) + "}", 8),
       "expected whole numbers of at least 0, got 2.0"},
      {file_of("{" + entry("a", "\"2\"", 0, 8) + "}", 8), "\"shape\": unexpected content"},
      {file_of("{" + entry("a", "[2]", 0, 8) + "}", 8), "got an array"},
      {file_of("{" + entry("a", "{}", 0, 8) + "}", 8), "got an object"},
      {file_of("{" + entry("a", "2", 0, 8) + "," + entry("a", "0", 8, 8) + "}", 8),
       "tensor given twice"},
      {file_of(R"({"__metadata__":{"a":"b","a":"c"}})"), "key given twice"},
      {file_of(R"({"__metadata__":{},"__metadata__":{}})"), "key given twice"},
      {file_of(R"({"__metadata__":{"a":1}})"),
       "__metadata__: \"a\": unexpected content; expected a string, got 1"},
      {file_of(R"({"__metadata__":{"a":{}}})"), "got an object"},
      {file_of(R"({"__metadata__":"a"})"), "expected an object"},
      {file_of(R"({"a":3})"), "expected an object, got 3"},
      {file_of(R"({"a":null})"), "expected an object, got null"},
      {file_of(R"({"a":[]})"), "expected an object, got an array"},
      {file_of(R"({"a":{}})"), "tensor \"a\": \"dtype\": field missing"},
      {file_of(R"({"a":{"dtype":"F32","shape":[]}})"), "\"data_offsets\": field missing"},
      {file_of(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4), "\"shape\": field missing"},
      {file_of(R"({"a":{"dtype":"F32","dtype":"F32"}})"), "key given twice"},
      {file_of(R"({"a":{"shape":[2],"shape":[]}})"), "key given twice"},
      {file_of(R"({"a":{"extra":1}})"), "\"extra\": unknown field"},
      {file_of(R"({"a":{"dtype":3}})"), "expected a string, got 3"},
      {file_of(R"({"a":{"dtype":["F32"]}})"), "got an array"},
      {file_of(R"({"a":{"shape":3}})"), "\"shape\": unexpected content"},
      {file_of(R"({"a":{"shape":"3"}})"), "\"shape\": unexpected content"},
      {file_of(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0]}})"),
       "wrong count; expected two numbers, got 1"},
      {file_of(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[]}})"), "wrong count"},
      {file_of(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4,8]}})"),
       "\"data_offsets\": unexpected content"},
      {file_of("{\"a\":" + std::string(70, '[') + std::string(70, ']') + "}"), "nested too deeply"},
      {file_of("{\"a\":" + std::string(1 << 20, '{')), "nested too deeply"},
      {file_of("{\"" + std::string(kMaxJsonString + 1, 'a') + "\":{}}"), "string too long"},
  };
  EXPECT_GE(std::size(cases), 60u);
  EXPECT_EQ(error_in(file_of(good, 8)), "(no error)");
  for (const auto& [file, expected] : cases) {
    const std::string error = error_in(file);
    EXPECT_NE(error.find(expected), std::string::npos) << file.substr(0, 200) << "\n" << error;
    EXPECT_TRUE(error.starts_with("m.safetensors: ")) << error;
    EXPECT_LT(error.size(), 400u);
  }
}

TEST(Safetensors, EveryTruncationIsAnError) {
  const std::string file =
      file_of("{" + entry("a", "2", 0, 8) + "," + entry("b", "1", 8, 12) + "}  ", 12);
  ASSERT_EQ(error_in(file), "(no error)");
  for (size_t n = 0; n < file.size(); ++n)
    EXPECT_NE(error_in(file.substr(0, n)), "(no error)") << n;
}

TEST(Safetensors, TooManyTensorsAreAnError) {
  std::string header = "{";
  for (size_t i = 0; i <= kMaxTensors; ++i)
    header += (i ? "," : "") + entry(std::to_string(i), "0", 0, 0);
  EXPECT_NE(error_in(file_of(header + "}")).find("too many tensors"), std::string::npos);
}

TEST(Safetensors, WritesWhatItReads) {
  test::TemporaryFolder folder;
  test::Random random{7};
  std::vector<uint64_t> memory(64);
  for (uint64_t& x : memory) x = random();
  constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64,
                              DType::i32, DType::i64,  DType::u8};
  for (int round = 0; round < 20; ++round) {
    std::vector<NamedTensor> tensors;
    for (int i = 0; i < round; ++i) {
      Tensor t(memory.data(), kTypes[random() % 7],
               {static_cast<int64_t>(random() % 5), static_cast<int64_t>(1 + random() % 4)});
      if (i % 3 == 0) t = Tensor(memory.data() + 5, t.dtype, {3});
      tensors.push_back({"t\"\\\u00e9" + std::to_string(i), t});
    }
    const auto path = folder.path / "x.safetensors";
    write_safetensors(path, tensors, {{"round", std::to_string(round)}});
    const MappedFile file(path);
    const TensorTable table = read_safetensors({file.data(), file.size()}, "x");
    ASSERT_EQ(table.entries.size(), tensors.size());
    EXPECT_EQ(table.metadata.at("round"), std::to_string(round));
    for (const NamedTensor& t : tensors) {
      const auto found = std::find_if(table.entries.begin(), table.entries.end(),
                                      [&](const TensorEntry& e) { return e.name == t.name; });
      ASSERT_NE(found, table.entries.end()) << t.name;
      ASSERT_EQ(shape_string(found->tensor), shape_string(t.tensor));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(found->tensor.data) % size_of(t.tensor.dtype), 0u);
      EXPECT_EQ(std::memcmp(found->tensor.data, t.tensor.data, t.tensor.bytes()), 0);
    }
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    EXPECT_EQ((length + 8) % 64, 0u);
  }
}

TEST(Safetensors, NamesThatAreNotUtf8AreRefused) {
  test::TemporaryFolder folder;
  float x = 0;
  const NamedTensor t{"\xff", Tensor(&x, DType::f32, {1})};
  EXPECT_NE(error_of([&] {
              write_safetensors(folder.path / "x", {&t, 1});
            }).find("not UTF-8"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder.path / "x"));
}

TEST(Safetensors, MutatedFilesLoadOrAreErrors) {
  const std::string file =
      file_of("{" + entry("a", "2", 0, 8) + "," + entry("b.weight", "1,2", 8, 12, "BF16") +
                  R"(,"__metadata__":{"format":"pt"}})",
              12);
  test::Random random{11};
  int loaded = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string bad = file;
    for (uint64_t k = random() % 2 + 1; k > 0; --k)
      bad[random() % (i % 2 ? 8 + 120 : bad.size())] = static_cast<char>(random());
    if (error_in(bad) == "(no error)") ++loaded;  // any other exception fails the test
  }
  EXPECT_GT(loaded, 0);
  EXPECT_LT(loaded, 5000);
}

}  // namespace
}  // namespace krait
