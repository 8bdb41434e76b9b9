#include "model/model_memory.h"

#include <cmath>

#include "core/threads.h"

namespace krait {

Model make_model(const Config& config, DType dtype) {
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f64)
    throw Error("cannot compute in this element type", "dtype", "f32 or bf16", name_of(dtype));
  Model model;
  model.weights.config = config;
  model.weights.dtype = dtype;
  model.weights.parameters = empty_parameters(config);
  const DType full = dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto A = std::make_shared<OwnedTensor>(
      OwnedTensor(full, {config.n_layer, config.d_inner, config.d_state}));
  model.weights.A = A->view();
  model.owned_bytes += static_cast<int64_t>(A->view().bytes());
  model.storage.push_back(A);
  return model;
}

Tensor allocate_parameter(Model& model, const ParameterInfo& info, DType dtype, Memory& memory) {
  const size_t bytes = static_cast<size_t>(info.size()) * size_of(dtype);
  const auto buffer = std::make_shared<Buffer>(bytes, memory);
  model.storage.push_back(buffer);
  model.owned_bytes += static_cast<int64_t>(bytes);
  return info.view(buffer->data(), dtype);
}

void quantize_parameter(Model& model, const ParameterInfo& info, const Tensor& from,
                        const std::string& where) {
  Tensor& scale = *scale_of(info, model.weights.parameters);
  ParameterInfo row = info;
  row.shape = {info.shape[0]};
  scale = allocate_parameter(model, row, model.weights.A.dtype);
  Tensor& q = info.of(model.weights.parameters);
  q = allocate_parameter(model, info, DType::i8);
  quantize_rows(available_cores(), from, q, scale, where);
}

Model copy_model(const Model& from, Memory& to) {
  Model model;
  model.weights = from.weights;
  model.file_dtype = from.file_dtype;
  const auto move = [&](Tensor& t) {
    if (!t) return;
    const auto buffer = std::make_shared<Buffer>(t.bytes(), to);
    to.upload(buffer->data(), t.data, t.bytes());
    t.data = buffer->data();
    model.storage.push_back(buffer);
    model.owned_bytes += static_cast<int64_t>(t.bytes());
  };
  for (const ParameterInfo& info : parameter_table(from.config()))
    move(info.of(model.weights.parameters));
  for (Tensor* t : quantization_tensors(from.config(), model.weights.parameters)) move(*t);
  move(model.weights.A);
  return model;
}

void compute_A(Model& model) {
  const Config& c = model.config();
  const int64_t layer_size = c.d_inner * c.d_state;
  dispatch_float(model.weights.A.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t layer = 0; layer < c.n_layer; ++layer) {
      const T* A_log =
          model.weights.parameters.layers[static_cast<size_t>(layer)].A_log.template ptr<T>();
      T* A = model.weights.A.row<T>(layer);
      for (int64_t i = 0; i < layer_size; ++i)
        A[i] = static_cast<T>(-std::exp(static_cast<double>(A_log[i])));
    }
  });
}

}  // namespace krait
