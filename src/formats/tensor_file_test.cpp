#include "formats/tensor_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "formats/safetensors.h"
#include "formats/test_files.h"
#include "formats/torch_zip.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::TemporaryFolder;

const fs::path kGolden = fs::path(KRAIT_SOURCE_DIR) / "tests/golden/formats";

// The rule of scripts/make_golden_formats.py.
template <class T>
void expect_golden_values(const Tensor& t) {
  ASSERT_TRUE(aligned(t));
  for (int64_t i = 0; i < t.size(); ++i) {
    const double expected =
        std::is_integral_v<T> ? static_cast<double>(i) : static_cast<double>(i) / 4 - 1;
    EXPECT_EQ(static_cast<double>(t.ptr<T>()[i]), expected) << i;
  }
}

void expect_golden(const TensorFile& file) {
  expect_golden_values<float>(file.at("embedding.weight"));
  expect_golden_values<bf16>(file.at("conv1d.weight"));
  expect_golden_values<f16>(file.at("half"));
  expect_golden_values<double>(file.at("double"));
  expect_golden_values<int32_t>(file.at("int"));
  expect_golden_values<int64_t>(file.at("long"));
  expect_golden_values<uint8_t>(file.at("byte"));
  EXPECT_EQ(shape_string(file.at("embedding.weight")), "(6, 4) f32");
  EXPECT_EQ(shape_string(file.at("conv1d.weight")), "(4, 1, 3) bf16");
  EXPECT_EQ(shape_string(file.at("scalar")), "(1) f32");
  EXPECT_EQ(file.at("scalar").ptr<float>()[0], -1.0f);
  EXPECT_EQ(shape_string(file.at("empty")), "(0, 3) f32");
  EXPECT_TRUE(file.contains("bool") && file.contains("rank5"));
  EXPECT_NE(error_of([&] { file.at("bool"); }).find("unsupported element type"), std::string::npos);
  EXPECT_NE(error_of([&] { file.find("rank5"); }).find("more than 4 dimensions"),
            std::string::npos);
}

TEST(TensorFile, ReadsWhatSafetensorsWrote) {
  const TensorFile file = TensorFile::open(kGolden / "plain.safetensors");
  expect_golden(file);
  EXPECT_EQ(file.size(), 11u);
  EXPECT_EQ(file.metadata().at("note"), "golden");
  EXPECT_EQ(file.dtype_of("bool"), "BOOL");
}

TEST(TensorFile, ReadsWhatTorchWrote) {
  const TensorFile file = TensorFile::open(kGolden / "plain.bin");
  expect_golden(file);
  EXPECT_EQ(file.size(), 15u);
  EXPECT_EQ(file.names().front(), "embedding.weight");
  EXPECT_EQ(file.names().back(), "number");
  const Tensor rows = file.at("rows");  // rows 1 and 2 of (4, 3)
  EXPECT_EQ(shape_string(rows), "(2, 3) f32");
  EXPECT_EQ(rows.ptr<float>()[0], 3 / 4.f - 1);
  EXPECT_EQ(rows.ptr<float>()[5], 8 / 4.f - 1);
  expect_golden_values<float>(file.at("parameter"));
  EXPECT_NE(error_of([&] { file.at("transposed"); }).find("not contiguous"), std::string::npos);
  EXPECT_NE(error_of([&] { file.at("number"); }).find("not a tensor but a whole number"),
            std::string::npos);
}

TEST(TensorFile, ReadsModulesWithTiedWeightsAndMetadata) {
  for (const char* name : {"module.bin", "protocol5.bin"}) {
    const TensorFile file = TensorFile::open(kGolden / name);
    EXPECT_EQ(file.names(),
              (std::vector<std::string>{"linear.weight", "linear.bias", "head.weight"}));
    expect_golden_values<float>(file.at("linear.weight"));
    EXPECT_EQ(file.at("head.weight").data, file.at("linear.weight").data);
  }
}

TEST(TensorFile, RefusesOldAndNestedPickles) {
  EXPECT_NE(error_of([] { TensorFile::open(kGolden / "legacy.bin"); }).find("old format"),
            std::string::npos);
  EXPECT_NE(error_of([] {
              TensorFile::open(kGolden / "nested.bin");
            }).find("\"state_dict\" holds a dict"),
            std::string::npos);
}

TEST(TensorFile, SaysWhichTensorAndFile) {
  const TensorFile file = TensorFile::open(kGolden / "plain.bin");
  const std::string error = error_of([&] { file.at("nope"); });
  EXPECT_NE(error.find("plain.bin"), std::string::npos) << error;
  EXPECT_NE(error.find("\"nope\""), std::string::npos) << error;
  EXPECT_EQ(file.find("nope"), nullptr);
  EXPECT_EQ(file.file_of("half"), (kGolden / "plain.bin").string());
}

TEST(TensorFile, StaysValidWhenMoved) {
  TensorFile a = TensorFile::open(kGolden / "plain.safetensors");
  const Tensor before = a.at("half");
  const TensorFile b = std::move(a);
  EXPECT_EQ(b.at("half").data, before.data);
  expect_golden(b);
}

TEST(TensorFile, KnowsMisalignedViews) {
  alignas(8) std::byte memory[16];
  EXPECT_TRUE(aligned(Tensor(memory, DType::f32, {1})));
  EXPECT_FALSE(aligned(Tensor(memory + 2, DType::f32, {1})));
  EXPECT_TRUE(aligned(Tensor(memory + 1, DType::u8, {1})));
}

class Shards : public ::testing::Test {
 protected:
  // Two shards of kind `extension` with their index; w<i> holds the number i.
  void write(const std::string& extension, const std::string& index_name) {
    std::string map;
    for (int shard = 0; shard < 2; ++shard) {
      std::vector<NamedTensor> tensors;
      const std::string file = "part-" + std::to_string(shard) + extension;
      for (size_t i = static_cast<size_t>(shard) * 3; i < static_cast<size_t>(shard) * 3 + 3; ++i) {
        numbers_[i] = static_cast<float>(i);
        tensors.push_back({"w" + std::to_string(i), Tensor(&numbers_[i], DType::f32, {1})});
        map += (map.empty() ? "\"w" : ",\"w") + std::to_string(i) + "\":\"" + file + "\"";
      }
      if (extension == ".bin")
        write_torch_zip(folder_.path / file, tensors);
      else
        write_safetensors(folder_.path / file, tensors);
    }
    write_index(
        index_name,
        "{\"metadata\":{\"total_size\":24,\"x\":[1,{\"y\":null}]},\"weight_map\":{" + map + "}}");
  }
  void write_index(const std::string& name, const std::string& text) {
    write_file_atomic(folder_.path / name, text);
  }
  std::string error_with_index(const std::string& text) {
    write_index("model.safetensors.index.json", text);
    return error_of([&] { TensorFile::open_folder(folder_.path); });
  }

  TemporaryFolder folder_;
  float numbers_[6] = {};
};

TEST_F(Shards, OpenAsOne) {
  for (const std::string kind : {".bin", ".safetensors"}) {
    write(kind, (kind == ".bin" ? "pytorch_model.bin" : "model.safetensors") +
                    std::string(".index.json"));
    const TensorFile file = TensorFile::open_folder(folder_.path);
    ASSERT_EQ(file.size(), 6u);
    for (int i = 0; i < 6; ++i) {
      const std::string name = "w" + std::to_string(i);
      EXPECT_EQ(file.names()[static_cast<size_t>(i)], name);
      EXPECT_EQ(file.at(name).ptr<float>()[0], static_cast<float>(i));
      EXPECT_EQ(fs::path(file.file_of(name)).filename(), "part-" + std::to_string(i / 3) + kind);
    }
  }
}

TEST_F(Shards, BadIndexesAreErrors) {
  write(".safetensors", "model.safetensors.index.json");
  const auto map = [](const std::string& entries) { return "{\"weight_map\":{" + entries + "}}"; };
  const std::pair<std::string, const char*> cases[] = {
      {map(R"("w0":"../part-0.safetensors")"), "shard outside the folder"},
      {map(R"("w0":"a/../../part-0.safetensors")"), "shard outside the folder"},
      {map(R"("w0":"/etc/x.safetensors")"), "shard outside the folder"},
      {map(R"("w0":"..\\part-0.safetensors")"), "shard outside the folder"},
      {map(R"("w0":"part-0.safetensors\u0000.bin")"), "shard outside the folder"},
      {map(R"("w0":"")"), "shard outside the folder"},
      {map(R"("w0":"./")"), "shard outside the folder"},
      {map(R"("w0":"model.safetensors.index.json")"), "unknown kind of weight file"},
      {map(R"("w0":"missing.safetensors")"), "cannot open"},
      {map(R"("w5":"part-0.safetensors")"), "tensor missing from its shard"},
      {map(R"("w0":"part-0.safetensors","w0":"part-0.safetensors")"), "key given twice"},
      {map(R"("w0":3)"), "expected a file name, got 3"},
      {map(R"("w0":null)"), "expected a file name, got null"},
      {map(R"("w0":{"a":"b"})"), "expected a file name, got an object"},
      {map(""), "no tensors"},
      {R"({"weight_map":{},"weight_map":{}})", "key given twice"},
      {R"({"weight_map":["a"]})", "expected an object with a member weight_map, got an array"},
      {R"({"metadata":{}})", "field missing"},
      {R"(["weight_map"])", "got an array"},
      {"{", "not valid JSON"},
      {"", "not valid JSON"},
      {std::string(100, '['), "nested too deeply"},
  };
  for (const auto& [text, expected] : cases) {
    const std::string error = error_with_index(text);
    EXPECT_NE(error.find(expected), std::string::npos) << text << "\n" << error;
    EXPECT_NE(error.find(folder_.path.string()), std::string::npos) << error;
  }
}

TEST_F(Shards, AFolderWithoutWeightsSaysWhatWasLookedFor) {
  const std::string error = error_of([&] { TensorFile::open_folder(folder_.path); });
  for (const char* name : {"model.safetensors,", "model.safetensors.index.json",
                           "pytorch_model.bin,", "pytorch_model.bin.index.json"})
    EXPECT_NE(error.find(name), std::string::npos) << error;
  EXPECT_NE(error_of([] { TensorFile::open_folder("/nonexistent"); }).find("no such folder"),
            std::string::npos);
}

TEST_F(Shards, GitLfsPointersAreNamedAsSuch) {
  write_index("model.safetensors",
              "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n");
  EXPECT_NE(error_of([&] { TensorFile::open_folder(folder_.path); }).find("Git LFS"),
            std::string::npos);
}

}  // namespace
}  // namespace krait
