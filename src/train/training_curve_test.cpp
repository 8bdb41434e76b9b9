// The loss of the first 50 steps on tinyshakespeare against PyTorch from the same initial weights
// in the same data order (scripts/make_golden_train.py).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/mapped_file.h"
#include "formats/safetensors.h"
#include "ops/deferred_engine.h"
#include "ops/engine.h"
#include "ops/op_test.h"
#include "train/host_copy.h"
#include "train/learner.h"
#include "train/schedule.h"
#include "train/test_folder.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(KRAIT_SOURCE_DIR) / "tests/golden/train";

fs::path shared_data() {
  const char* folder = std::getenv("KRAIT_DATA");
  return folder ? fs::path(folder) : fs::path(KRAIT_SOURCE_DIR) / "../shared/data";
}

Config small_config() {
  Config config = make_config(256, 48, 2);
  config.d_state = 8;
  return config;
}

std::vector<NamedTensor> named(const Config& config, const Parameters& parameters) {
  std::vector<NamedTensor> tensors;
  for (const ParameterInfo& info : parameter_table(config)) {
    Tensor t = info.of(parameters);
    if (info.file_shape.size() == 3)
      t = t.reshape({info.file_shape[0], info.file_shape[1], info.file_shape[2]});
    tensors.push_back({info.name, t});
  }
  return tensors;
}

// f(golden tensor, the learner's) for every parameter; what f writes is the learner's afterwards.
template <class F>
void for_each_initial_weight(Learner& learner, F&& f) {
  const HostCopy masters(learner.model().config(), learner.model().masters());
  const MappedFile init(kGolden / "init.safetensors");
  const TensorTable table = read_safetensors({init.data(), init.size()}, init.path().string());
  std::map<std::string, Tensor> golden;
  for (const TensorEntry& entry : table.entries) golden[entry.name] = entry.tensor;
  for (const auto& [name, tensor] : named(learner.model().config(), masters.parameters())) {
    ASSERT_EQ(golden.at(name).size(), tensor.size()) << name;
    f(golden.at(name), tensor);
  }
  masters.write_back(learner.model().masters());
}

// The golden curve starts from the initialization of seed 1. To make it anew, run this test with
// KRAIT_WRITE_GOLDEN=1, then scripts/make_golden_train.py.
TEST(TrainingCurve, StartsFromTheInitializationOfSeed1) {
  Learner learner(cpu_engine(), small_config(), {.threads = 1});
  learner.initialize(1);
  if (std::getenv("KRAIT_WRITE_GOLDEN"))
    write_safetensors(kGolden / "init.safetensors",
                      named(learner.model().config(), learner.model().masters().parameters()));
  for_each_initial_weight(learner, [](const Tensor& golden, const Tensor& tensor) {
    for (int64_t i = 0; i < tensor.size(); ++i)
      ASSERT_FLOAT_EQ(golden.ptr<float>()[i], tensor.ptr<float>()[i]);
  });
}

void expect_the_golden_curve(const Engine& engine) {
  const fs::path file = shared_data() / "text/tinyshakespeare.txt";
  if (!fs::exists(file))
    GTEST_SKIP() << "no " << file << "; KRAIT_DATA names the folder of the data";
  const auto golden = nlohmann::json::parse(read_text(kGolden / "curve.json"));
  Learner learner(engine, small_config(), {.threads = 1});
  for_each_initial_weight(learner, [](const Tensor& from, const Tensor& to) {
    std::copy_n(from.ptr<float>(), to.size(), to.ptr<float>());
  });
  learner.masters_changed();

  DataSettings data;
  data.train = {file.string()};
  data.validation_fraction = 0;
  data.shuffle = false;
  data.seq_len = golden["seq_len"];
  data.batch_size = golden["batch_size"];
  const TrainingText text = load_training_text(data);
  BatchSource source(text.train, data);
  const Schedule schedule{golden["lr"], golden["min_lr"], true, golden["warmup"], golden["steps"]};
  Batch batch;
  double worst = 0;
  for (int64_t step = 1; step <= golden["steps"]; ++step) {
    source.next(batch);
    learner.accumulate(batch, 1.0 / static_cast<double>(batch.target_count), nullptr);
    learner.update({}, schedule.at(static_cast<double>(step)), step);
    const double loss = learner.collect().loss / static_cast<double>(batch.target_count);
    const double expected = golden["loss"][static_cast<size_t>(step - 1)];
    EXPECT_TRUE(std::abs(loss - expected) <= 1e-3)
        << "step " << step << ": " << loss << ", PyTorch " << expected;
    worst = std::max(worst, std::abs(loss - expected));
  }
  testing::Test::RecordProperty("largest_difference", std::to_string(worst));
  std::printf("largest difference of the loss over 50 steps: %.2e\n", worst);
}

TEST(TrainingCurve, FollowsPyTorchFor50Steps) { expect_the_golden_curve(cpu_engine()); }

TEST(TrainingCurveCuda, FollowsPyTorchFor50Steps) {
  op_test::on_cuda([](Context& ctx) { expect_the_golden_curve(ctx.engine()); });
}

// Packed sequences of many lengths, so that recordings of several shapes take turns.
std::vector<double> losses_of_50_steps(const Engine& engine) {
  const Config config = small_config();
  Learner learner(engine, config, {.threads = 1});
  learner.initialize(1);
  const Schedule schedule{3e-3, 1e-4, true, 5, 50};
  Rng rng(7);
  std::vector<double> losses;
  for (int64_t step = 1; step <= 50; ++step) {
    Batch batch;
    batch.seq_start = {0};
    while (batch.tokens.size() < 512) {
      const auto length = std::min<size_t>(1 + rng.below(200), 512 - batch.tokens.size());
      for (size_t i = 0; i < length; ++i) {
        const auto word = static_cast<int32_t>(rng.below(16));
        batch.tokens.push_back(word * word);
        batch.targets.push_back(batch.tokens.size() % 2 ? word * 3 : word * word);
      }
      batch.seq_start.push_back(static_cast<int32_t>(batch.tokens.size()));
    }
    batch.target_count = 512;
    learner.accumulate(batch, 1.0 / 512, nullptr);
    learner.update({}, schedule.at(static_cast<double>(step)), step);
    losses.push_back(learner.collect().loss / 512);
  }
  return losses;
}

void expect_the_cpus_losses(const Engine& engine) {
  const std::vector<double> cpu = losses_of_50_steps(cpu_engine()),
                            other = losses_of_50_steps(engine);
  EXPECT_LT(cpu.back(), 0.6 * cpu.front()) << "it must learn something to prove anything";
  for (size_t i = 0; i < cpu.size(); ++i) EXPECT_NEAR(other[i], cpu[i], 1e-4) << "step " << i + 1;
  EXPECT_EQ(losses_of_50_steps(engine), other);
}

TEST(TrainingCurve, IsTheSameOnAnAsynchronousEngine) {
  expect_the_cpus_losses(op_test::deferred_engine());
}

TEST(TrainingCurveCuda, FollowsTheCpuFor50Steps) {
  op_test::on_cuda([](Context& ctx) { expect_the_cpus_losses(ctx.engine()); });
}

}  // namespace
}  // namespace krait
