// Element types and the two 16-bit floats as plain storage types.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/error.h"

namespace krait {

enum class DType : uint8_t { f32, bf16, f16, f64, i32, i64, i8, u8 };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::i8:
    case DType::u8:
      return 1;
  }
  return 0;
}

const char* name_of(DType dtype);           // "f32", "bf16", ...
DType dtype_from_name(const std::string&);  // throws Error

// bfloat16: the upper half of a float. Converts with round to nearest even; NaN stays NaN.
struct bf16 {
  uint16_t bits = 0;

  bf16() = default;
  explicit bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit bf16(double x) : bf16(static_cast<float>(x)) {}
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// IEEE half precision, for reading and writing files only: no op computes in it.
struct f16 {
  uint16_t bits = 0;

  f16() = default;
  explicit f16(float x);
  operator float() const;
};

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  if constexpr (std::is_same_v<T, bf16>) return DType::bf16;
  if constexpr (std::is_same_v<T, f16>) return DType::f16;
  if constexpr (std::is_same_v<T, double>) return DType::f64;
  if constexpr (std::is_same_v<T, int32_t>) return DType::i32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::i64;
  if constexpr (std::is_same_v<T, int8_t>) return DType::i8;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::u8;
}

template <class T>
struct TypeTag {
  using type = T;
};

// Binds a runtime dtype to a C++ type: f(TypeTag<float>{}) or f(TypeTag<bf16>{}). The engines
// compute in these two.
template <class F>
decltype(auto) dispatch_f32_bf16(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(TypeTag<float>{});
  if (dtype == DType::bf16) return f(TypeTag<bf16>{});
  throw Error("unsupported element type", "", "f32 or bf16", name_of(dtype));
}

// The same with f64, for the reference implementations.
template <class F>
decltype(auto) dispatch_float(DType dtype, F&& f) {
  if (dtype == DType::f64) return f(TypeTag<double>{});
  return dispatch_f32_bf16(dtype, static_cast<F&&>(f));
}

}  // namespace krait
