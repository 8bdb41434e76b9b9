// In place of the header of this name.
#pragma once

#include <cmath>

namespace krait::cuda {

inline constexpr float kLog2E = 1.44269504088896341f;

inline float exp2_approx(float x) { return std::exp2(x); }
inline float softplus(float x) { return std::fmax(x, 0.f) + std::log1p(std::exp(-std::fabs(x))); }
inline float silu(float x) { return x / (1 + std::exp(-x)); }

}  // namespace krait::cuda
