// The kernel of a decoder step by clusters, its source as it is, on the CPU: what it computes, and
// that no order in which copies happen changes a bit (emulated/emulator.h).
#include "cuda_words.h"

// Behind the words that they use.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <memory>
#include <vector>

#include "ops/decoder_cluster_thread.cuh"
#include "ops/op_test.h"

namespace krait::cuda {
namespace {

using emulated::Copies;
using op_test::TestTensor;

struct Shape {
  int64_t d_model, d_inner, dt_rank, n_layer, num_seqs;
  int clusters;
  DType state_dtype;
  bool biases;
};
constexpr int64_t kVocab = 50, kStates = kClusterStates;

struct Layer {
  TestTensor in_proj, x_proj, dt_proj, out_proj;  // bf16
  TestTensor norm, in_bias, conv_weight, conv_bias, dt_bias, A, D, out_bias;
  TestTensor conv, ssm;  // states, f32 or bf16

  Layer(const Shape& s, Rng& rng)
      : in_proj(DType::bf16, {2 * s.d_inner, s.d_model}),
        x_proj(DType::bf16, {s.dt_rank + 2 * kStates, s.d_inner}),
        dt_proj(DType::bf16, {s.d_inner, s.dt_rank}),
        out_proj(DType::bf16, {s.d_model, s.d_inner}),
        norm(DType::f32, {s.d_model}),
        in_bias(DType::f32, {2 * s.d_inner}),
        conv_weight(DType::f32, {s.d_inner, 4}),
        conv_bias(DType::f32, {s.d_inner}),
        dt_bias(DType::f32, {s.d_inner}),
        A(DType::f32, {s.d_inner, kStates}),
        D(DType::f32, {s.d_inner}),
        out_bias(DType::f32, {s.d_model}),
        conv(s.state_dtype, {2 * s.num_seqs, kClusterBefore, s.d_inner}),
        ssm(s.state_dtype, {2 * s.num_seqs, s.d_inner, kStates}) {
    for (auto [matrix, gain] :
         {std::pair{&in_proj, 1}, {&x_proj, 2}, {&dt_proj, 1}, {&out_proj, 1}})
      matrix->normal(rng, gain / std::sqrt(static_cast<double>(matrix->view().shape[1])));
    norm.normal(rng, 0.2, 1);
    for (TestTensor* t : {&in_bias, &conv_bias, &out_bias}) t->normal(rng, 0.3);
    conv_weight.normal(rng, 0.5);
    dt_bias.normal(rng, 1, -2);
    A.uniform(rng, -4, -0.2);
    for (TestTensor* t : {&D, &conv, &ssm}) t->normal(rng);
  }
};

// A model, and sequences in slots that are neither in order nor all there are.
struct Problem {
  Shape shape;
  std::deque<Layer> layers;
  TestTensor embedding;
  std::vector<int32_t> tokens, slots;

  explicit Problem(const Shape& s) : shape(s), embedding(DType::bf16, {kVocab, s.d_model}) {
    Rng rng(1);
    embedding.normal(rng);
    for (int l = 0; l < s.n_layer; ++l) layers.emplace_back(s, rng);
    for (int i = 0; i < s.num_seqs; ++i) {
      tokens.push_back(static_cast<int32_t>(rng.below(kVocab)));
      slots.push_back(static_cast<int32_t>(2 * s.num_seqs - 1 - 2 * i));
    }
  }
};

float rounded(float x) { return bf16(x); }
float rounded_as(DType dtype, float x) { return dtype == DType::bf16 ? rounded(x) : x; }
float dot(const TestTensor& matrix, int64_t row, const std::vector<float>& x) {
  float sum = 0;
  for (size_t k = 0; k < x.size(); ++k) sum += matrix.view().row<bf16>(row)[k] * x[k];
  return sum;
}
const float* f32(const TestTensor& t) { return t.view().ptr<float>(); }

struct Result {
  std::vector<double> residual, states;  // of all sequences; of all layers
};

// A layer for one sequence, as the ops compose it; r: the residual stream.
void layer_by_definition(const Shape& s, const Layer& l, int slot, std::vector<double>& conv,
                         std::vector<double>& ssm, std::vector<float>& r) {
  const auto bias = [&](const TestTensor& b, int64_t i) { return s.biases ? f32(b)[i] : 0.f; };
  std::vector<float> x, u, z, x_dbl, y;
  float squares = 0;
  for (size_t i = 0; i < r.size(); ++i) {
    squares += r[i] * r[i];
    x.push_back(rounded(r[i] * f32(l.norm)[i]));
  }
  const float scale = 1 / std::sqrt(squares / static_cast<float>(s.d_model) + 1e-5f);
  const auto in = [&](int64_t row) {
    return rounded(dot(l.in_proj, row, x) * scale + bias(l.in_bias, row));
  };
  for (int64_t c = 0; c < s.d_inner; ++c) {
    double* const before = &conv[static_cast<size_t>(slot * kClusterBefore * s.d_inner + c)];
    const float now = in(c), *w = f32(l.conv_weight) + c * 4;
    float sum = bias(l.conv_bias, c) + w[3] * now;
    for (int k = 0; k < kClusterBefore; ++k) {
      double& at = before[k * s.d_inner];
      sum += w[k] * static_cast<float>(at);
      at = k + 1 < kClusterBefore ? before[(k + 1) * s.d_inner] : static_cast<double>(now);
    }
    u.push_back(rounded(silu(sum)));
    z.push_back(in(s.d_inner + c));
  }
  for (int64_t row = 0; row < s.dt_rank + 2 * kStates; ++row)
    x_dbl.push_back(rounded(dot(l.x_proj, row, u)));
  const std::vector<float> dt(x_dbl.begin(), x_dbl.begin() + s.dt_rank);
  const float *B = &x_dbl[dt.size()], *C = B + kStates;
  for (int64_t c = 0; c < s.d_inner; ++c) {
    const float u_c = u[static_cast<size_t>(c)];
    const float delta = softplus(rounded(dot(l.dt_proj, c, dt)) + f32(l.dt_bias)[c]);
    float sum = f32(l.D)[c] * u_c;
    for (int n = 0; n < kStates; ++n) {
      double& h = ssm[static_cast<size_t>((slot * s.d_inner + c) * kStates + n)];
      const float next =
          std::exp(delta * f32(l.A)[c * kStates + n]) * static_cast<float>(h) + delta * u_c * B[n];
      sum += C[n] * next;
      h = rounded_as(s.state_dtype, next);
    }
    y.push_back(rounded(sum * silu(z[static_cast<size_t>(c)])));
  }
  for (size_t i = 0; i < r.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    r[i] += rounded(dot(l.out_proj, row, y) + bias(l.out_bias, row));
  }
}

Result by_definition(const Problem& p) {
  Result out;
  std::vector<std::vector<double>> conv, ssm;
  for (const Layer& l : p.layers)
    conv.push_back(l.conv.to_double()), ssm.push_back(l.ssm.to_double());
  for (size_t i = 0; i < p.tokens.size(); ++i) {
    const bf16* const row = p.embedding.view().row<bf16>(p.tokens[i]);
    std::vector<float> r(row, row + p.shape.d_model);
    for (size_t l = 0; l < p.layers.size(); ++l)
      layer_by_definition(p.shape, p.layers[l], p.slots[i], conv[l], ssm[l], r);
    out.residual.insert(out.residual.end(), r.begin(), r.end());
  }
  for (size_t l = 0; l < p.layers.size(); ++l)
    for (const auto* states : {&conv[l], &ssm[l]})
      out.states.insert(out.states.end(), states->begin(), states->end());
  return out;
}

template <class S>
void thread_of_kernel(const DecoderClusterArgs& args, char* memory) {
  args.cut.seqs == 8    ? decoder_cluster_thread<8, S>(args, memory)
  : args.cut.seqs == 16 ? decoder_cluster_thread<16, S>(args, memory)
                        : decoder_cluster_thread<24, S>(args, memory);
}

CUtensorMap map_of(const TestTensor& m, int tile_rows) {
  return {m.view().ptr<bf16>(), static_cast<int>(m.view().shape[0]),
          static_cast<int>(m.view().shape[1]), tile_rows};
}

DecoderClusterLayer args_of(const Shape& s, const Layer& l, const DecoderClusterPlan& cut) {
  const auto bias = [&](const TestTensor& b) { return s.biases ? f32(b) : nullptr; };
  return {.in_proj = map_of(l.in_proj, cut.channels),
          .x_proj = map_of(l.x_proj, cut.x_proj_rows),
          .dt_proj = map_of(l.dt_proj, cut.channels),
          .out_proj = map_of(l.out_proj, cut.outputs),
          .norm = f32(l.norm),
          .in_bias = bias(l.in_bias),
          .conv_weight = f32(l.conv_weight),
          .conv_bias = bias(l.conv_bias),
          .dt_bias = f32(l.dt_bias),
          .A = f32(l.A),
          .D = f32(l.D),
          .out_bias = bias(l.out_bias),
          .conv = l.conv.view().data,
          .ssm = l.ssm.view().data};
}

DecoderClusterPlan plan_of(const Shape& s) {
  return plan_decoder_cluster({.num_seqs = s.num_seqs,
                               .n_layer = s.n_layer,
                               .d_model = s.d_model,
                               .d_inner = s.d_inner,
                               .d_state = kStates,
                               .d_conv = kClusterBefore + 1,
                               .dt_rank = s.dt_rank,
                               .vocab_size = kVocab},
                              static_cast<int>(size_of(s.state_dtype)), s.clusters, 227 << 10);
}

Result by_kernel(const Shape& s, Copies when, uint64_t seed) {
  const Problem p(s);  // whose states the kernel changes
  TestTensor residual(DType::f32, {s.num_seqs, s.d_model});
  auto args = std::make_unique<DecoderClusterArgs>();
  args->cut = plan_of(s);
  if (!args->cut.usable) throw std::runtime_error("the plan refuses the shape");
  for (size_t l = 0; l < p.layers.size(); ++l) args->layer[l] = args_of(s, p.layers[l], args->cut);
  args->n_layer = static_cast<int>(s.n_layer);
  args->num_seqs = static_cast<int>(s.num_seqs);
  args->tokens = p.tokens.data();
  args->slot = p.slots.data();
  args->embedding = p.embedding.view().ptr<bf16>();
  args->residual = residual.view().data;
  args->eps = 1e-5f;
  args->per_d_model = 1 / static_cast<float>(s.d_model);
  args->residual_f32 = true;
  for (int c = 0; c < args->cut.clusters; ++c)
    emulated::run({.index = c,
                   .blocks = kClusterBlocks,
                   .threads = kClusterAllThreads,
                   .shared_bytes = static_cast<size_t>(args->cut.shared.bytes + kClusterAlignment)},
                  when, seed, [&](char* memory) {
                    s.state_dtype == DType::bf16 ? thread_of_kernel<bf16>(*args, memory)
                                                 : thread_of_kernel<float>(*args, memory);
                  });
  Result out{.residual = residual.to_double(), .states = {}};
  for (const Layer& l : p.layers)
    for (const TestTensor* t : {&l.conv, &l.ssm}) {
      EXPECT_TRUE(t->guards_intact());
      for (const double x : t->to_double()) out.states.push_back(x);
    }
  return out;
}

void expect_the_step_in_any_order_of_copies(const Shape& shape) {
  const Result expected = by_definition(Problem(shape)),
               actual = by_kernel(shape, Copies::at_once, 1);
  // A sum in another order may round to the next bf16.
  EXPECT_TRUE(op_test::close(actual.residual, expected.residual, 3e-3));
  EXPECT_TRUE(op_test::close(actual.states, expected.states, 1e-3));
  for (const auto& [when, seed] :
       {std::pair{Copies::late, 1}, {Copies::random, 1}, {Copies::random, 2}}) {
    const Result again = by_kernel(shape, when, static_cast<uint64_t>(seed));
    EXPECT_EQ(again.residual, actual.residual);
    EXPECT_EQ(again.states, actual.states);
  }
}

TEST(DecoderClusterEmulated, FewSequences) {
  expect_the_step_in_any_order_of_copies({128, 256, 8, 3, 5, 1, DType::f32, /*biases=*/false});
}

TEST(DecoderClusterEmulated, ManySequencesWithStatesInBf16) {
  expect_the_step_in_any_order_of_copies({128, 256, 8, 3, 20, 1, DType::bf16, /*biases=*/true});
}

// Clusters of different numbers of sequences; tiles that end early; blocks that bring nothing of
// x_dbl together.
TEST(DecoderClusterEmulated, UnevenShapes) {
  expect_the_step_in_any_order_of_copies({256, 1280, 24, 2, 21, 2, DType::f32, /*biases=*/true});
}

}  // namespace
}  // namespace krait::cuda
