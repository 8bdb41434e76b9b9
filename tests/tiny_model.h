// A model small enough for tests of what lies around the model.
#pragma once

#include <filesystem>

#include "model/weights.h"

namespace krait {

inline Config tiny_config() {
  Config config = make_config(256, 32, 2);
  config.tie_embeddings = false;  // a tied random head would only repeat the last token
  config.eos_token_ids = {0};
  return config;
}

// Random weights in a folder as transformers has it.
inline void write_random_model(const std::filesystem::path& folder, const Config& config) {
  const Model model = make_random_model(config, DType::f32, 1);
  save_model(folder, model.config(), model.weights.parameters, Dialect::hf, DType::f32);
}

// The same, but what a text began with decides what it goes on with: random weights of the usual
// size make little of the scan's state.
inline void write_remembering_model(const std::filesystem::path& folder, const Config& config) {
  const Model model = make_random_model(config, DType::f32, 1);
  for (const LayerParameters& layer : model.weights.parameters.layers)
    for (const Tensor& matrix : {layer.x_proj, layer.out_proj})
      for (int64_t i = 0; i < matrix.size(); ++i) matrix.ptr<float>()[i] *= 8;
  save_model(folder, model.config(), model.weights.parameters, Dialect::hf, DType::f32);
}

}  // namespace krait
