// Building blocks of load_model and make_random_model: a Model's memory. Internal to model/.
#pragma once

#include <string>

#include "model/weights.h"

namespace krait {

// A model without parameters (all none), with memory for A. dtype: f32, bf16 or f64.
Model make_model(const Config& config, DType dtype);
// Uninitialized memory for one parameter, kept by the model.
Tensor allocate_parameter(Model& model, const ParameterInfo& info, DType dtype,
                          Memory& memory = host_memory());
// The parameter in 8 bits, with its scales. where: the tensor, for an error.
void quantize_parameter(Model& model, const ParameterInfo& info, const Tensor& from,
                        const std::string& where);
void compute_A(Model& model);  // from A_log

}  // namespace krait
