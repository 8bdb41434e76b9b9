// Argument checks shared by the ops' entry points. A failure is a CheckFailure: callers inside the
// library pass right shapes; what comes from outside is checked where it enters.
#pragma once

#include "ops/context.h"

namespace krait {

// t has this dtype and this shape (-1: any extent), and its last dimension is contiguous.
void check_tensor(const Tensor& t, const char* name, DType dtype,
                  std::initializer_list<int64_t> shape);
// The same, or none.
void check_optional(const Tensor& t, const char* name, DType dtype,
                    std::initializer_list<int64_t> shape);
// seq_start runs from 0 to tokens without decreasing; slots are in range and distinct where they
// are used.
void check_sequences(const Context& ctx, const Tensor& seq_start, const Tensor& slot,
                     const Tensor& state, int64_t tokens);
// The state of an op that mixes time (or none): contiguous, in full precision or in bf16.
void check_state(const Tensor& state, DType full, std::initializer_list<int64_t> shape);
// slot (none: i) is in range and distinct for num_seqs sequences, where the host can look.
void check_slots(const Context& ctx, const Tensor& slot, const Tensor& state, int64_t num_seqs);

// f64 when `like` is f64 (the reference engine in double), else f32: the type of what must be kept
// in full precision.
inline DType full_precision(const Tensor& like) {
  return like.dtype == DType::f64 ? DType::f64 : DType::f32;
}

}  // namespace krait
