// A model, its gradients and its optimizer: what one training step needs, without data, schedule or
// files.
//
// A step is accumulate() for each of its batches, then update(). Both only queue work (on the CPU
// they do it), so that the host prepares the next step while a GPU is at this one; collect() waits
// for the oldest step and gives what was measured.
#pragma once

#include <array>
#include <cstdint>

#include "model/language_model.h"
#include "ops/context.h"
#include "ops/mirrored_tensor.h"
#include "ops/recordings.h"
#include "train/checkpoint.h"
#include "train/dataset.h"

namespace krait {

struct AdamWSettings {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;  // of the parameters that the parameter table marks
  double clip = 1.0;          // largest global norm of the gradient; 0: no clipping
};

struct LearnerSettings {
  DType dtype = DType::f32;  // of activations and matrix products, or bf16; the rest is f32
  int threads = 0;           // 0: all cores
  Recompute recompute = Recompute::none;
};

struct StepResult {
  int64_t step = 0;
  double loss = 0;       // sum over the targets of all batches
  double grad_norm = 0;  // before clipping
};

class Learner {
 public:
  static constexpr int64_t kMaxInFlight = 2;  // steps

  Learner(const Engine& engine, const Config& config, const LearnerSettings& settings);
  ~Learner();  // waits for all steps
  Learner(const Learner&) = delete;
  Learner& operator=(const Learner&) = delete;

  Context& context() { return context_; }
  TrainableModel& model() { return model_; }
  Moments& moments() { return moments_; }
  void initialize(uint64_t seed);  // the paper's initialization
  void masters_changed() { model_.refresh(context_); }

  // Forward and backward: adds to the gradients. loss_scale: gradient of the objective by each
  // target's loss. state: stream mode, row r in slot r; null: sequences start from nothing. Throws
  // Error for a token or target outside the vocabulary; behind any other error gradients are
  // undefined.
  void accumulate(const Batch& batch, double loss_scale, DecodeState* state);
  // Clips by the gradients' global norm, applies AdamW and lets gradients begin anew. step counts
  // from 1. A norm that is not finite leaves the parameters as they are, from then on.
  void update(const AdamWSettings& settings, double lr, int64_t step);
  int64_t in_flight() const { return updated_ - collected_; }  // steps
  StepResult collect();                                        // of the oldest

  // Sum of the targets' losses; changes nothing but the state.
  double score(const Batch& batch, DecodeState* state);

 private:
  struct Views {
    PackedTokens input;
    Tensor targets, loss;
  };
  // What the host reads of a step.
  struct Slot {
    int64_t step = 0;
    OwnedTensor loss, norm;
    std::shared_ptr<void> ready;
  };

  Views send(const Batch& batch, int64_t num_seqs);
  void reserve(int64_t tokens, int64_t num_seqs);
  void apply(const AdamWSettings& settings, double lr, int64_t step);

  Context context_;
  Recompute recompute_;
  TrainableModel model_;
  ParameterStore gradients_;
  Moments moments_;
  MirroredTensor tokens_, targets_, seq_start_;  // (capacity)  i32
  OwnedTensor losses_;                           // (capacity)  f32
  OwnedTensor loss_sum_;                         // (1) f64  of the step so far
  OwnedTensor norm_;                             // (1) f32
  OwnedTensor zero_, poison_;                    // (1) f32  poison: 0, or NaN after a bad norm
  MirroredTensor score_sum_;                     // (1) f64
  std::array<Slot, kMaxInFlight> slots_;
  bool fresh_ = true;                    // nothing has been accumulated since the last update
  int64_t updated_ = 0, collected_ = 0;  // steps
  Recordings recordings_;
};

}  // namespace krait
