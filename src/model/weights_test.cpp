// Loading, saving, initialization, storage.
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <map>

#include "formats/safetensors.h"
#include "formats/torch_zip.h"
#include "model/model_test.h"

namespace krait {
namespace {

using namespace model_test;
using op_test::to_double;

struct TemporaryFolder {
  fs::path path = fs::temp_directory_path() / ("krait-model-test-" + std::to_string(::getpid()));
  TemporaryFolder() { fs::create_directories(path); }
  ~TemporaryFolder() { fs::remove_all(path); }
};

void expect_equal(const Config& config, const Parameters& a, const Parameters& b) {
  for (const ParameterInfo& p : parameter_table(config))
    EXPECT_EQ(to_double(p.of(a)), to_double(p.of(b))) << p.name;
}

TEST(Weights, WhatIsSavedLoadsBitIdentical) {
  const TemporaryFolder tmp;
  for (const std::string& name : golden_names()) {
    const Model model = load_model(golden_folder() / name);
    const DType dtype = model.weights.dtype;
    for (Dialect dialect : {Dialect::hf, Dialect::state_spaces}) {
      const bool fits = model.config().norm_eps == 1e-5f;
      const fs::path folder = tmp.path / (name + (dialect == Dialect::hf ? "-hf" : "-ss"));
      if (dialect == Dialect::state_spaces && !fits) continue;
      save_model(folder, model.config(), model.weights.parameters, dialect, dtype);
      const Model again = load_model(folder);
      const TensorFile file =
          TensorFile::open_folder(folder);  // with the shape that PyTorch expects
      EXPECT_EQ(file.at("backbone.layers.0.mixer.conv1d.weight").rank, 3);
      EXPECT_EQ(again.weights.dtype, dtype);
      expect_equal(model.config(), model.weights.parameters, again.weights.parameters);
      EXPECT_EQ(again.owned_bytes, static_cast<int64_t>(again.weights.A.bytes()))
          << "all else is mapped";
    }
  }
}

TEST(Weights, TypesOnDiskAndInMemory) {
  const TemporaryFolder tmp;
  const Model model = load_model(golden_folder() / "intermediate_not_double");
  for (DType stored : {DType::f32, DType::bf16, DType::f16}) {
    save_model(tmp.path, model.config(), model.weights.parameters, Dialect::hf, stored);
    EXPECT_EQ(load_model(tmp.path).weights.dtype, stored == DType::bf16 ? DType::bf16 : DType::f32);
    EXPECT_EQ(load_model(tmp.path).file_dtype, stored);
    for (DType wanted : {DType::f32, DType::bf16, DType::f64}) {
      const Model loaded = load_model(tmp.path, wanted);
      for (const ParameterInfo& p : parameter_table(model.config())) {
        const Tensor& t = p.of(loaded.weights.parameters);
        EXPECT_EQ(t.dtype, p.matrix ? wanted : full_precision_of(wanted)) << p.name;
        const double tolerance = !p.matrix                                        ? 0
                                 : stored == DType::bf16 || wanted == DType::bf16 ? 0x1p-7
                                 : stored == DType::f16                           ? 0x1p-10
                                                                                  : 0;
        const std::vector<double> a = to_double(t), b = to_double(p.of(model.weights.parameters));
        for (size_t i = 0; i < a.size(); ++i)
          ASSERT_LE(std::abs(a[i] - b[i]), tolerance * std::abs(b[i]) + (tolerance > 0 ? 1e-7 : 0))
              << p.name;
      }
    }
  }
  EXPECT_THROW(load_model(tmp.path, DType::f16), Error);
  EXPECT_THROW(
      save_model(tmp.path, model.config(), model.weights.parameters, Dialect::hf, DType::i32),
      Error);
}

// A folder whose tensors the test may change before it is loaded.
class Tampered {
 public:
  Tampered() : model_(load_model(golden_folder() / "bias_sharded")) {
    for (const ParameterInfo& p : parameter_table(model_.config()))
      tensors_[p.name] = p.of(model_.weights.parameters);
    config = model_.config();
  }
  Tensor& operator[](const std::string& name) { return tensors_[name]; }
  void rename(const std::string& from, const std::string& to) {
    tensors_[to] = tensors_[from];
    tensors_.erase(from);
  }
  void erase(const std::string& name) { tensors_.erase(name); }
  void add_prefix(const std::string& from, const std::string& to) {
    std::map<std::string, Tensor> renamed;
    for (const auto& [name, t] : tensors_)
      renamed[to + name.substr(name.starts_with(from) ? from.size() : 0)] = t;
    tensors_ = renamed;
  }
  Model load() {
    std::vector<NamedTensor> list;
    for (const auto& [name, t] : tensors_) list.push_back({name, t});
    write_safetensors(folder_.path / "model.safetensors", list);
    std::ofstream(folder_.path / "config.json") << config_to_json(config, Dialect::hf);
    return load_model(folder_.path);
  }
  std::string error() {
    try {
      load();
    } catch (const Error& e) {
      std::string text = e.what();
      const size_t at = text.find(folder_.path.string() + "/");
      return at == std::string::npos ? text : text.substr(at + folder_.path.string().size() + 1);
    }
    return "no error";
  }
  Config config;

 private:
  TemporaryFolder folder_;
  Model model_;
  std::map<std::string, Tensor> tensors_;
};

TEST(Weights, NamesMayVary) {
  {
    Tampered t;
    t.rename("backbone.embeddings.weight", "backbone.embedding.weight");
    t.load();
  }
  {
    Tampered t;
    t.add_prefix("backbone.", "");
    t.load();
  }
  Tampered t;
  t.add_prefix("", "model.");
  t["model.lm_head.weight"] = t["model.backbone.embeddings.weight"];
  t.load();
}

TEST(Weights, WrongFoldersGetOneClearLine) {
  {
    Tampered t;
    t.erase("backbone.layers.1.mixer.D");
    EXPECT_EQ(t.error(), "model.safetensors: tensor \"backbone.layers.1.mixer.D\": tensor missing");
  }
  {
    Tampered t;
    t["backbone.layers.0.mixer.extra"] = t["backbone.layers.0.mixer.D"];
    EXPECT_EQ(t.error(),
              "model.safetensors: tensor \"backbone.layers.0.mixer.extra\": unexpected tensor; "
              "expected only the tensors "
              "that config.json implies");
  }
  {
    Tampered t;
    t.config.d_state = 6;
    EXPECT_EQ(t.error(),
              "model.safetensors: tensor \"backbone.layers.0.mixer.x_proj.weight\": wrong shape; "
              "expected (13, 24), got "
              "(11, 24) f32");
  }
  {
    Tampered t;
    t.config.vocab_size = 1 << 24;
    EXPECT_EQ(t.error(),
              "model.safetensors: tensor \"backbone.embeddings.weight\": wrong shape; expected "
              "(16777216, 12), got (37, "
              "12) f32");
  }
  {
    Tampered t;
    const OwnedTensor whole(DType::i32, {24});
    t["backbone.layers.0.mixer.D"] = whole;
    EXPECT_EQ(t.error(),
              "model.safetensors: tensor \"backbone.layers.0.mixer.D\": wrong element type; "
              "expected f32, bf16, f16 or "
              "f64, got i32");
  }
  {
    Tampered t;
    t.erase("backbone.embeddings.weight");
    EXPECT_NE(t.error().find("no embedding among the tensors"), std::string::npos);
  }
  {
    Tampered t;
    t.config.tie_embeddings = false;
    EXPECT_EQ(t.error(), "model.safetensors: tensor \"lm_head.weight\": tensor missing");
  }
  Tampered t;
  const OwnedTensor other(DType::f32, {37, 12});
  t["lm_head.weight"] = other;
  EXPECT_NE(t.error().find("the head differs from the embedding, yet config.json ties them"),
            std::string::npos);
}

TEST(Weights, StateSpacesWeightsAreNotHiddenByOthers) {
  const TemporaryFolder tmp;
  const Model model = load_model(golden_folder() / "state_spaces_padded");
  save_model(tmp.path, model.config(), model.weights.parameters, Dialect::hf, DType::f32);
  EXPECT_THROW(save_model(tmp.path, model.config(), model.weights.parameters, Dialect::state_spaces,
                          DType::f32),
               Error);
}

TEST(Weights, RandomModelsRun) {
  Context ctx(cpu_engine());
  for (DType dtype : {DType::f32, DType::bf16}) {
    const Model model = make_random_model(make_config(512, 64, 2), dtype, 5);
    const Packed input = packed({random_tokens(20, 512, 1)});
    double sum = 0;
    for (double x : logits_of(ctx, model.weights, input.view(), nullptr)) sum += x * x;
    EXPECT_TRUE(std::isfinite(sum) && sum > 0);
    const std::vector<double> A = to_double(model.weights.A);
    for (size_t i = 0; i < A.size(); ++i) EXPECT_NEAR(A[i], -static_cast<double>(i % 16 + 1), 1e-5);
  }
}

// Memory that the host may not touch except through Memory's functions.
class FarMemory final : public Memory {
 public:
  bool on_host() const override { return false; }
  void zero(void* to, size_t bytes) override { host_memory().zero(to, bytes); }
  void upload(void* to, const void* host, size_t bytes) override { copy(to, host, bytes); }
  void download(void* host, const void* from, size_t bytes) override { copy(host, from, bytes); }
  void copy(void* to, const void* from, size_t bytes) override {
    host_memory().copy(to, from, bytes);
  }

 private:
  void* do_allocate(size_t bytes, size_t alignment) override {
    return host_memory().allocate(bytes, alignment);
  }
  void do_deallocate(void* p, size_t bytes, size_t alignment) override {
    host_memory().deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

TEST(Weights, RandomModelsAreTheSameInEveryMemory) {
  FarMemory far;
  Config config = make_config(3000, 64, 2);  // an embedding longer than the pattern
  config.tie_embeddings = false;
  const Model here = make_random_model(config, DType::bf16, 5);
  const Model there = make_random_model(config, DType::bf16, 5, far);
  for (const ParameterInfo& p : parameter_table(config)) {
    const Tensor &a = p.of(here.weights.parameters), &b = p.of(there.weights.parameters);
    ASSERT_EQ(a.bytes(), b.bytes()) << p.name;
    EXPECT_EQ(std::memcmp(a.data, b.data, a.bytes()), 0) << p.name;
  }
  EXPECT_EQ(to_double(there.weights.A), to_double(here.weights.A));
  const std::vector<double> embedding = to_double(there.weights.parameters.embedding);
  for (size_t i = 65537; i < embedding.size(); ++i) ASSERT_EQ(embedding[i], embedding[i - 65537]);
  EXPECT_NE(embedding[0], embedding[1]);
}

TEST(ParameterStore, DecayedFirstAlignedAndComplete) {
  Config c = small_config();
  c.selective_B = c.selective_C = c.tie_embeddings = false;
  const ParameterStore store(c);
  const char* const base = static_cast<char*>(store.flat().data);
  int64_t last_end = 0, count = 0;
  const int64_t boundary = store.decayed().size();
  std::map<int64_t, int64_t> pieces;  // begin, end
  for (const ParameterInfo& p : parameter_table(c)) {
    const Tensor& t = p.of(store.parameters());
    const int64_t begin = (static_cast<char*>(t.data) - base) / 4;
    EXPECT_EQ(begin % 16, 0);
    EXPECT_EQ(begin < boundary, p.decay) << p.name;
    pieces[begin] = begin + t.size();
    count += t.size();
  }
  EXPECT_EQ(count, parameter_count(c));
  for (const auto& [begin, end] : pieces) {
    EXPECT_GE(begin, last_end);
    EXPECT_LT(begin - last_end, 16);
    last_end = end;
  }
  EXPECT_EQ(store.decayed().size() + store.undecayed().size(), store.flat().size());
}

TEST(ParameterTable, WhatDecays) {
  Config c = small_config();
  c.selective_B = c.selective_C = false;
  for (const ParameterInfo& p : parameter_table(c)) {
    bool matrix = false;
    for (const char* name : {"embeddings", "in_proj.weight", "conv1d.weight", "x_proj.weight",
                             "dt_proj.weight", "out_proj.weight"})
      matrix = matrix || p.name.find(name) != std::string::npos;
    EXPECT_EQ(p.decay, matrix) << p.name;
  }
}

struct Moments {
  double mean = 0, deviation = 0, low = INFINITY, high = -INFINITY;
  explicit Moments(const std::vector<double>& v) {
    for (double x : v) {
      mean += x / static_cast<double>(v.size());
      low = std::min(low, x);
      high = std::max(high, x);
    }
    for (double x : v) deviation += (x - mean) * (x - mean) / static_cast<double>(v.size());
    deviation = std::sqrt(deviation);
  }
};

void expect_uniform(const Tensor& t, double bound) {
  const std::vector<double> v = to_double(t);
  const Moments m(v);
  EXPECT_LE(m.high, bound * (1 + 1e-6));  // float rounding
  EXPECT_GE(m.low, -bound * (1 + 1e-6));
  const double edge =
      (1 - 20 / static_cast<double>(v.size())) * bound;  // reached but for one chance in e^10
  EXPECT_GT(m.high, edge);
  EXPECT_LT(m.low, -edge);
  EXPECT_NEAR(m.deviation, bound / std::sqrt(3.0), 0.03 * bound);
  EXPECT_NEAR(m.mean, 0, 5 * bound / std::sqrt(static_cast<double>(v.size())));
}

TEST(Init, IsThePapers) {
  Config c = make_config(512, 128, 4);
  c.use_bias = true;
  c.tie_embeddings = false;
  const ParameterStore store(c);
  initialize(c, store.parameters(), 7);
  const LayerParameters& p = store.parameters().layers[2];
  const Moments embedding(to_double(store.parameters().embedding));
  EXPECT_NEAR(embedding.deviation, 0.02, 3e-4);
  EXPECT_NEAR(embedding.mean, 0, 5e-4);
  EXPECT_GT(embedding.high, 0.07);
  expect_uniform(p.in_proj, 1 / std::sqrt(128.0));
  expect_uniform(p.x_proj, 1 / std::sqrt(256.0));
  expect_uniform(p.dt_proj, 1 / std::sqrt(8.0));
  expect_uniform(p.out_proj, 1 / std::sqrt(256.0) / 2);
  expect_uniform(p.conv1d_weight, 0.5);
  expect_uniform(p.conv1d_bias, 0.5);
  expect_uniform(store.parameters().lm_head, 1 / std::sqrt(128.0));
  for (const Tensor& t : {p.in_proj_bias, p.out_proj_bias})
    for (double x : to_double(t)) EXPECT_EQ(x, 0);
  for (const Tensor& t : {p.norm, p.D, store.parameters().norm_f})
    for (double x : to_double(t)) EXPECT_EQ(x, 1);
  const std::vector<double> A_log = to_double(p.A_log);
  for (size_t i = 0; i < A_log.size(); ++i)
    EXPECT_FLOAT_EQ(static_cast<float>(A_log[i]), std::log(static_cast<float>(i % 16 + 1)));
}

TEST(Init, StepsAreLogUniform) {
  Config c = make_config(8, 4096, 1);
  c.dt_init_floor = 0.002;
  ParameterStore store(c, DType::f64);
  initialize(c, store.parameters(), 8);
  std::vector<double> dt = to_double(store.parameters().layers[0].dt_proj_bias);
  for (double& x : dt) x = std::log1p(std::exp(x));  // softplus
  std::sort(dt.begin(), dt.end());
  EXPECT_NEAR(dt.front(), 0.002, 1e-12);  // the floor
  EXPECT_LE(dt.back(), 0.1);
  const double n = static_cast<double>(dt.size());
  for (double q : {0.2, 0.4, 0.6, 0.8, 0.99}) {  // log dt is uniform on [log 0.001, log 0.1]
    const double expected = std::max(0.001 * std::pow(100.0, q), 0.002);
    EXPECT_NEAR(std::log(dt[static_cast<size_t>(q * n)]), std::log(expected), 0.12);
  }
}

TEST(Init, DependsOnSeedAndNameOnly) {
  // An embedding of several threads' ranges.
  const Config c = make_config(4000, 16, 2), deeper = make_config(4000, 16, 3);
  const ParameterStore a(c), b(c), d(c), e(deeper);
  initialize(c, a.parameters(), 1);
  initialize(c, b.parameters(), 1, /*threads=*/3);
  initialize(c, d.parameters(), 2);
  initialize(deeper, e.parameters(), 1);
  EXPECT_EQ(to_double(a.flat()), to_double(b.flat()));
  EXPECT_NE(to_double(a.parameters().embedding), to_double(d.parameters().embedding));
  EXPECT_EQ(to_double(a.parameters().layers[1].in_proj),
            to_double(e.parameters().layers[1].in_proj));
  EXPECT_NE(to_double(a.parameters().layers[0].in_proj),
            to_double(a.parameters().layers[1].in_proj));
}

}  // namespace
}  // namespace krait
