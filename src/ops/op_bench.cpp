#include "ops/op_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/rng.h"
#include "ops/engine.h"
#include "ops/machine.h"
#include "ops/op_parity.h"

namespace krait {
namespace {

// Rates of this machine, measured once for a run.
struct Rates {
  double bytes, flops, exps;  // per second
};

class Bench {
 public:
  Bench(Context& ctx, DType dtype, bool check, const std::function<void(const OpTime&)>& row)
      : ctx_(ctx),
        check_(check),
        rates_{measure_read_bandwidth(ctx) * 1e9, measure_gemm_rate(ctx, dtype) * 1e9,
               measure_exp_rate(ctx)},
        row_(row) {}

  void take(const OpShape& shape) {
    s_ = shape;
    memory_.clear();
  }

  void embedding();
  void rms_norm();
  void linear();
  void linear_int8();
  void causal_conv1d();
  void selective_scan();
  void cross_entropy();
  void adamw();
  void sample();

 private:
  // Kept until the next shape.
  Tensor zeros(DType dtype, std::initializer_list<int64_t> shape) {
    memory_.emplace_back(dtype, shape, ctx_.memory());
    return memory_.back().view();
  }
  Tensor zeros(std::initializer_list<int64_t> shape) { return zeros(DType::f32, shape); }
  // Small random values.
  Tensor random(DType dtype, std::initializer_list<int64_t> shape, double low = -1,
                double high = 1) {
    const Tensor t = zeros(dtype, shape);
    fill_random(t, ctx_.memory(), rng_, low, high);
    return t;
  }
  Tensor activations(int64_t tokens, int64_t width) { return random(s_.dtype, {tokens, width}); }
  Tensor integers(int64_t count, const std::function<int64_t(int64_t)>& value) {
    std::vector<int32_t> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<int32_t>(value(i)));
    const Tensor t = zeros(DType::i32, {count});
    ctx_.memory().upload(t.data, values.data(), t.bytes());
    return t;
  }
  Tensor seq_start() {
    return integers(s_.num_seqs + 1, [&](int64_t i) { return s_.tokens * i / s_.num_seqs; });
  }

  // At least 5 runs and 0.3 seconds: the best of them, on a GPU the median.
  void time(const std::string& op, const std::string& pass, const std::string& shape,
            const Cost& cost, const std::function<void()>& run, std::optional<double> error = {});
  // error(), where it is wanted; an Error where it is too large.
  std::optional<double> checked(const std::string& op, const std::string& shape,
                                const std::function<double()>& error);

  Context& ctx_;
  bool check_;
  OpShape s_;
  Rates rates_;
  const std::function<void(const OpTime&)>& row_;
  std::vector<OwnedTensor> memory_;
  Rng rng_{1};
};

std::optional<double> Bench::checked(const std::string& op, const std::string& shape,
                                     const std::function<double()>& error) {
  if (!check_) return {};
  // In bf16 both round their results, each by some 1.7e-3; in f32 sums over a million tokens part.
  const double found = error(), allowed = s_.dtype == DType::f32 ? 1e-4 : 8e-3;
  if (!(found <= allowed))
    throw Error("does not agree with another engine", op + " " + shape,
                "a relative error of at most " + std::to_string(allowed), std::to_string(found));
  return found;
}

void Bench::time(const std::string& op, const std::string& pass, const std::string& shape,
                 const Cost& cost, const std::function<void()>& run, std::optional<double> error) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_of = [&](int calls) {
    const auto begin = Clock::now();
    for (int i = 0; i < calls; ++i) run();
    ctx_.engine().synchronize(ctx_);
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  seconds_of(1);
  const double once = seconds_of(1);
  // A GPU is given many calls at a time, so that the host's part is hidden.
  const int calls =
      ctx_.memory().on_host() ? 1 : static_cast<int>(std::clamp(5e-3 / once, 1.0, 200.0));
  std::vector<double> times;
  for (double total = 0; times.size() < 5 || (total < 0.3 && times.size() < 200);) {
    times.push_back(seconds_of(calls) / calls);
    total += times.back() * calls;
  }
  // On the host other programs disturb, so the best is nearest to the truth; a GPU is alone.
  std::sort(times.begin(), times.end());
  const double best = ctx_.memory().on_host() ? times.front() : times[times.size() / 2];
  const double bytes = cost.bytes / rates_.bytes, flops = cost.flops / rates_.flops,
               exps = cost.exps / rates_.exps;
  const double floor = std::max({bytes, flops, exps});
  row_({.op = op,
        .pass = pass,
        .shape = shape,
        .dtype = name_of(s_.dtype),
        .ms = best * 1e3,
        .floor_ms = floor * 1e3,
        .gb_per_s = cost.bytes / best * 1e-9,
        .tflop_per_s = cost.flops / best * 1e-12,
        .bound = floor == exps    ? "exps"
                 : floor == flops ? "flops"
                                  : "bytes",
        .error = error});
}

std::string dims(std::initializer_list<int64_t> extents) {
  std::string text;
  for (int64_t e : extents) {
    if (!text.empty()) text += "x";
    text += std::to_string(e);
  }
  return text;
}

Cost operator+(const Cost& a, const Cost& b) {
  return {a.flops + b.flops, a.bytes + b.bytes, a.exps + b.exps};
}
Cost operator*(double k, const Cost& a) { return {k * a.flops, k * a.bytes, k * a.exps}; }

void Bench::embedding() {
  const Embedding op = {.tokens = integers(s_.tokens,
                                           [&](int64_t) {
                                             return static_cast<int64_t>(
                                                 rng_.below(static_cast<uint64_t>(s_.vocab_size)));
                                           }),
                        .weight = random(s_.dtype, {s_.vocab_size, s_.d_model}),
                        .y = zeros({s_.tokens, s_.d_model})};
  const EmbeddingGrad grad = {.dy = random(DType::f32, {s_.tokens, s_.d_model}),
                              .dweight = zeros({s_.vocab_size, s_.d_model})};
  const std::string shape = dims({s_.tokens, s_.d_model});
  time("embedding", "fwd", shape, embedding_cost(op), [&] { embedding_fwd(ctx_, op); });
  time("embedding", "bwd", shape, 2 * embedding_cost(op), [&] { embedding_bwd(ctx_, op, grad); });
}

void Bench::rms_norm() {
  const RmsNorm op = {.x = {activations(s_.tokens, s_.d_model)},
                      .residual_in = random(DType::f32, {s_.tokens, s_.d_model}),
                      .residual_out = zeros({s_.tokens, s_.d_model}),
                      .weight = random(DType::f32, {s_.d_model}),
                      .y = activations(s_.tokens, s_.d_model),
                      .rstd = zeros({s_.tokens})};
  const RmsNormGrad grad = {.dy = activations(s_.tokens, s_.d_model),
                            .dresidual = zeros({s_.tokens, s_.d_model}),
                            .dx = activations(s_.tokens, s_.d_model),
                            .dweight = zeros({s_.d_model})};
  const std::string shape = dims({s_.tokens, s_.d_model});
  time("rms_norm", "fwd", shape, rms_norm_cost(op), [&] { rms_norm_fwd(ctx_, op); });
  time("rms_norm", "bwd", shape, rms_norm_cost(op), [&] { rms_norm_bwd(ctx_, op, grad); });
}

void Bench::linear() {
  const int64_t projections[4][2] = {{s_.d_model, 2 * s_.d_inner},
                                     {s_.d_inner, s_.dt_rank + 2 * s_.d_state},
                                     {s_.dt_rank, s_.d_inner},
                                     {s_.d_inner, s_.d_model}};
  for (const auto& [in, out] : projections) {
    const Tensor weight = random(s_.dtype, {out, in}), dweight = zeros({out, in});
    for (int64_t rows : {s_.tokens, int64_t{1}}) {
      const Linear op = {
          .x = activations(rows, in), .weight = weight, .bias = {}, .y = activations(rows, out)};
      const std::string shape = dims({rows, in, out});
      time("linear", rows == 1 ? "step" : "fwd", shape, linear_cost(op),
           [&] { linear_fwd(ctx_, op); });
      if (rows == 1) continue;
      const LinearGrad grad = {
          .dy = op.y, .dx = activations(rows, in), .dweight = dweight, .dbias = {}};
      time("linear", "bwd", shape, 2 * linear_cost(op), [&] { linear_bwd(ctx_, op, grad); });
    }
  }
}

void Bench::linear_int8() {
  const int64_t matrices[3][2] = {
      {s_.d_model, 2 * s_.d_inner}, {s_.d_inner, s_.d_model}, {s_.d_model, s_.vocab_size}};
  for (const auto& [in, out] : matrices) {
    std::vector<int8_t> values(static_cast<size_t>(out * in));
    for (int8_t& q : values) q = static_cast<int8_t>(static_cast<int>(rng_.below(255)) - 127);
    const Tensor weight = zeros(DType::i8, {out, in});
    ctx_.memory().upload(weight.data, values.data(), weight.bytes());
    for (int64_t rows : {s_.tokens, int64_t{16}, int64_t{1}}) {
      const Linear op = {.x = activations(rows, in),
                         .weight = weight,
                         .bias = {},
                         .y = activations(rows, out),
                         .weight_scale = random(DType::f32, {out}, 0.001, 0.01)};
      time("linear_int8", rows == 1 ? "step" : "fwd", dims({rows, in, out}), linear_cost(op),
           [&] { linear_fwd(ctx_, op); });
    }
  }
}

void Bench::causal_conv1d() {
  const int64_t T = s_.tokens, d = s_.d_inner;
  const CausalConv1d op = {.x = activations(T, d),
                           .weight = random(DType::f32, {d, s_.d_conv}),
                           .bias = random(DType::f32, {d}),
                           .seq_start = seq_start(),
                           .state = zeros({s_.num_seqs, s_.d_conv - 1, d}),
                           .slot = {},
                           .y = activations(T, d)};
  const CausalConv1dGrad grad = {.dy = activations(T, d),
                                 .dx = activations(T, d),
                                 .dweight = zeros({d, s_.d_conv}),
                                 .dbias = zeros({d}),
                                 .dstate = {}};
  const std::string shape = dims({s_.num_seqs, T / s_.num_seqs, d, s_.d_conv});
  const Cost cost = causal_conv1d_cost(op);
  const auto forward_error =
      checked("causal_conv1d fwd", shape, [&] { return causal_conv1d_fwd_error(ctx_, op); });
  time(
      "causal_conv1d", "fwd", shape, cost, [&] { causal_conv1d_fwd(ctx_, op); }, forward_error);
  const auto backward_error =
      checked("causal_conv1d bwd", shape, [&] { return causal_conv1d_bwd_error(ctx_, op, grad); });
  time(
      "causal_conv1d", "bwd", shape,
      cost + 0.5 * Cost{.flops = 2 * cost.flops, .bytes = cost.bytes, .exps = 0},
      [&] { causal_conv1d_bwd(ctx_, op, grad); }, backward_error);
  CausalConv1d step = op;
  for (Tensor* t : {&step.x, &step.y}) *t = t->slice(0, 0, s_.num_seqs);
  step.seq_start = Tensor();
  time("causal_conv1d", "step", dims({s_.num_seqs, d, s_.d_conv}), causal_conv1d_cost(step),
       [&] { causal_conv1d_step(ctx_, step); });
}

void Bench::selective_scan() {
  const int64_t T = s_.tokens, d = s_.d_inner, n = s_.d_state;
  SelectiveScan op = {.u = activations(T, d),
                      .dt = activations(T, d),
                      .A = random(DType::f32, {d, n}, -16, -1),
                      .B = random(s_.dtype, {T, 1, n}),
                      .C = random(s_.dtype, {T, 1, n}),
                      .D = random(DType::f32, {d}),
                      .dt_bias = random(DType::f32, {d}, -6, -2),
                      .z = activations(T, d),
                      .seq_start = seq_start(),
                      .state = zeros({s_.num_seqs, d, n}),
                      .slot = {},
                      .y = activations(T, d),
                      .saved = {}};
  const SelectiveScanGrad grad = {.dy = activations(T, d),
                                  .du = activations(T, d),
                                  .ddt = activations(T, d),
                                  .dA = zeros({d, n}),
                                  .dB = random(s_.dtype, {T, 1, n}),
                                  .dC = random(s_.dtype, {T, 1, n}),
                                  .dD = zeros({d}),
                                  .ddt_bias = zeros({d}),
                                  .dz = activations(T, d),
                                  .dstate = {},
                                  .y = {}};
  const std::string shape = dims({s_.num_seqs, T / s_.num_seqs, d, n});
  const Cost cost = selective_scan_cost(op);
  const auto forward_error =
      checked("selective_scan fwd", shape, [&] { return selective_scan_fwd_error(ctx_, op); });
  time(
      "selective_scan", "fwd", shape, cost, [&] { selective_scan_fwd(ctx_, op); }, forward_error);
  op.saved = zeros({selective_scan_saved_size(ctx_, T, d, n)});
  fill_zero(ctx_, op.state);
  selective_scan_fwd(ctx_, op);
  fill_zero(ctx_, op.state);  // the initial one is what the backward pass reads
  const auto backward_error = checked("selective_scan bwd", shape,
                                      [&] { return selective_scan_bwd_error(ctx_, op, grad); });
  time(
      "selective_scan", "bwd", shape,
      cost + Cost{.flops = cost.flops, .bytes = 0.75 * cost.bytes, .exps = 0},
      [&] { selective_scan_bwd(ctx_, op, grad); }, backward_error);
  SelectiveScan step = op;
  for (Tensor* t : {&step.u, &step.dt, &step.B, &step.C, &step.z, &step.y})
    *t = t->slice(0, 0, s_.num_seqs);
  step.seq_start = step.saved = Tensor();
  Cost step_cost = selective_scan_cost(step);
  step_cost.bytes += 2 * static_cast<double>(step.state.bytes());
  time("selective_scan", "step", dims({s_.num_seqs, d, n}), step_cost,
       [&] { selective_scan_step(ctx_, step); });
}

void Bench::cross_entropy() {
  const int64_t T = s_.tokens;
  const CrossEntropy op = {
      .x = activations(T, s_.d_model),
      .weight = random(s_.dtype, {s_.vocab_size, s_.d_model}),
      .targets = integers(T, [&](int64_t i) { return i * 7919 % s_.vocab_size; }),
      .loss = zeros({T})};
  const CrossEntropyGrad grad = {
      .scale = 1, .dx = activations(T, s_.d_model), .dweight = zeros({s_.vocab_size, s_.d_model})};
  const std::string shape = dims({T, s_.d_model, s_.vocab_size});
  time("cross_entropy", "fwd", shape, cross_entropy_cost(op), [&] { cross_entropy_fwd(ctx_, op); });
  time("cross_entropy", "bwd", shape, 3 * cross_entropy_cost(op),
       [&] { cross_entropy_bwd(ctx_, op, grad); });
}

// The next token of num_seqs sequences.
void Bench::sample() {
  const int64_t rows = s_.num_seqs;
  std::vector<SampledSequence> sequences(static_cast<size_t>(rows) + 1);
  const TokenSampling op = {.logits = random(DType::f32, {rows, s_.vocab_size}, -10, 10),
                            .slot = integers(rows, [](int64_t i) { return i; }),
                            .spare_slot = static_cast<int32_t>(rows),
                            .sequence = zeros(DType::u8, {rows + 1, sizeof(SampledSequence)}),
                            .recent = zeros(DType::i32, {rows + 1, 64}),
                            .tokens = zeros(DType::i32, {rows}),
                            .picked = zeros(DType::i32, {rows, 2})};
  const auto time_with = [&](const char* pass, const SamplingParams& params) {
    for (int64_t i = 0; i < rows; ++i)
      sequences[static_cast<size_t>(i)] = sampled_sequence(params, int64_t{1} << 40);
    ctx_.memory().upload(op.sequence.data, sequences.data(), op.sequence.bytes());
    time("sample", pass, dims({rows, s_.vocab_size}), sample_cost(op),
         [&] { sample_tokens(ctx_, op); });
  };
  const SamplingParams defaults;
  SamplingParams greedy, penalty, top_p, all;
  greedy.temperature = 0;
  penalty.repeat_penalty = 1.1f;
  top_p.top_k = all.top_k = 0;
  all.top_p = 1;
  all.min_p = 0;
  time_with("greedy", greedy);
  time_with("defaults", defaults);
  time_with("penalty", penalty);
  time_with("top-p", top_p);
  time_with("all", all);
}

void Bench::adamw() {
  const int64_t size = 4 << 20;
  const AdamW op = {.param = random(DType::f32, {size}),
                    .grad = random(DType::f32, {size}),
                    .m = zeros({size}),
                    .v = zeros({size}),
                    .norm = {},
                    .lr = 1e-6f};
  time("adamw", "step", dims({size}), adamw_cost(op), [&] { krait::adamw(ctx_, op); });
}

using Method = void (Bench::*)();
const std::vector<std::pair<std::string, Method>>& methods() {
  static const std::vector<std::pair<std::string, Method>> all = {
      {"embedding", &Bench::embedding},
      {"rms_norm", &Bench::rms_norm},
      {"linear", &Bench::linear},
      {"linear_int8", &Bench::linear_int8},
      {"causal_conv1d", &Bench::causal_conv1d},
      {"selective_scan", &Bench::selective_scan},
      {"cross_entropy", &Bench::cross_entropy},
      {"adamw", &Bench::adamw},
      {"sample", &Bench::sample}};
  return all;
}

}  // namespace

const std::vector<std::string>& bench_op_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const auto& [name, method] : methods()) list.push_back(name);
    return list;
  }();
  return names;
}

void bench_op(Context& ctx, const std::string& name, const std::vector<OpShape>& shapes, bool check,
              const std::function<void(const OpTime&)>& row) {
  const auto& names = bench_op_names();
  if (name != "all" && std::find(names.begin(), names.end(), name) == names.end()) {
    std::string known = "all";
    for (const std::string& n : names) known += ", " + n;
    throw Error("no op of this name", "op", known, "\"" + name + "\"");
  }
  KRAIT_CHECK(!shapes.empty());
  Bench bench(ctx, shapes.front().dtype, check, row);
  for (const OpShape& shape : shapes) {
    bench.take(shape);
    for (const auto& [op, method] : methods())
      if (name == "all" || name == op) (bench.*method)();
  }
}

}  // namespace krait
