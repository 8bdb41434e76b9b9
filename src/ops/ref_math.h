// What the reference implementations share.
#pragma once

#include <cmath>
#include <type_traits>

namespace krait::reference {

// The type of parameters and states beside activations of type T.
template <class T>
using Full = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace krait::reference
