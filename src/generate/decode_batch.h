// Sequences that a model continues side by side, a token in each step: step, logits and sampling on
// the engine, one recording where it records. The tokens stay there. The host queues steps ahead
// and reads what they picked when it comes, so the engine need not wait for it.
//
// A sequence has a slot in the pool of states, and a row in each step until it ends. Rows are given
// anew (set_rows) to drop those that have ended; states stay where they are.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "model/language_model.h"
#include "ops/mirrored_tensor.h"
#include "ops/recordings.h"
#include "ops/sample.h"

namespace krait {

class DecodeBatch {
 public:
  // Both outlive this. Room for one sequence. state_dtype: f32 or bf16. Throws Error when the
  // vocabulary is too large.
  DecodeBatch(Context& ctx, const Weights& weights, DType state_dtype = DType::f32);
  ~DecodeBatch();  // waits for what is in flight
  DecodeBatch(DecodeBatch&&) = default;

  // Room for `sequences` slots, and for so many recent tokens in each. Keeps the state in slot 0.
  void reserve(int64_t sequences, int64_t recent);
  DecodeState& state() { return state_; }
  const DecodeState& state() const { return state_; }

  struct Sequence {
    SampledSequence sampled;
    std::span<const int32_t> recent;  // the latest last; as many of them are taken as there is room
  };
  // Sequence i in slot i; each starts from the state in slot 0 and reads `token` first. Steps that
  // were in flight are forgotten. rewinds: rewind() may be wanted.
  void start(std::span<const Sequence> sequences, int32_t token, bool rewinds);
  // The rows of the steps to come: which slot, and the token that its sequence reads next. Nothing
  // is in flight.
  void set_rows(std::span<const int32_t> slots, std::span<const int32_t> tokens);

  // Steps that may be in flight; 1 where the host computes itself.
  int64_t max_in_flight() const { return static_cast<int64_t>(results_.size()); }
  int64_t in_flight() const { return queued_ - read_; }
  int64_t queued() const { return queued_; }  // steps since start()
  int64_t rows() const { return rows_; }
  void queue_step();

  struct Result {
    int32_t token;
    Picked picked;
  };
  // What the oldest step in flight picked, one for each of its rows; valid until the next
  // queue_step(). Waits for it.
  std::span<const Result> read_step();

  // From here on rewind() is for no more inputs than steps were read: steps that follow leave alone
  // what it needs.
  void hold_snapshots() { rewinds_ = false; }
  // Puts slot 0 where it stood after its first inputs.size() steps, bit for bit, with what it read
  // in them. Other rows are lost.
  void rewind(std::span<const int32_t> inputs);

  // (vocab_size) f32: after `token` in slot 0, which stays where it is. Rows are lost.
  std::vector<float> logits_after(int32_t token);

 private:
  static constexpr int64_t kAhead = 4;           // steps in flight
  static constexpr int64_t kSnapshotSteps = 16;  // between two; more than kAhead

  struct StepResult {
    OwnedTensor host;  // (sequences, 2)  i32; none: picked_ is the host's
    std::shared_ptr<void> mark;
    int64_t rows = 0;
  };

  bool on_host() const { return ctx_.memory().on_host(); }
  int32_t spare_slot() const { return static_cast<int32_t>(reserved_); }
  int64_t snapshot_slot(int64_t step) const { return reserved_ + 1 + step / kSnapshotSteps % 2; }
  void upload_rows();
  void decode();

  Context& ctx_;
  const Weights& weights_;
  int64_t reserved_ = 0;             // slots of sequences
  DecodeState state_;                // those, the spare one, two for snapshots of slot 0
  MirroredTensor tokens_;            // (sequences)  i32
  MirroredTensor slot_;              // (sequences)  i32
  OwnedTensor logits_;               // (sequences, vocab_size)  f32
  MirroredTensor sequence_;          // (sequences + 1, sizeof(SampledSequence))  u8
  MirroredTensor recent_;            // (sequences + 1, recent)  i32
  OwnedTensor picked_;               // (sequences, 2)  i32
  std::vector<StepResult> results_;  // of step i: i % size
  int64_t rows_ = 0, queued_ = 0, read_ = 0;
  bool rewinds_ = false;
  std::vector<int32_t> step_rows_;  // of each step, when it may be done again
  Recordings recordings_;           // by the number of rows
};

}  // namespace krait
