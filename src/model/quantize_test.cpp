// Weights in 8 bits: the rounding, the loading, and the model that computes with them.
#include "model/quantize.h"

#include <cmath>
#include <limits>

#include "formats/safetensors.h"
#include "model/model_digest.h"
#include "model/model_test.h"
#include "train/test_folder.h"

namespace krait {
namespace {

using namespace model_test;
using op_test::close;
using op_test::on_cuda;
using op_test::TestTensor;
using op_test::to_double;

struct Rows {
  explicit Rows(const TestTensor& from)
      : q(DType::i8, {from.view().shape[0], from.view().shape[1]}),
        scale(DType::f32, {from.view().shape[0]}) {
    quantize_rows(2, from, q, scale, "matrix");
  }
  TestTensor q, scale;
};

TEST(Quantize, RoundsToNearestEven) {
  TestTensor from(DType::f32, {3, 8});
  from.values({127,  0.5,  1.5, 2.5, -0.5, -1.5, -2.5,   126.5,  //
               0,    -0.0, 0,   0,   0,    0,    0,      0,      //
               -254, 254,  1,   3,   -3,   5,    -253.1, 0.9});
  const Rows rows(from);
  EXPECT_EQ(rows.scale.to_double(), (std::vector<double>{1, 0, 2}));
  EXPECT_EQ(rows.q.to_double(),
            (std::vector<double>{127,  0,   2, 2, 0,  -2, -2,   126, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                 -127, 127, 0, 2, -2, 2,  -127, 0}));
}

TEST(Quantize, ErrorIsAtMostHalfAStep) {
  Rng rng(1);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64})
    for (const double size : {1e-30, 1e-3, 1.0, 1e30}) {
      TestTensor from(dtype, {37, 129});
      from.normal(rng, size);
      const Rows rows(from);
      const std::vector<double> w = from.to_double(), q = rows.q.to_double(),
                                scale = rows.scale.to_double();
      for (size_t i = 0; i < w.size(); ++i) {
        ASSERT_LE(std::abs(w[i] - scale[i / 129] * q[i]), scale[i / 129] * 0.50001) << i;
        ASSERT_LE(std::abs(q[i]), 127);
      }
    }
}

TEST(Quantize, TheSmallestNumbersStayInRange) {
  TestTensor from(DType::f32, {3, 2});
  from.values({1e-45, -1e-45, 2.7e-43, -2.7e-43, 1.5e-38, -1e-38});
  const Rows rows(from);
  for (const double q : rows.q.to_double()) EXPECT_LE(std::abs(q), 127);
}

TEST(Quantize, RefusesWhatIsNotFinite) {
  for (const float bad : {std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), std::nanf("")}) {
    TestTensor from(DType::f32, {40, 5});
    from.zero();
    from.view().row<float>(33)[4] = bad;
    try {
      const Rows rows(from);
      ADD_FAILURE() << bad;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("matrix"), std::string::npos) << e.what();
    }
  }
  EXPECT_EQ(quantization_from_name("int8"), Quantization::int8);
  EXPECT_THROW(quantization_from_name("int4"), Error);
}

// The matrices that a quantized model stands for, in the places of the unquantized one's.
Parameters standing_for(const Config& config, Parameters quantized,
                        std::vector<OwnedTensor>& memory) {
  std::vector<ParameterInfo> table = parameter_table(config);
  if (config.tie_embeddings) table.push_back(head_info(config));
  for (const ParameterInfo& p : table) {
    Tensor* const scale = scale_of(p, quantized);
    if (!scale) continue;
    const Tensor q = p.of(quantized);
    memory.emplace_back(DType::f64, std::initializer_list<int64_t>{q.shape[0], q.shape[1]});
    const Tensor& w = memory.back().view();
    for (int64_t r = 0; r < q.shape[0]; ++r)
      for (int64_t i = 0; i < q.shape[1]; ++i)
        w.row<double>(r)[i] = scale->ptr<double>()[r] * q.row<int8_t>(r)[i];
    p.of(quantized) = w;
    *scale = Tensor();
  }
  return quantized;
}

// Every golden model: tied and not, with biases, in shards, of several types on disk.
TEST(QuantizedModel, IsTheModelOfItsRoundedMatrices) {
  for (const std::string& name : golden_names()) {
    SCOPED_TRACE(name);
    const Model model =
        load_model(golden_folder() / name, DType::f64, host_memory(), Quantization::int8);
    const Parameters& p = model.weights.parameters;
    EXPECT_EQ(p.layers[0].in_proj.dtype, DType::i8);
    EXPECT_EQ(p.layers[0].out_proj.dtype, DType::i8);
    EXPECT_EQ(p.head().dtype, DType::i8);
    EXPECT_EQ(p.embedding.dtype, DType::f64);
    std::vector<OwnedTensor> memory;
    Weights rounded = model.weights;
    rounded.parameters = standing_for(model.config(), p, memory);
    Context ctx(reference_engine(), 1);
    const Packed input = packed({random_tokens(9, model.config().vocab_size, 1)});
    const std::vector<double> logits = logits_of(ctx, model.weights, input.view(), nullptr);
    EXPECT_TRUE(close(logits, logits_of(ctx, rounded, input.view(), nullptr), 1e-12));

    const Model exact = load_model(golden_folder() / name, DType::f64);
    EXPECT_EQ(model_digest(model), model_digest(exact));
    const double error =
        op_test::relative_rms(logits, logits_of(ctx, exact.weights, input.view(), nullptr));
    EXPECT_GT(error, 1e-5);
    EXPECT_LT(error, 0.05);
  }
}

TEST(QuantizedModel, OnTheCpuAsInDouble) {
  for (const std::string& name : golden_names()) {
    SCOPED_TRACE(name);
    const auto load = [&](DType dtype) {
      return load_model(golden_folder() / name, dtype, host_memory(), Quantization::int8);
    };
    const Model oracle = load(DType::f64), model = load(DType::f32);
    Context reference(reference_engine(), 1), ctx(cpu_engine(), 2);
    const Config& c = model.config();
    const std::vector<int32_t> tokens = random_tokens(40, c.vocab_size, 1);
    const Packed input = packed({tokens});
    const std::vector<double> expected =
        logits_of(reference, oracle.weights, input.view(), nullptr);
    EXPECT_TRUE(close(logits_of(ctx, model.weights, input.view(), nullptr), expected, 1e-5));
    DecodeState state(c, 1, DType::f32);
    std::vector<double> stepped;
    for (const int32_t token : tokens) {
      const std::vector<double> row = step_logits(ctx, model.weights, {token}, {}, state);
      stepped.insert(stepped.end(), row.begin(), row.end());
    }
    EXPECT_TRUE(close(stepped, expected, 1e-5));

    const OwnedTensor targets = tensor_of(random_tokens(40, c.vocab_size, 2));
    const OwnedTensor loss(DType::f32, {40}), loss_in_double(DType::f64, {40});
    score(ctx, model.weights, input.view(), targets, nullptr, loss);
    score(reference, oracle.weights, input.view(), targets, nullptr, loss_in_double);
    EXPECT_TRUE(close(to_double(loss), to_double(loss_in_double), 1e-5));
  }
}

TEST(QuantizedModel, InBf16AsFarFromTheOracleAsUnquantized) {
  Config config = make_config(300, 128, 4);
  const auto error = [&](Quantization quantization) {
    const Model oracle = make_random_model(config, DType::f64, 3, host_memory(), quantization),
                model = make_random_model(config, DType::bf16, 3, host_memory(), quantization);
    Context reference(reference_engine(), 1), ctx(cpu_engine(), 2);
    const Packed input = packed({random_tokens(40, config.vocab_size, 1)});
    return op_test::relative_rms(logits_of(ctx, model.weights, input.view(), nullptr),
                                 logits_of(reference, oracle.weights, input.view(), nullptr));
  };
  EXPECT_LE(error(Quantization::int8), 2 * error(Quantization::none));
}

TEST(QuantizedModel, IsNeitherTrainedNorSaved) {
  const Config config = make_config(30, 16, 2);
  const Model model = make_random_model(config, DType::f32, 1, host_memory(), Quantization::int8);
  Context ctx(cpu_engine(), 1);
  const Packed input = packed({random_tokens(9, 30, 1)});
  const OwnedTensor targets = tensor_of(random_tokens(9, 30, 2)), loss(DType::f32, {9});
  const ParameterStore gradients(config);
  EXPECT_THROW(forward_backward(ctx, model.weights, {.input = input.view(), .targets = targets},
                                gradients.parameters(), loss),
               CheckFailure);
  const TestFolder folder;
  EXPECT_THROW(save_model(folder.path(), config, model.weights.parameters, Dialect::hf, DType::f32),
               CheckFailure);
}

TEST(QuantizedModel, LoadingRefusesWhatIsNotFiniteByName) {
  const TestFolder folder;
  const Model model = make_random_model(make_config(30, 16, 2), DType::f32);
  model.weights.parameters.layers[1].out_proj.ptr<float>()[7] = std::nanf("");
  save_model(folder.path(), model.config(), model.weights.parameters, Dialect::hf, DType::f32);
  load_model(folder.path());
  try {
    load_model(folder.path(), {}, host_memory(), Quantization::int8);
    ADD_FAILURE() << "loaded";
  } catch (const Error& e) {
    const std::string what = e.what();
    for (const char* part : {"model.safetensors", "backbone.layers.1.mixer.out_proj.weight"})
      EXPECT_NE(what.find(part), std::string::npos) << what;
  }
}

TEST(QuantizedModelCuda, AsOnTheCpu) {
  on_cuda([](Context& gpu) {
    Context cpu(cpu_engine(), 2);
    for (const bool tied : {true, false})
      for (const DType dtype : {DType::f32, DType::bf16}) {
        Config config = make_config(300, 128, 4);
        config.tie_embeddings = tied;
        const Model model = make_random_model(config, dtype, 5, host_memory(), Quantization::int8),
                    there = copy_model(model, gpu.memory());
        const std::vector<int32_t> tokens = random_tokens(200, 300, 1);
        const Packed input = packed({tokens});
        const std::vector<double> expected = logits_of(cpu, model.weights, input.view(), nullptr);
        const auto sent = [&](const std::vector<int32_t>& values) {
          OwnedTensor t(DType::i32, {static_cast<int64_t>(values.size())}, gpu.memory());
          t.upload(values.data());
          return t;
        };
        const OwnedTensor on_gpu = sent(tokens), seq_start = sent({0, 200});
        const OwnedTensor hidden(dtype, {200, config.d_model}, gpu.memory()),
            out(DType::f32, {200, config.vocab_size}, gpu.memory());
        const OwnedTensor received(DType::f32, {200, config.vocab_size});
        forward(gpu, there.weights, {on_gpu, seq_start, {}}, nullptr, hidden);
        logits(gpu, there.weights, hidden, out);
        gpu.memory().download(received->data, out->data, out->bytes());
        EXPECT_TRUE(close(to_double(received), expected, dtype == DType::f32 ? 1e-5 : 2e-2));
        DecodeState state(config, 1, DType::f32, gpu.memory());
        for (int64_t t = 0; t < 200; ++t) {
          step(gpu, there.weights, on_gpu->slice(0, t, t + 1), {}, state,
               hidden->slice(0, t, t + 1));
          logits(gpu, there.weights, hidden->slice(0, t, t + 1), out->slice(0, t, t + 1));
        }
        gpu.memory().download(received->data, out->data, out->bytes());
        EXPECT_TRUE(close(to_double(received), expected, dtype == DType::f32 ? 1e-5 : 2e-2));
      }
  });
}

}  // namespace
}  // namespace krait
