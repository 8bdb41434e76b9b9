#include "model/weights.h"
#include "ops/elementwise.h"

namespace krait {

TrainableModel::TrainableModel(const Config& config, DType dtype, Memory& memory)
    : masters_(config, dtype == DType::f64 ? DType::f64 : DType::f32, memory) {
  const DType full = masters_.flat().dtype;
  weights_.config = config;
  weights_.dtype = dtype;
  weights_.parameters = masters_.parameters();
  A_ = OwnedTensor(full, {config.n_layer, config.d_inner, config.d_state}, memory);
  weights_.A = A_;
  if (dtype == full) return;
  KRAIT_CHECK(dtype == DType::bf16);
  // Laid out as the masters are, so that one pass rounds them all.
  copies_ = OwnedTensor(dtype, {masters_.flat().size()}, memory);
  for (const ParameterInfo& p : parameter_table(config)) {
    if (!p.matrix) continue;
    const int64_t offset = p.of(masters_.parameters()).ptr<float>() - masters_.flat().ptr<float>();
    p.of(weights_.parameters) = p.view(copies_->ptr<bf16>() + offset, dtype);
  }
}

void TrainableModel::refresh_A(Context& ctx) {
  const Config& c = weights_.config;
  for (int64_t layer = 0; layer < c.n_layer; ++layer)
    negative_exp(ctx, masters_.parameters().layers[static_cast<size_t>(layer)].A_log,
                 weights_.A.slice(0, layer, layer + 1).reshape({c.d_inner, c.d_state}));
}

void TrainableModel::refresh(Context& ctx) {
  refresh_A(ctx);
  if (copies_.view()) round_elements(ctx, masters_.flat(), copies_);
}

}  // namespace krait
