// What all engines compute of sampling in the same way, bit for bit: constexpr, so that kernels use
// it too.
#pragma once

#include <cstdint>

namespace krait {

inline constexpr int kSamplingWeightBits = 43;  // sums over kMaxSampledVocab tokens fit 64 bits
inline constexpr double kLog2E64 = 1.4426950408889634;

// 2^(kSamplingWeightBits - distance), for distance >= 0, within 2^-30 of it and never more than the
// weight of a smaller distance by more than that; at distance 0 exact. Below 1 it is 0.
constexpr uint64_t sampling_weight(double distance) {
  if (!(distance < kSamplingWeightBits + 1)) return 0;
  const auto fixed = static_cast<uint64_t>(distance * 0x1p34);
  const int whole = static_cast<int>(fixed >> 34);
  const int quarter = static_cast<int>(fixed >> 32) & 3;
  const auto high = [](uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
  };
  // 2^-r = exp(-x) for the r < 1/4 that is left, by its series: x < 0.174, the first term left out
  // is x^8 / 8! = 2e-11.
  const uint32_t x = high(static_cast<uint32_t>(fixed) >> 2, 0xb17217f7u);  // r ln 2, times 2^32
  constexpr uint32_t kOne = uint32_t{1} << 31;
  uint32_t p = kOne / 5040;
  p = kOne / 720 - high(x, p);
  p = kOne / 120 - high(x, p);
  p = kOne / 24 - high(x, p);
  p = kOne / 6 - high(x, p);
  p = kOne / 2 - high(x, p);
  p = kOne - high(x, p);
  p = kOne - high(x, p);
  const uint32_t factor = quarter == 0   ? 0x80000000u  // 2^(31 - quarter / 4)
                          : quarter == 1 ? 0x6ba27e65u
                          : quarter == 2 ? 0x5a827999u
                                         : 0x4c1bf828u;
  return (uint64_t{factor} * p) >> (62 - kSamplingWeightBits + whole);
}

// Weight of a logit against the highest one. log2_per_logit: log2(e) / temperature.
constexpr uint64_t sampling_weight(float logit, float max_logit, double log2_per_logit) {
  return sampling_weight((static_cast<double>(max_logit) - static_cast<double>(logit)) *
                         log2_per_logit);
}

// floor(a b / 2^64)
constexpr uint64_t multiply_high(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((Wide{a} * b) >> 64);
}

// A point of [0, total) from a random number of 53 bits.
constexpr uint64_t sampling_point(uint64_t random53, uint64_t total) {
  return multiply_high(random53 << 11, total);
}

// The least sum of weights that is top_p or more of all.
constexpr uint64_t sampling_share(float top_p, uint64_t total) {
  const double share = static_cast<double>(top_p) * static_cast<double>(total);
  const auto down = static_cast<uint64_t>(share);
  return down + (static_cast<double>(down) < share ? 1 : 0);
}

}  // namespace krait
