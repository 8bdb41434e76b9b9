// The parameters of a model as tensors with the checkpoint's names, one table that describes them
// all, and flat storage for training. Loading, saving, initialization and the optimizer are loops
// over the table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/arena.h"
#include "model/config.h"

namespace krait {

// A parameter that the configuration lacks is none.
struct LayerParameters {
  Tensor norm;           // (d_model)
  Tensor in_proj;        // (2 d_inner, d_model)     rows of x, then of z
  Tensor in_proj_bias;   // (2 d_inner)
  Tensor conv1d_weight;  // (d_inner, d_conv)        in files (d_inner, 1, d_conv)
  Tensor conv1d_bias;    // (d_inner)
  Tensor x_proj;         // (x_proj_size, d_inner)   rows of dt, B, C
  Tensor dt_proj;        // (d_inner, dt_rank)
  Tensor dt_proj_bias;   // (d_inner)
  Tensor A_log;          // (d_inner, d_state)       A = -exp(A_log)
  Tensor D;              // (d_inner)
  Tensor B_const;        // (d_state)                instead of a selective B
  Tensor C_const;        // (d_state)                instead of a selective C
  Tensor out_proj;       // (d_model, d_inner)
  Tensor out_proj_bias;  // (d_model)
  // f32, of the rows of in_proj and out_proj, which then are i8 (quantize.h); the table below knows
  // nothing of them.
  Tensor in_proj_scale, out_proj_scale;
};

struct Parameters {
  Tensor embedding;  // (vocab_size, d_model)
  std::vector<LayerParameters> layers;
  Tensor norm_f;   // (d_model)
  Tensor lm_head;  // (vocab_size, d_model); none: tied to the embedding
  // (vocab_size) f32, of the rows of lm_head, which then is i8 and there even where config ties it.
  Tensor head_scale;

  const Tensor& head() const { return lm_head ? lm_head : embedding; }
};

// One row of the table.
struct ParameterInfo {
  std::string name;            // in transformers' checkpoints, e.g. "backbone.layers.0.mixer.A_log"
  std::vector<int64_t> shape;  // as in LayerParameters
  std::vector<int64_t> file_shape;  // as in checkpoints
  bool matrix;                      // computed with in the activations' type T; else kept in f32
  bool decay;          // weight decay applies; not to A_log, D, biases, norms, constants
  const char* group;   // "embedding", "norm", "in_proj", ..: for parameter counts
  int64_t layer = -1;  // -1: of the model, not of a layer
  Tensor LayerParameters::*in_layer = nullptr;
  Tensor Parameters::*in_model = nullptr;

  int64_t size() const;
  int64_t aligned_size(
      DType dtype) const;  // elements, with the gap up to the next 64-byte boundary
  Tensor& of(Parameters& p) const {
    return layer < 0 ? p.*in_model : p.layers[static_cast<size_t>(layer)].*in_layer;
  }
  const Tensor& of(const Parameters& p) const { return of(const_cast<Parameters&>(p)); }
  Tensor view(void* data, DType dtype) const;  // of `shape`
};

// All parameters of this configuration, in the checkpoint's order: embedding, layers, norm_f,
// lm_head (untied only).
std::vector<ParameterInfo> parameter_table(const Config& config);
// Of lm_head, also where the table has none.
ParameterInfo head_info(const Config& config);
Parameters empty_parameters(
    const Config& config);  // every tensor none, `layers` of the right length

struct ParameterCount {
  std::string group;
  int64_t count;
};
int64_t parameter_count(const Config& config);
std::vector<ParameterCount> parameter_counts(
    const Config& config);  // by group, in order of appearance

// All parameters (or their gradients, or an optimizer's moments) in one contiguous buffer: matrices
// with weight decay, then others with it, then those without. Each starts on a 64-byte boundary
// (gaps stay zero). Equal configurations have equal layouts.
class ParameterStore {
 public:
  // dtype: f32, or f64 for the reference. Starts as zero.
  explicit ParameterStore(const Config& config, DType dtype = DType::f32,
                          Memory& memory = host_memory());

  const Tensor& flat() const { return buffer_.view(); }  // (size), gaps included
  Tensor decayed() const { return decayed(flat()); }
  Tensor undecayed() const { return undecayed(flat()); }
  // The same parts of anything that is laid out so.
  Tensor decayed(const Tensor& t) const { return t.slice(0, 0, decayed_); }
  Tensor undecayed(const Tensor& t) const { return t.slice(0, decayed_, t.size()); }
  // All but matrices with weight decay.
  Tensor behind_matrices() const { return flat().slice(0, matrices_, flat().size()); }
  const Parameters& parameters() const { return parameters_; }  // views into the buffer
  OwnedTensor& buffer() { return buffer_; }
  const OwnedTensor& buffer() const { return buffer_; }

 private:
  OwnedTensor buffer_;
  int64_t matrices_ = 0, decayed_ = 0;
  Parameters parameters_;
};

}  // namespace krait
