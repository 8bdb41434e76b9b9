// A model, its gradients and its optimizer: what one training step needs, without data, schedule or
// files.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/context.h"
#include "model/language_model.h"
#include "train/checkpoint.h"
#include "train/dataset.h"

namespace krait {

struct AdamWSettings {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;  // of the parameters that the parameter table marks
  double clip = 1.0;          // largest global norm of the gradient; 0: no clipping
};

class Learner {
 public:
  // dtype: of activations and matrix products, f32 or bf16; masters, gradients and moments are f32.
  // threads: 0: all cores.
  Learner(const Engine& engine, const Config& config, DType dtype, int threads = 0);

  Context& context() { return context_; }
  TrainableModel& model() { return model_; }
  Moments& moments() { return moments_; }
  void initialize(uint64_t seed);  // the paper's initialization
  void masters_changed() { model_.refresh(context_); }

  // Forward and backward: adds to the gradients. loss_scale: gradient of the objective by each
  // target's loss. state: stream mode, row r in slot r; null: sequences start from nothing. Returns
  // the sum of the targets' losses.
  double accumulate(const Batch& batch, double loss_scale, DecodeState* state);
  // Global norm of the gradients accumulated.
  double gradient_norm();
  // Clips by the norm that gradient_norm gave, applies AdamW and zeroes the gradients. step counts
  // from 1.
  void update(const AdamWSettings& settings, double lr, int64_t step);
  // Sum of the targets' losses; changes nothing but the state.
  double score(const Batch& batch, DecodeState* state);

 private:
  PackedTokens packed(const Batch& batch) const;
  double sum_of_losses(const Tensor& loss) const;

  Context context_;
  TrainableModel model_;
  ParameterStore gradients_;
  Moments moments_;
  OwnedTensor norm_, losses_;
};

}  // namespace krait
