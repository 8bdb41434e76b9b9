#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/rng.h"
#include "model/init.h"
#include "model/model_memory.h"
#include "model/weights.h"

namespace krait {
namespace {

constexpr int64_t kPattern = 65537;  // elements; odd, so that rows of a matrix differ

// U(+-1 / sqrt(width)), one pattern repeated.
template <class T>
void fill(const Tensor& t, Rng& rng) {
  const double bound = 1 / std::sqrt(static_cast<double>(t.shape[static_cast<size_t>(t.rank - 1)]));
  T* const out = t.ptr<T>();
  const int64_t size = t.size(), first = std::min(size, kPattern);
  for (int64_t i = 0; i < first; ++i) out[i] = static_cast<T>(rng.uniform(-bound, bound));
  for (int64_t done = first; done < size; done += first)
    std::memcpy(out + done, out, static_cast<size_t>(std::min(first, size - done)) * sizeof(T));
}

}  // namespace

Model make_random_model(const Config& config, DType dtype, uint64_t seed,
                        Quantization quantization) {
  check_config(config, "random model");
  Model model = make_model(config, dtype);
  std::vector<ParameterInfo> table = parameter_table(config);
  Parameters full = empty_parameters(config);  // what is not a matrix: initialized as for training
  const bool int8 = quantization == Quantization::int8;
  for (const ParameterInfo& p : table) {
    const bool quantized = int8 && scale_of(p, model.weights.parameters);
    const Buffer unquantized(quantized ? static_cast<size_t>(p.size()) * size_of(dtype) : 0);
    Tensor& t = p.of(model.weights.parameters);
    t = quantized ? p.view(unquantized.data(), dtype)
                  : allocate_parameter(model, p, p.matrix ? dtype : model.weights.A.dtype);
    if (!p.matrix) {
      p.of(full) = t;
      continue;
    }
    Rng rng(seed, static_cast<uint64_t>(&p - table.data()));
    dispatch_float(dtype, [&](auto tag) { fill<typename decltype(tag)::type>(t, rng); });
    if (quantized) quantize_parameter(model, p, p.view(unquantized.data(), dtype), p.name);
  }
  if (int8 && config.tie_embeddings)
    quantize_parameter(model, head_info(config), model.weights.parameters.embedding, "head");
  initialize(config, full, seed);
  compute_A(model);
  return model;
}

}  // namespace krait
