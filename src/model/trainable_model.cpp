#include "model/elementwise.h"
#include "model/weights.h"

namespace krait {

TrainableModel::TrainableModel(const Config& config, DType dtype)
    : masters_(config, dtype == DType::f64 ? DType::f64 : DType::f32) {
  const DType full = masters_.flat().dtype;
  weights_.config = config;
  weights_.dtype = dtype;
  weights_.parameters = masters_.parameters();
  A_ = OwnedTensor(full, {config.n_layer, config.d_inner, config.d_state});
  weights_.A = A_;
  if (dtype == full) return;
  KRAIT_CHECK(dtype == DType::bf16);
  const std::vector<ParameterInfo> table = parameter_table(config);
  int64_t size = 0;
  for (const ParameterInfo& p : table)
    if (p.matrix) size += p.aligned_size(dtype);
  copies_ = OwnedTensor(dtype, {size});
  char* place = static_cast<char*>(copies_->data);
  for (const ParameterInfo& p : table) {
    if (!p.matrix) continue;
    p.of(weights_.parameters) = p.view(place, dtype);
    place += p.aligned_size(dtype) * static_cast<int64_t>(size_of(dtype));
  }
}

void TrainableModel::refresh(Context& ctx) {
  const Config& c = weights_.config;
  for (int64_t layer = 0; layer < c.n_layer; ++layer)
    negative_exp(ctx.threads(), masters_.parameters().layers[static_cast<size_t>(layer)].A_log,
                 weights_.A.slice(0, layer, layer + 1).reshape({c.d_inner, c.d_state}));
  if (!copies_.view()) return;
  for (const ParameterInfo& p : parameter_table(c))
    if (p.matrix) convert(ctx.threads(), p.of(masters_.parameters()), p.of(weights_.parameters));
}

}  // namespace krait
