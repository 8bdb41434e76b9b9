// Weights in 8 bits, made when a model is loaded: in_proj, out_proj and the head, which are 95 % of
// what a token reads. A row is one scale times integers from -127 to 127:
//   scale = max |w| / 127,  q = w / scale, rounded to nearest even;  |w - scale q| <= scale / 2
// Everything else stays as it is, the embedding too: tied to it, the head gets a copy of its own.
#pragma once

#include <string>
#include <vector>

#include "model/parameters.h"

namespace krait {

enum class Quantization { none, int8 };
Quantization quantization_from_name(const std::string& name);  // throws Error for another name
const char* name_of(Quantization quantization);

// from: (rows, columns) f32, bf16, f16 or f64, contiguous; q: the same shape, i8; scale: (rows) f32
// or f64. A row of zeros has scale 0. Throws Error, with `where`, for a weight that is not finite.
void quantize_rows(int threads, const Tensor& from, const Tensor& q, const Tensor& scale,
                   const std::string& where);

// Where the scales of a matrix are kept; null: it is not quantized.
Tensor* scale_of(const ParameterInfo& info, Parameters& p);

// What a quantized model has besides what parameter_table lists; none where it is not quantized.
std::vector<Tensor*> quantization_tensors(const Config& config, Parameters& p);

}  // namespace krait
