#include "model/init.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "core/rng.h"
#include "core/threads.h"

namespace krait {
namespace {

// FNV-1a: the random stream of a parameter is a function of its name.
uint64_t stream_of(std::string_view name) {
  uint64_t hash = 14695981039346656037u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  return hash;
}

class Initializer {
 public:
  Initializer(const Config& config, uint64_t seed, int threads)
      : c_(config), seed_(seed), threads_(threads) {}

  void operator()(const ParameterInfo& info, const Tensor& t) {
    stream_ = stream_of(info.name);
    const double fan_in = static_cast<double>(info.shape.back());
    const std::string_view name = info.name;
    const auto is = [&](std::string_view suffix) { return name.ends_with(suffix); };
    if (is("embeddings.weight")) {
      normal(t, c_.initializer_range);
    } else if (is("out_proj.weight")) {
      uniform(t, 1 / std::sqrt(fan_in * static_cast<double>(c_.n_layer)));
    } else if (is("dt_proj.weight")) {
      uniform(t, c_.dt_scale / std::sqrt(fan_in));
    } else if (is("dt_proj.bias")) {
      fill(t, kUniformDraws, [&](Rng& rng, int64_t) { return dt_bias(rng); });
    } else if (is("A_log")) {
      fill(t, 0,
           [&](Rng&, int64_t i) { return std::log(static_cast<double>(i % c_.d_state + 1)); });
    } else if (is("conv1d.bias")) {
      uniform(t, 1 / std::sqrt(static_cast<double>(c_.d_conv)));
    } else if (is("C_const")) {
      normal(t, 1);
    } else if (is("B_const") || is(".D") || is("norm.weight") || is("norm_f.weight")) {
      fill(t, 0, [](Rng&, int64_t) { return 1.0; });
    } else if (is(".bias")) {
      fill(t, 0, [](Rng&, int64_t) { return 0.0; });
    } else {  // in_proj, x_proj, lm_head, conv1d
      uniform(t, 1 / std::sqrt(fan_in));
    }
  }

 private:
  // Numbers of the stream that a value takes: so a thread finds its values' place in it.
  static constexpr uint64_t kUniformDraws = 2, kNormalDraws = 2 * kUniformDraws;
  static constexpr int64_t kGrain = 1 << 14;

  template <class F>
  void fill(const Tensor& t, uint64_t draws, const F& value) const {
    KRAIT_CHECK(t.contiguous() && (t.dtype == DType::f32 || t.dtype == DType::f64));
    parallel_ranges(threads_, t.size(), kGrain, [&](int64_t begin, int64_t end) {
      Rng rng(seed_, stream_);
      rng.seek(static_cast<uint64_t>(begin) * draws);
      for (int64_t i = begin; i < end; ++i) {
        if (t.dtype == DType::f32)
          t.ptr<float>()[i] = static_cast<float>(value(rng, i));
        else
          t.ptr<double>()[i] = value(rng, i);
      }
    });
  }
  void uniform(const Tensor& t, double bound) const {
    fill(t, kUniformDraws, [=](Rng& rng, int64_t) { return rng.uniform(-bound, bound); });
  }
  void normal(const Tensor& t, double deviation) const {
    fill(t, kNormalDraws, [=](Rng& rng, int64_t) { return deviation * rng.normal(); });
  }
  // The inverse of softplus at dt: log(exp(dt) - 1) = dt + log(-expm1(-dt)).
  double dt_bias(Rng& rng) const {
    const double log_dt = rng.uniform(std::log(c_.dt_min), std::log(c_.dt_max));
    const double dt = std::max(std::exp(log_dt), c_.dt_init_floor);
    return dt + std::log(-std::expm1(-dt));
  }

  const Config& c_;
  uint64_t seed_, stream_ = 0;
  int threads_;
};

}  // namespace

void initialize(const Config& config, const Parameters& parameters, uint64_t seed, int threads) {
  KRAIT_CHECK(threads >= 1);
  Initializer init(config, seed, threads);
  for (const ParameterInfo& info : parameter_table(config))
    if (const Tensor& t = info.of(parameters)) init(info, t);
}

}  // namespace krait
