// The kernel of a decoder step by clusters, its source as it is, on the CPU: what it computes, and
// that no order in which copies happen changes a bit (emulated/emulator.h).
#include "cuda_words.h"

// Behind the words that they use.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "ops/decoder_cluster_thread.cuh"

namespace krait::cuda {
namespace {

using emulated::Copies;

struct Shape {
  int d_model, d_inner, dt_rank, n_layer, num_seqs, clusters;
  bool bf16_states, biases;
};

uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bf16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }
float rounded(float x) { return from_bf16(to_bf16(x)); }

// Aligned as the kernel's copies want it.
template <class T>
struct Array {
  std::vector<T> memory;
  size_t first = 0;

  explicit Array(size_t n) : memory(n + 128 / sizeof(T)) {
    while (reinterpret_cast<uintptr_t>(&memory[first]) % 128 != 0) ++first;
  }
  Array(const Array& other) : Array(other.memory.size() - 128 / sizeof(T)) {
    std::copy_n(other.data(), size(), data());
  }
  T* data() { return &memory[first]; }
  const T* data() const { return &memory[first]; }
  size_t size() const { return memory.size() - 128 / sizeof(T); }
  T& operator[](int64_t i) { return data()[i]; }
  T operator[](int64_t i) const { return data()[i]; }
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  Array<float> normal(int64_t n, float deviation, float mean = 0) {
    Array<float> x(static_cast<size_t>(n));
    std::normal_distribution<float> draw(mean, deviation);
    for (int64_t i = 0; i < n; ++i) x[i] = draw(engine_);
    return x;
  }
  Array<uint16_t> matrix(int rows, int columns, float gain = 1) {
    return in_bf16(normal(int64_t{rows} * columns, gain / std::sqrt(static_cast<float>(columns))));
  }
  static Array<uint16_t> in_bf16(const Array<float>& x) {
    Array<uint16_t> out(x.size());
    for (size_t i = 0; i < x.size(); ++i) out.data()[i] = to_bf16(x.data()[i]);
    return out;
  }
  int below(int n) { return static_cast<int>(engine_() % static_cast<uint64_t>(n)); }

 private:
  std::mt19937_64 engine_;
};

struct Layer {
  Array<uint16_t> in_proj, x_proj, dt_proj, out_proj;
  Array<float> norm, in_bias, conv_weight, conv_bias, dt_bias, A, D, out_bias;
};

struct States {
  Array<float> conv, ssm;  // what they are; kept in bf16, rounded
};

constexpr int kVocab = 50, kStates = kClusterStates;

// A model, sequences in slots that are neither in order nor all there are, and their states.
struct Problem {
  Shape shape;
  std::vector<Layer> layers;
  std::vector<States> states;
  Array<uint16_t> embedding;
  std::vector<int32_t> tokens, slots;

  Problem(const Shape& s, uint64_t seed) : Problem(s, Random(seed)) {}
  Problem(const Shape& s, Random r) : shape(s), embedding(r.matrix(kVocab, s.d_model)) {
    for (int l = 0; l < s.n_layer; ++l) {
      layers.push_back({.in_proj = r.matrix(2 * s.d_inner, s.d_model),
                        .x_proj = r.matrix(s.dt_rank + 2 * kStates, s.d_inner, 2),
                        .dt_proj = r.matrix(s.d_inner, s.dt_rank),
                        .out_proj = r.matrix(s.d_model, s.d_inner),
                        .norm = r.normal(s.d_model, 0.2f, 1),
                        .in_bias = r.normal(2 * s.d_inner, 0.3f),
                        .conv_weight = r.normal(s.d_inner * 4, 0.5f),
                        .conv_bias = r.normal(s.d_inner, 0.3f),
                        .dt_bias = r.normal(s.d_inner, 1, -2),
                        .A = r.normal(s.d_inner * kStates, 1),
                        .D = r.normal(s.d_inner, 1),
                        .out_bias = r.normal(s.d_model, 0.3f)});
      for (float& a : layers.back().A.memory) a = -std::exp(a);
      states.push_back({r.normal(int64_t{2} * s.num_seqs * kClusterBefore * s.d_inner, 1),
                        r.normal(int64_t{2} * s.num_seqs * s.d_inner * kStates, 1)});
      if (!s.bf16_states) continue;
      for (Array<float>* a : {&states.back().conv, &states.back().ssm})
        for (float& x : a->memory) x = rounded(x);
    }
    for (int i = 0; i < s.num_seqs; ++i) {
      tokens.push_back(r.below(kVocab));
      slots.push_back(2 * s.num_seqs - 1 - 2 * i);
    }
  }
};

float dot(const uint16_t* row, const std::vector<float>& x) {
  float sum = 0;
  for (size_t k = 0; k < x.size(); ++k) sum += from_bf16(row[k]) * x[k];
  return sum;
}

// A layer for one sequence, as the ops compose it; r: the residual stream.
void layer_by_definition(const Problem& p, const Layer& l, States& states, int slot,
                         std::vector<float>& r) {
  const Shape& s = p.shape;
  const auto bias = [&](const Array<float>& b, int i) { return s.biases ? b[i] : 0.f; };
  std::vector<float> x, u, z, x_dbl, y;
  float squares = 0;
  for (int i = 0; i < s.d_model; ++i) {
    squares += r[static_cast<size_t>(i)] * r[static_cast<size_t>(i)];
    x.push_back(rounded(r[static_cast<size_t>(i)] * l.norm[i]));
  }
  const float scale = 1 / std::sqrt(squares / static_cast<float>(s.d_model) + 1e-5f);
  const auto in = [&](int row) {
    return rounded(dot(&l.in_proj.data()[int64_t{row} * s.d_model], x) * scale +
                   bias(l.in_bias, row));
  };
  for (int c = 0; c < s.d_inner; ++c) {
    float* const before = &states.conv.data()[int64_t{slot} * kClusterBefore * s.d_inner + c];
    const float now = in(c), *w = &l.conv_weight.data()[c * 4];
    const float sum = bias(l.conv_bias, c) + w[0] * before[0] + w[1] * before[s.d_inner] +
                      w[2] * before[2 * s.d_inner] + w[3] * now;
    before[0] = before[s.d_inner], before[s.d_inner] = before[2 * s.d_inner];
    before[2 * s.d_inner] = now;
    u.push_back(rounded(silu(sum)));
    z.push_back(in(s.d_inner + c));
  }
  for (int row = 0; row < s.dt_rank + 2 * kStates; ++row)
    x_dbl.push_back(rounded(dot(&l.x_proj.data()[int64_t{row} * s.d_inner], u)));
  const std::vector<float> dt(x_dbl.begin(), x_dbl.begin() + s.dt_rank);
  const float *B = &x_dbl[dt.size()], *C = B + kStates;
  for (int c = 0; c < s.d_inner; ++c) {
    const float delta =
        softplus(rounded(dot(&l.dt_proj.data()[int64_t{c} * s.dt_rank], dt)) + l.dt_bias[c]);
    float sum = l.D[c] * u[static_cast<size_t>(c)];
    for (int n = 0; n < kStates; ++n) {
      float& h = states.ssm[(int64_t{slot} * s.d_inner + c) * kStates + n];
      h = std::exp(delta * l.A[c * kStates + n]) * h + delta * u[static_cast<size_t>(c)] * B[n];
      sum += C[n] * h;
      if (s.bf16_states) h = rounded(h);
    }
    y.push_back(rounded(sum * silu(z[static_cast<size_t>(c)])));
  }
  for (int i = 0; i < s.d_model; ++i)
    r[static_cast<size_t>(i)] +=
        rounded(dot(&l.out_proj.data()[int64_t{i} * s.d_inner], y) + bias(l.out_bias, i));
}

struct Result {
  std::vector<float> residual, states;  // of all sequences; of all layers
};

void append(std::vector<float>& to, const Array<float>& x) {
  to.insert(to.end(), x.data(), x.data() + x.size());
}

Result by_definition(Problem p) {
  Result out;
  for (size_t i = 0; i < p.tokens.size(); ++i) {
    std::vector<float> r;
    for (int k = 0; k < p.shape.d_model; ++k)
      r.push_back(from_bf16(p.embedding[int64_t{p.tokens[i]} * p.shape.d_model + k]));
    for (size_t l = 0; l < p.layers.size(); ++l)
      layer_by_definition(p, p.layers[l], p.states[l], p.slots[i], r);
    out.residual.insert(out.residual.end(), r.begin(), r.end());
  }
  for (const States& s : p.states) append(out.states, s.conv), append(out.states, s.ssm);
  return out;
}

template <class S>
void thread_of_kernel(const DecoderClusterArgs& args, char* memory) {
  args.cut.seqs == 8    ? decoder_cluster_thread<8, S>(args, memory)
  : args.cut.seqs == 16 ? decoder_cluster_thread<16, S>(args, memory)
                        : decoder_cluster_thread<24, S>(args, memory);
}

// The states as the kernel has them.
struct PooledStates {
  Array<float> conv, ssm;
  Array<uint16_t> conv_bf16, ssm_bf16;
  explicit PooledStates(const States& s)
      : conv(s.conv),
        ssm(s.ssm),
        conv_bf16(Random::in_bf16(s.conv)),
        ssm_bf16(Random::in_bf16(s.ssm)) {}
};

DecoderClusterLayer args_of(const Problem& p, const Layer& l, const DecoderClusterPlan& cut,
                            PooledStates& pool) {
  const Shape& s = p.shape;
  const auto biases = [&](const Array<float>& b) { return s.biases ? b.data() : nullptr; };
  return {.in_proj = {l.in_proj.data(), 2 * s.d_inner, s.d_model, cut.channels},
          .x_proj = {l.x_proj.data(), cut.x_proj_rows, s.d_inner, cut.x_proj_rows},
          .dt_proj = {l.dt_proj.data(), s.d_inner, s.dt_rank, cut.channels},
          .out_proj = {l.out_proj.data(), s.d_model, s.d_inner, cut.outputs},
          .norm = l.norm.data(),
          .in_bias = biases(l.in_bias),
          .conv_weight = l.conv_weight.data(),
          .conv_bias = biases(l.conv_bias),
          .dt_bias = l.dt_bias.data(),
          .A = l.A.data(),
          .D = l.D.data(),
          .out_bias = biases(l.out_bias),
          .conv = s.bf16_states ? static_cast<void*>(pool.conv_bf16.data()) : pool.conv.data(),
          .ssm = s.bf16_states ? static_cast<void*>(pool.ssm_bf16.data()) : pool.ssm.data()};
}

Result by_kernel(const Problem& p, Copies when, uint64_t seed) {
  const Shape& s = p.shape;
  auto args = std::make_unique<DecoderClusterArgs>();
  args->cut = plan_decoder_cluster({.num_seqs = s.num_seqs,
                                    .n_layer = s.n_layer,
                                    .d_model = s.d_model,
                                    .d_inner = s.d_inner,
                                    .d_state = kStates,
                                    .d_conv = 4,
                                    .dt_rank = s.dt_rank,
                                    .state_bytes = s.bf16_states ? 2 : 4},
                                   s.clusters, 227 << 10);
  if (!args->cut.usable) throw std::runtime_error("the plan refuses the shape");
  std::vector<PooledStates> pools(p.states.begin(), p.states.end());
  for (size_t l = 0; l < p.layers.size(); ++l)
    args->layer[l] = args_of(p, p.layers[l], args->cut, pools[l]);
  Result out;
  out.residual.resize(static_cast<size_t>(s.num_seqs) * static_cast<size_t>(s.d_model));
  args->n_layer = s.n_layer;
  args->num_seqs = s.num_seqs;
  args->tokens = p.tokens.data();
  args->slot = p.slots.data();
  args->embedding = reinterpret_cast<const bf16*>(p.embedding.data());
  args->residual = out.residual.data();
  args->eps = 1e-5f;
  args->per_d_model = 1 / static_cast<float>(s.d_model);
  args->residual_f32 = true;
  for (int c = 0; c < args->cut.clusters; ++c)
    emulated::run({.index = c,
                   .blocks = kClusterBlocks,
                   .threads = kClusterAllThreads,
                   .shared_bytes = static_cast<size_t>(args->cut.shared.bytes + kClusterAlignment)},
                  when, seed, [&](char* memory) {
                    s.bf16_states ? thread_of_kernel<bf16>(*args, memory)
                                  : thread_of_kernel<float>(*args, memory);
                  });
  for (const PooledStates& pool : pools)
    for (const auto& [f32, half] :
         {std::pair{&pool.conv, &pool.conv_bf16}, {&pool.ssm, &pool.ssm_bf16}})
      for (size_t i = 0; i < f32->size(); ++i)
        out.states.push_back(s.bf16_states ? from_bf16(half->data()[i]) : f32->data()[i]);
  return out;
}

double relative_rms(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(error / size);
}

void expect_the_step_in_any_order_of_copies(const Shape& shape) {
  const Problem problem(shape, 1);
  const Result expected = by_definition(problem), actual = by_kernel(problem, Copies::at_once, 1);
  // A sum in another order may round to the next bf16.
  EXPECT_LT(relative_rms(actual.residual, expected.residual), 3e-3);
  EXPECT_LT(relative_rms(actual.states, expected.states), 1e-3);
  for (const auto& [when, seed] :
       {std::pair{Copies::late, 1}, {Copies::random, 1}, {Copies::random, 2}}) {
    const Result again = by_kernel(problem, when, static_cast<uint64_t>(seed));
    EXPECT_EQ(again.residual, actual.residual);
    EXPECT_EQ(again.states, actual.states);
  }
}

TEST(DecoderClusterEmulated, FewSequences) {
  expect_the_step_in_any_order_of_copies(
      {128, 256, 8, 3, 5, 1, /*bf16_states=*/false, /*biases=*/false});
}

TEST(DecoderClusterEmulated, ManySequencesWithStatesInBf16) {
  expect_the_step_in_any_order_of_copies(
      {128, 256, 8, 3, 20, 1, /*bf16_states=*/true, /*biases=*/true});
}

// Clusters of different numbers of sequences; tiles that end early; blocks that bring nothing of
// x_dbl together.
TEST(DecoderClusterEmulated, UnevenShapes) {
  expect_the_step_in_any_order_of_copies(
      {256, 1280, 24, 2, 21, 2, /*bf16_states=*/false, /*biases=*/true});
}

}  // namespace
}  // namespace krait::cuda
