#include <algorithm>
#include <cmath>

#include "core/rng.h"
#include "model/init.h"
#include "model/model_memory.h"
#include "model/weights.h"

namespace krait {
namespace {

constexpr int64_t kPattern = 65537;  // elements; odd, so that rows of a matrix differ

// U(+-1 / sqrt(width)), one pattern repeated: what is there is doubled until it is all.
template <class T>
void fill(const Tensor& t, Rng& rng, Memory& memory) {
  const double bound = 1 / std::sqrt(static_cast<double>(t.shape[static_cast<size_t>(t.rank - 1)]));
  const int64_t size = t.size(), first = std::min(size, kPattern);
  std::vector<T> pattern(static_cast<size_t>(first));
  for (T& x : pattern) x = static_cast<T>(rng.uniform(-bound, bound));
  T* const out = t.ptr<T>();
  memory.upload(out, pattern.data(), pattern.size() * sizeof(T));
  for (int64_t done = first; done < size; done *= 2)
    memory.copy(out + done, out, static_cast<size_t>(std::min(done, size - done)) * sizeof(T));
}

}  // namespace

Model make_random_model(const Config& config, DType dtype, uint64_t seed, Memory& memory,
                        Quantization quantization) {
  check_config(config, "random model");
  Model model = make_model(config, dtype);
  const std::vector<ParameterInfo> table = parameter_table(config);
  const auto fill_matrix = [&](const ParameterInfo& p, const Tensor& t, Memory& where) {
    Rng rng(seed, static_cast<uint64_t>(&p - table.data()));
    dispatch_float(dtype, [&](auto tag) { fill<typename decltype(tag)::type>(t, rng, where); });
  };
  // What is not a matrix: initialized as for training, by the host, which quantizes too.
  for (const ParameterInfo& p : table)
    if (!p.matrix)
      p.of(model.weights.parameters) = allocate_parameter(model, p, model.weights.A.dtype);
  initialize(config, model.weights.parameters, seed);
  const auto quantize = [&](const ParameterInfo& from, const ParameterInfo& to) {
    const Buffer buffer(static_cast<size_t>(from.size()) * size_of(dtype));
    const Tensor t = from.view(buffer.data(), dtype);
    fill_matrix(from, t, host_memory());
    quantize_parameter(model, to, t, to.name);
  };
  const bool int8 = quantization == Quantization::int8;
  const auto quantized = [&](const ParameterInfo& p) {
    return int8 && scale_of(p, model.weights.parameters) != nullptr;
  };
  for (const ParameterInfo& p : table)
    if (quantized(p)) quantize(p, p);
  if (int8 && config.tie_embeddings) quantize(table[0], head_info(config));
  compute_A(model);
  if (!memory.on_host()) model = copy_model(model, memory);
  for (const ParameterInfo& p : table) {
    if (!p.matrix || quantized(p)) continue;
    Tensor& t = p.of(model.weights.parameters) = allocate_parameter(model, p, dtype, memory);
    fill_matrix(p, t, memory);
  }
  return model;
}

}  // namespace krait
