#include "ops/machine.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "core/threads.h"
#include "ops/engine.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/machine.cpp"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kLine = 16;     // words of a cache line
constexpr int64_t kAhead = 1024;  // 4 KiB: the hardware alone does not keep enough reads in flight

// Reads all of [begin, begin + count), a multiple of 8 vectors of 64 bytes; the xor of it.
uint32_t read_all(const uint32_t* begin, int64_t count) {
  const hn::ScalableTag<uint32_t> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto a = hn::Zero(d), b = a, c = a, e = a;
  for (int64_t i = 0; i < count; i += 4 * lanes) {
    for (int64_t line = 0; line < 4 * lanes; line += kLine)
      hwy::Prefetch(begin + i + line + kAhead);
    a = hn::Xor(a, hn::LoadU(d, begin + i));
    b = hn::Xor(b, hn::LoadU(d, begin + i + lanes));
    c = hn::Xor(c, hn::LoadU(d, begin + i + 2 * lanes));
    e = hn::Xor(e, hn::LoadU(d, begin + i + 3 * lanes));
  }
  return hn::GetLane(hn::MaxOfLanes(d, hn::Xor(hn::Xor(a, b), hn::Xor(c, e))));
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(read_all);

namespace {

// Seconds of the fastest of `runs` calls.
template <class F>
double best_of(int runs, F&& f) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (int i = 0; i < runs; ++i) {
    const auto start = Clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

}  // namespace

double cpu::read_bandwidth(Context& ctx) {
  constexpr int64_t kBytes = int64_t{512} << 20, kCount = kBytes / 4, kGrain = 1 << 14;
  constexpr int kRuns = 8;
  const Buffer memory(kBytes);
  std::memset(memory.data(), 1, kBytes);
  const auto* words = static_cast<const uint32_t*>(memory.data());
  volatile uint32_t sink = 0;  // the reads must happen
  const double seconds = best_of(kRuns, [&] {
    parallel_ranges(ctx.threads(), kCount, kGrain, [&](int64_t begin, int64_t end) {
      const uint32_t word = HWY_DYNAMIC_DISPATCH(read_all)(words + begin, end - begin);
      if (word == 0) sink = 1;
    });
  });
  return static_cast<double>(kBytes) / seconds;
}

double measure_read_bandwidth(Context& ctx) { return ctx.engine().read_bandwidth(ctx) * 1e-9; }

double measure_exp_rate(Context& ctx) { return ctx.engine().exp_rate(ctx); }

double measure_gemm_rate(Context& ctx, DType dtype) {
  constexpr int kRuns = 5;
  const bool host = ctx.memory().on_host();
  const std::vector<std::array<int64_t, 3>> shapes =
      host ? std::vector<std::array<int64_t, 3>>{{1024, 4096, 2048},
                                                 {2048, 1536, 768},
                                                 {2048, 768, 3072}}
           : std::vector<std::array<int64_t, 3>>{{8192, 8192, 8192}};
  // What the machine can do, not what rows that do not depend on their number leave of it.
  const bool batch_invariant = std::exchange(ctx.batch_invariant, false);
  double rate = 0;
  for (const auto& [tokens, in, out] : shapes) {
    const OwnedTensor x(dtype, {tokens, in}, ctx.memory()), weight(dtype, {out, in}, ctx.memory());
    const OwnedTensor y(dtype, {tokens, out}, ctx.memory());
    Rng rng(1);
    fill_random(x, ctx.memory(), rng, -1, 1);
    fill_random(weight, ctx.memory(), rng, -1, 1);
    const Linear op = {.x = x, .weight = weight, .bias = {}, .y = y};
    const double seconds = best_of(kRuns, [&] {
      ctx.engine().linear_fwd(ctx, op);
      ctx.engine().synchronize(ctx);
    });
    rate = std::max(rate, linear_cost(op).flops / seconds * 1e-9);
  }
  ctx.batch_invariant = batch_invariant;
  return rate;
}

void fill_random(const Tensor& t, Memory& memory, Rng& rng, double low, double high) {
  constexpr int64_t kPattern = (1 << 20) + 7;  // elements; no multiple of a row
  const int64_t count = std::min(t.size(), kPattern);
  const size_t width = size_of(t.dtype);
  const Buffer pattern(static_cast<size_t>(count) * width);
  dispatch_f32_bf16(t.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = 0; i < count; ++i)
      static_cast<T*>(pattern.data())[i] =
          static_cast<T>(static_cast<float>(rng.uniform(low, high)));
  });
  const auto at = [&](int64_t element) {
    return static_cast<char*>(t.data) + static_cast<size_t>(element) * width;
  };
  memory.upload(at(0), pattern.data(), static_cast<size_t>(count) * width);
  for (int64_t done = count; done < t.size(); done += count)
    memory.copy(at(done), at(0), static_cast<size_t>(std::min(count, t.size() - done)) * width);
}

}  // namespace krait
#endif
