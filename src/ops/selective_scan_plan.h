// How the CUDA engine cuts the selective scan into kernels: pure functions of shapes.
#pragma once

#include <cstdint>

namespace krait::cuda {

// Tokens between the states that the forward pass saves for the backward pass: the state before token
// t, for every t that is a multiple of this behind its sequence's start (and not the start), lies at
// slot t / kScanChunk - 1 of (slot, d_inner, d_state).
inline constexpr int64_t kScanChunk = 64;

}  // namespace krait::cuda
