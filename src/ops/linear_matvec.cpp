// Strategy: every thread takes a contiguous range of the weight's rows and walks it from start to
// end. A tile of `kRows` weight rows by `kTokens` tokens is accumulated in registers, two
// accumulators for each pair, always in the same order: lane j of accumulator p sums the products
// at positions 2 lanes i + p lanes + j. The tile's weights come from memory for the first tokens
// and from L1 for the others. W is the weights' type, T the activations', which are widened first.
#include "ops/linear_matvec.h"

#include <algorithm>

#include "core/threads.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear_matvec.cpp"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "ops/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

constexpr int64_t kStep = 2 * static_cast<int64_t>(kLanes);
constexpr int64_t kBlock = 64;  // tokens whose x is widened at a time: it stays in L2

// x of a block of tokens in f32, rows padded with zeros to a multiple of kStep.
template <class T>
void widen(const Tensor& x, const Tensor& wide) {
  const DF d;
  const auto width = static_cast<size_t>(x.shape[1]);
  for (int64_t t = 0; t < x.shape[0]; ++t) {
    const T* from = x.row<T>(t);
    float* to = wide.row<float>(t);
    std::fill(to + width, to + wide.shape[1], 0.0f);
    for_each_vector(width, [&](size_t i, size_t valid) HWY_ATTR {
      store_part(d, load_part(d, from + i, valid), to + i, valid);
    });
  }
}

template <int kRows, int kTokens>
struct Tile {
  VF sum[kRows][kTokens][2];
};

// One step of a tile: products of the weights at w (rows `w_stride` apart) with x at the same
// place.
template <int kRows, int kTokens, class W, class Load>
HWY_INLINE void accumulate(Tile<kRows, kTokens>& tile, const float* x, int64_t x_stride, const W* w,
                           int64_t w_stride, const Load& load) {
  const DF d;
  for (int p = 0; p < 2; ++p) {
    const int64_t at = p * static_cast<int64_t>(kLanes);
    VF xs[kTokens];
    for (int t = 0; t < kTokens; ++t) xs[t] = hn::LoadU(d, x + t * x_stride + at);
    for (int r = 0; r < kRows; ++r) {
      const VF weight = load(w + r * w_stride + at, p);
      // The same place of the tile after this one. Without it a core waits at every start of a row:
      // 768 wide in bf16, 71 % of the read bandwidth; with it, more than a plain loop reads.
      if (p == 0 || kLanes * sizeof(W) >= 64) hwy::Prefetch(w + (kRows + r) * w_stride + at);
      for (int t = 0; t < kTokens; ++t)
        tile.sum[r][t][p] = hn::MulAdd(weight, xs[t], tile.sum[r][t][p]);
    }
  }
}

// y[tokens first.., rows o..] for one tile.
template <int kRows, int kTokens, class W, class Y>
HWY_NOINLINE void run_tile(const Linear& op, const Tensor& wide, int64_t first, int64_t o) {
  const DF d;
  const int64_t width = op.x.shape[1], x_stride = wide.stride[0], whole = width / kStep * kStep;
  const float* x = wide.row<float>(first);
  const W* w = op.weight.row<W>(o);
  Tile<kRows, kTokens> tile;
  for (auto& row : tile.sum)
    for (auto& pair : row) pair[0] = pair[1] = hn::Zero(d);
  for (int64_t i = 0; i < whole; i += kStep)
    accumulate(tile, x + i, x_stride, w + i, width,
               [&](const W* p, int) HWY_ATTR { return load_f32(d, p); });
  if (whole < width)
    accumulate(tile, x + whole, x_stride, w + whole, width, [&](const W* p, int half) HWY_ATTR {
      const int64_t left = width - whole - half * static_cast<int64_t>(kLanes);
      const int64_t valid = std::clamp<int64_t>(left, 0, static_cast<int64_t>(kLanes));
      return load_f32_n(d, p, static_cast<size_t>(valid));
    });
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) {
      float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(tile.sum[r][t][0], tile.sum[r][t][1])));
      if (op.weight_scale) sum *= op.weight_scale.ptr<float>()[o + r];
      if (op.bias) sum += op.bias.ptr<float>()[o + r];
      op.y.row<Y>(first + t)[o + r] = static_cast<Y>(sum);
    }
}

template <int kRows, int kTokens, class W, class Y>
void run_rows(const Linear& op, const Tensor& wide, int64_t o) {
  const int64_t tokens = op.y.shape[0];
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens) run_tile<kRows, kTokens, W, Y>(op, wide, t, o);
  if constexpr (kTokens > 1)
    for (; t < tokens; ++t) run_tile<kRows, 1, W, Y>(op, wide, t, o);
}

template <int kRows, int kTokens, class W, class Y>
void run_range(const Linear& op, const Tensor& wide, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kRows <= end; o += kRows) run_rows<kRows, kTokens, W, Y>(op, wide, o);
  for (; o < end; ++o) run_rows<1, kTokens, W, Y>(op, wide, o);
}

// One block of tokens. The tile is as large as the registers allow: 16 sums with AVX-512, else 8.
template <class W, class Y>
void run_block(Context& ctx, const Linear& op, const Tensor& wide) {
  constexpr int kPairs = kLanes >= 16 ? 8 : 4;
  const int64_t tokens = op.y.shape[0];
  parallel_ranges(ctx.threads(), op.weight.shape[0], 8, [&](int64_t begin, int64_t end) HWY_ATTR {
    if (tokens >= kPairs) return run_range<1, kPairs, W, Y>(op, wide, begin, end);
    if (tokens >= 4) return run_range<kPairs / 4, 4, W, Y>(op, wide, begin, end);
    if (tokens >= 2) return run_range<kPairs / 2, 2, W, Y>(op, wide, begin, end);
    run_range<kPairs, 1, W, Y>(op, wide, begin, end);
  });
}

template <class T, class Y>
void run(Context& ctx, const Linear& op) {
  const int64_t tokens = op.x.shape[0], padded = (op.x.shape[1] + kStep - 1) / kStep * kStep;
  for (int64_t begin = 0; begin < tokens; begin += kBlock) {
    const int64_t end = std::min(tokens, begin + kBlock);
    const Arena::Scope scope(ctx.workspace());
    Linear block = op;
    block.x = op.x.slice(0, begin, end);
    block.y = op.y.slice(0, begin, end);
    const Tensor wide = ctx.workspace().tensor(DType::f32, {end - begin, padded});
    widen<T>(block.x, wide);
    if (op.weight.dtype == DType::i8)
      run_block<int8_t, Y>(ctx, block, wide);
    else
      run_block<T, Y>(ctx, block, wide);
  }
}

void matvec(Context& ctx, const Linear& op) {
  dispatch_f32_bf16(op.x.dtype, [&](auto t) HWY_ATTR {
    dispatch_f32_bf16(op.y.dtype, [&](auto y) HWY_ATTR {
      run<typename decltype(t)::type, typename decltype(y)::type>(ctx, op);
    });
  });
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {
HWY_EXPORT(matvec);
}

namespace krait::cpu {

void linear_fwd_matvec(Context& ctx, const Linear& op) { HWY_DYNAMIC_DISPATCH(matvec)(ctx, op); }

}  // namespace krait::cpu
#endif
