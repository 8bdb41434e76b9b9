// The recurrent state of sequences, a pool of `slots`: for each layer the last d_conv - 1 inputs of
// the convolution and the state h of the scan. All that a model remembers of a sequence is its slot
// here, so forking a conversation, rolling it back or putting it aside is a copy.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/arena.h"
#include "model/config.h"
#include "ops/context.h"

namespace krait {

class DecodeState {
 public:
  // Zero. dtype: f32; bf16: rounded to nearest even behind every token or chunk of tokens, for
  // inference; f64: for the oracle. memory: the engine's.
  explicit DecodeState(const Config& config, int64_t slots = 1, DType dtype = DType::f32,
                       Memory& memory = host_memory());

  int64_t slots() const { return slots_; }
  bool matches(const Config& config) const;  // made for a model of this shape
  DType dtype() const { return conv_->dtype; }
  Tensor conv(int64_t layer) const;  // (slots, d_conv - 1, d_inner)  oldest input first
  Tensor ssm(int64_t layer) const;   // (slots, d_inner, d_state)

  void reset(int64_t slot);  // to zero: the state before a sequence's first token
  void reset();              // all slots
  void copy(Context& ctx, int64_t from, int64_t to);  // in order with the ops

  // A slot as a value, independent of this object: the model's shape, then the numbers. For the
  // same machine's byte order.
  std::vector<std::byte> save(int64_t slot) const;
  // What was saved in f32 or bf16 becomes this object's dtype. Throws Error when it is of another
  // model's shape.
  void restore(int64_t slot, std::span<const std::byte> saved);
  static DType saved_dtype(std::span<const std::byte> saved);  // throws Error

 private:
  template <class F>
  void for_each_pool(F&& f) const;  // f(pool, layer)
  void check_slot(int64_t slot) const;
  std::array<uint64_t, 6> header(DType dtype) const;
  size_t saved_bytes(DType dtype) const;

  int64_t n_layer_, slots_, d_conv_, d_inner_, d_state_;
  OwnedTensor conv_;  // (n_layer, slots, (d_conv - 1) d_inner)
  OwnedTensor ssm_;   // (n_layer, slots, d_inner d_state)
};

}  // namespace krait
