// Weights as the ops take them, and models in memory: loaded from a folder, made at random, or
// being trained.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "formats/tensor_table.h"
#include "model/parameters.h"
#include "model/quantize.h"
#include "ops/context.h"

namespace krait {

class TensorFile;

// Views only. Matrices have dtype T, or i8 with scales beside them (quantize.h), everything else is
// f32; with T = f64 (the reference engine's oracle) all are f64.
struct Weights {
  Config config;
  DType dtype = DType::f32;  // T
  Parameters parameters;
  Tensor A;  // (n_layer, d_inner, d_state)  f32: -exp(A_log)
};

// Weights with what keeps their memory alive (a mapped file, converted copies). Move-only;
// `weights` stays valid.
struct Model {
  Weights weights;
  DType file_dtype = DType::f32;  // of the matrices on disk
  std::vector<std::shared_ptr<void>> storage;
  // The parameters as load_model found them, mapped, under the names and in the shapes of
  // parameter_table; none where the model comes from no file.
  std::vector<NamedTensor> in_file;

  const Config& config() const { return weights.config; }
  int64_t mapped_bytes = 0, owned_bytes = 0;  // weights used in place; weights copied or converted
};

// Reads config.json and model.safetensors (or its shards, or pytorch_model.bin). dtype: f32, bf16
// or f64; none: bf16 when the file's matrices are bf16, else f32. Tensors that have the wanted type
// already are used where they are mapped, unless `memory` is not the host's. Matrices that are
// quantized are, on the host with all cores, and reach `memory` in 8 bits only. Throws Error: a
// missing, unexpected or wrongly shaped tensor (file, name, expected and found shape), an
// unreadable file, an infinite weight to quantize.
Model load_model(const std::filesystem::path& folder, std::optional<DType> dtype = std::nullopt,
                 Memory& memory = host_memory(), Quantization quantization = Quantization::none);

// Throws Error as load_model does where a file does not hold the tensors that config implies, of
// their shapes, and no others.
void check_tensors(const Config& config, const TensorFile& file);

// The same weights in another memory, an engine's.
Model copy_model(const Model& from, Memory& to);

// Random weights of plausible size, quickly: for benchmarks. Not the initialization for training
// (init.h). The same in every memory; matrices are made there, not copied to it, but for quantized
// ones.
Model make_random_model(const Config& config, DType dtype, uint64_t seed = 0,
                        Memory& memory = host_memory(),
                        Quantization quantization = Quantization::none);

// Writes config.json and model.safetensors (hf) or pytorch_model.bin (state-spaces). Matrices are
// stored as dtype (f32, bf16 or f16), everything else as f32. The files appear complete or not at
// all. Throws Error (full disk, no permission).
void save_model(const std::filesystem::path& folder, const Config& config,
                const Parameters& parameters, Dialect dialect, DType dtype);

// A model being trained: f32 masters, and the weights that the ops compute with, derived from them.
class TrainableModel {
 public:
  // dtype: of the activations and matrices, f32 or bf16; f64: masters and all else in double, for
  // the reference engine. memory: the engine's.
  TrainableModel(const Config& config, DType dtype, Memory& memory = host_memory());

  const Config& config() const { return weights_.config; }
  ParameterStore& masters() { return masters_; }
  const ParameterStore& masters() const { return masters_; }
  const Weights& weights() const { return weights_; }
  // Call after the masters have changed: rounds the matrices to bf16, computes A.
  void refresh(Context& ctx);
  // For an optimizer that writes the rounded masters itself: all of them, laid out as the masters
  // (none where matrices are not rounded), and what is left to compute then.
  const Tensor& rounded_masters() const { return copies_.view(); }
  void refresh_A(Context& ctx);

 private:
  ParameterStore masters_;
  Weights weights_;
  OwnedTensor A_, copies_;
};

}  // namespace krait
