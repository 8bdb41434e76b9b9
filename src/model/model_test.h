// What the tests of model/ share.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/convert.h"
#include "formats/tensor_file.h"
#include "model/init.h"
#include "model/language_model.h"
#include "ops/context.h"
#include "ops/engine.h"
#include "ops/op_test.h"

namespace krait::model_test {

namespace fs = std::filesystem;

inline fs::path golden_folder() { return fs::path(KRAIT_SOURCE_DIR) / "tests/golden/model"; }

inline std::vector<std::string> golden_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(golden_folder()))
    if (entry.is_directory()) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

inline std::vector<int32_t> ints(const Tensor& t) {
  return std::vector<int32_t>(t.ptr<int32_t>(), t.ptr<int32_t>() + t.size());
}

inline OwnedTensor tensor_of(const std::vector<int32_t>& values) {
  OwnedTensor t(DType::i32, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), t->ptr<int32_t>());
  return t;
}

inline DType full_precision_of(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

// Sequences with the memory of their tensors.
struct Packed {
  OwnedTensor tokens, seq_start, slot;
  PackedTokens view() const { return {tokens, seq_start, slot}; }
};

inline Packed packed(const std::vector<std::vector<int32_t>>& sequences,
                     const std::vector<int32_t>& slots = {}) {
  std::vector<int32_t> tokens, start = {0};
  for (const auto& s : sequences) {
    tokens.insert(tokens.end(), s.begin(), s.end());
    start.push_back(static_cast<int32_t>(tokens.size()));
  }
  return {tensor_of(tokens), tensor_of(start), slots.empty() ? OwnedTensor() : tensor_of(slots)};
}

inline std::vector<double> logits_of(Context& ctx, const Weights& w, const PackedTokens& input,
                                     DecodeState* state) {
  const int64_t tokens = input.tokens.shape[0];
  const OwnedTensor hidden(w.dtype, {tokens, w.config.d_model});
  const OwnedTensor out(full_precision_of(w.dtype), {tokens, w.config.vocab_size});
  forward(ctx, w, input, state, hidden);
  logits(ctx, w, hidden, out);
  return op_test::to_double(out);
}

inline std::vector<double> step_logits(Context& ctx, const Weights& w,
                                       const std::vector<int32_t>& tokens,
                                       const std::vector<int32_t>& slots, DecodeState& state) {
  const int64_t num_seqs = static_cast<int64_t>(tokens.size());
  const OwnedTensor hidden(w.dtype, {num_seqs, w.config.d_model});
  const OwnedTensor out(full_precision_of(w.dtype), {num_seqs, w.config.vocab_size});
  const OwnedTensor slot = slots.empty() ? OwnedTensor() : tensor_of(slots);
  step(ctx, w, tensor_of(tokens), slot, state, hidden);
  logits(ctx, w, hidden, out);
  return op_test::to_double(out);
}

// A model to train whose masters are `from`, converted.
inline TrainableModel trainable(Context& ctx, const Config& config, const Parameters& from,
                                DType dtype) {
  TrainableModel model(config, dtype);
  for (const ParameterInfo& p : parameter_table(config))
    convert_on_host(1, p.of(from), p.of(model.masters().parameters()));
  model.refresh(ctx);
  return model;
}

// A small model with every kind of parameter, initialized and then shaken so that nothing is zero
// or one.
inline TrainableModel random_trainable(Context& ctx, const Config& config, DType dtype,
                                       uint64_t seed = 1) {
  ParameterStore store(config, DType::f64);
  initialize(config, store.parameters(), seed);
  Rng rng(seed, 99);
  for (const ParameterInfo& p : parameter_table(config)) {
    const Tensor& t = p.of(store.parameters());
    for (int64_t i = 0; i < t.size(); ++i) t.ptr<double>()[i] += 0.2 * rng.normal();
  }
  return trainable(ctx, config, store.parameters(), dtype);
}

inline Config small_config() {
  Config c = make_config(23, 12, 3);
  c.d_inner = 20;
  c.d_state = 5;
  c.d_conv = 3;
  c.use_bias = true;
  return c;
}

inline std::vector<int32_t> random_tokens(int64_t count, int64_t vocab_size, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab_size)));
  return tokens;
}

}  // namespace krait::model_test
