#include "model/quantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "core/error.h"
#include "core/threads.h"

namespace krait {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;

// Bits of the largest size in a row: they are in the order of the sizes, and a NaN is above
// infinity.
uint32_t largest_bits(const float* row, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i)
    largest = std::max(largest, std::bit_cast<uint32_t>(row[i]) & 0x7fffffffu);
  return largest;
}

// Adding 1.5 2^23 rounds to an integer, to nearest even, and leaves it in the low bits.
void round_row(const float* row, int64_t count, float scale, int8_t* q) {
  constexpr float kShift = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t rounded =
        std::bit_cast<int32_t>(row[i] / scale + kShift) - std::bit_cast<int32_t>(kShift);
    q[i] = static_cast<int8_t>(std::clamp(rounded, -127, 127));  // a denormal scale is inexact
  }
}

// Returns whether all weights are finite.
template <class T>
bool quantize_range(const Tensor& from, int64_t begin, int64_t end, const Tensor& q,
                    const Tensor& scale) {
  const int64_t width = from.shape[1];
  std::vector<float> row(static_cast<size_t>(width));
  for (int64_t r = begin; r < end; ++r) {
    const T* const in = from.row<T>(r);
    for (int64_t i = 0; i < width; ++i) row[static_cast<size_t>(i)] = static_cast<float>(in[i]);
    const uint32_t largest = largest_bits(row.data(), width);
    if (largest >= kInfinity) return false;
    const float s = std::bit_cast<float>(largest) / 127;
    if (scale.dtype == DType::f64)
      scale.ptr<double>()[r] = s;
    else
      scale.ptr<float>()[r] = s;
    int8_t* const out = q.row<int8_t>(r);
    if (s == 0)
      std::fill_n(out, width, int8_t{0});
    else
      round_row(row.data(), width, s, out);
  }
  return true;
}

}  // namespace

Quantization quantization_from_name(const std::string& name) {
  if (name == "none") return Quantization::none;
  if (name == "int8") return Quantization::int8;
  throw Error("unknown quantization", "quantize", "none or int8", in_quotes(name));
}

const char* name_of(Quantization quantization) {
  return quantization == Quantization::int8 ? "int8" : "none";
}

void quantize_rows(int threads, const Tensor& from, const Tensor& q, const Tensor& scale,
                   const std::string& where) {
  KRAIT_CHECK(from.contiguous() && q.contiguous() && scale.contiguous());
  KRAIT_CHECK(q.shape == from.shape && scale.shape[0] == from.shape[0]);
  std::atomic<bool> finite = true;
  parallel_ranges(threads, from.shape[0], 16, [&](int64_t begin, int64_t end) {
    const auto as = [&](auto t) {
      return quantize_range<typename decltype(t)::type>(from, begin, end, q, scale);
    };
    if (!(from.dtype == DType::f16 ? as(TypeTag<f16>{}) : dispatch_float(from.dtype, as)))
      finite = false;
  });
  if (!finite) throw Error("cannot quantize", where, "finite weights", "infinity or NaN");
}

Tensor* scale_of(const ParameterInfo& info, Parameters& p) {
  if (info.layer < 0) return info.in_model == &Parameters::lm_head ? &p.head_scale : nullptr;
  LayerParameters& layer = p.layers[static_cast<size_t>(info.layer)];
  if (info.in_layer == &LayerParameters::in_proj) return &layer.in_proj_scale;
  if (info.in_layer == &LayerParameters::out_proj) return &layer.out_proj_scale;
  return nullptr;
}

std::vector<Tensor*> quantization_tensors(const Config& config, Parameters& p) {
  std::vector<Tensor*> tensors;
  for (LayerParameters& layer : p.layers)
    tensors.insert(tensors.end(), {&layer.in_proj_scale, &layer.out_proj_scale});
  tensors.push_back(&p.head_scale);
  if (config.tie_embeddings) tensors.push_back(&p.lm_head);
  std::erase_if(tensors, [](const Tensor* t) { return !*t; });
  return tensors;
}

}  // namespace krait
