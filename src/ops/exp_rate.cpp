#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/exp_rate.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

// y = 2^(x scale) `rounds` times over.
void exp_rounds(const float* HWY_RESTRICT x, float* HWY_RESTRICT y, size_t count, int rounds) {
  const DF d;
  for (int r = 0; r < rounds; ++r) {
    const VF scale = hn::Set(d, 1.0f + 0.001f * static_cast<float>(r));
    for (size_t i = 0; i < count; i += kLanes)
      hn::StoreU(exp2_product(d, scale, hn::LoadU(d, x + i)), d, y + i);
  }
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <chrono>
#include <vector>

#include "core/threads.h"
#include "ops/engine.h"

namespace krait {
HWY_EXPORT(exp_rounds);

double cpu::exp_rate(Context& ctx) {
  constexpr size_t kCount = 2048;
  constexpr int kRounds = 1000;
  const int64_t threads = ctx.threads();
  std::vector<float> x(kCount), y(kCount * static_cast<size_t>(threads));
  for (size_t i = 0; i < kCount; ++i) x[i] = -0.005f * static_cast<float>(i);
  double best = 0;
  for (int run = 0; run < 8; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(ctx.threads(), threads, [&](int64_t thread) {
      HWY_DYNAMIC_DISPATCH(exp_rounds)
      (x.data(), y.data() + static_cast<size_t>(thread) * kCount, kCount, kRounds);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(threads) * kCount * kRounds / seconds.count());
  }
  return best;
}

}  // namespace krait
#endif  // HWY_ONCE
