#include <cfloat>

#include "ops/cross_entropy_rows.h"
#include "ops/cuda/math.cuh"
#include "ops/cuda/vector.cuh"

namespace krait::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWidth = CrossEntropyPlan::kWidth;  // elements of a vector access

struct MaxSum {
  float max, sum;  // sum of exp(logit - max); nothing yet: -FLT_MAX, 0
};

__device__ float exp_above(float logit, float max) { return exp2_approx((logit - max) * kLog2E); }

// Over the lanes of a warp, in fixed order; every lane gets the result.
__device__ MaxSum reduce_warp(MaxSum x) {
  float max = x.max;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
  float sum = x.sum * exp_above(x.max, max);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return {max, sum};
}

// Over the kGroup threads of a row. of_warp has room for every warp, and is free to be written.
template <int kGroup>
__device__ MaxSum reduce(MaxSum x, MaxSum* of_warp) {
  x = reduce_warp(x);
  if constexpr (kGroup > kWarp) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();  // every warp's result is there
    x = reduce_warp(lane < kGroup / kWarp ? of_warp[lane] : MaxSum{-FLT_MAX, 0});
  }
  return x;
}

// Elements of a row from `column` on, -FLT_MAX beyond its end.
struct Piece {
  Floats<kWidth> x;

  __device__ Piece() : x(constant<kWidth>(-FLT_MAX)) {}
  __device__ Piece(const float* from, int column, int vocab_size) : x(load_vector<kWidth>(from)) {
    if (column + kWidth <= vocab_size) return;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (column + j >= vocab_size) x[j] = -FLT_MAX;
  }
};

// Adds pieces, the absent ones of which are -FLT_MAX, to the running maximum and sum.
template <int kPieces>
__device__ void add(MaxSum& total, const Piece (&piece)[kPieces]) {
  float max = total.max;
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
#pragma unroll
    for (int j = 0; j < kWidth; ++j) max = fmaxf(max, piece[i].x[j]);
  float sum = total.sum * exp_above(total.max, max);
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      sum += piece[i].x[j] == -FLT_MAX ? 0.0f : exp_above(piece[i].x[j], max);
  total = {max, sum};
}

// What the gradient of a row needs to know: dlogit = scale (exp(logit - max) / sum - [target]).
struct RowGradient {
  float max, inverse, factor, scale;
  int target;

  __device__ RowGradient(MaxSum norm, float scale_, int target_)
      : max(norm.max),
        inverse(1 / norm.sum),
        factor(scale_ / norm.sum),
        scale(scale_),
        target(target_) {}

  template <class T>
  __device__ void write(T* to, int column, Floats<kWidth> logits) const {
    Floats<kWidth> out = constant<kWidth>(0);
    if (target >= 0) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float e = exp_above(logits[j], max);
        out[j] = column + j == target ? fmaf(e, inverse, -1.0f) * scale : e * factor;
      }
    }
    store_vector(to + column, out);  // the row's pitch has room for the last one
  }
};

__device__ float target_logit(const float* row, int target, int vocab_size) {
  if (target < 0) return 0;
  return target < vocab_size ? row[target] : __int_as_float(0x7fffffff);
}

__device__ float loss_of(MaxSum norm, float logit, int target) {
  return target < 0 ? 0 : logf(norm.sum) + (norm.max - logit);
}

// Grid: rows, blockDim / kGroup of them to a block; kGroup threads own a row. On chip: nothing but
// kVectors vectors in flight. Reads the logits, and a second time for the gradient: 4 bytes an
// element, then 8 and what it writes.
template <class T, int kGroup, bool kGradient>
__global__ void __launch_bounds__(kGroup > 256 ? kGroup : 256)
    cross_entropy_rows_direct(LogitRows rows) {
  constexpr int kVectors = 4, kSpan = kGroup * kWidth;
  __shared__ MaxSum of_warp[kGroup / kWarp];
  const int64_t t = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kGroup;
  if (t >= rows.count) return;  // whole warps, where a block has several rows
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  float* row = rows.logits + t * rows.pitch;
  const int target = rows.targets[t];
  const float logit = lane == 0 ? target_logit(row, target, rows.vocab_size) : 0;
  MaxSum total{-FLT_MAX, 0};
  for (int begin = lane * kWidth; begin < rows.vocab_size; begin += kVectors * kSpan) {
    Piece piece[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (const int column = begin + i * kSpan; column < rows.vocab_size)
        piece[i] = Piece(row + column, column, rows.vocab_size);
    add(total, piece);
  }
  const MaxSum norm = reduce<kGroup>(total, of_warp);
  if (lane == 0) rows.loss[t] = loss_of(norm, logit, target);
  if constexpr (kGradient) {
    const RowGradient gradient(norm, rows.scale, target);
    for (int first = 0; first < rows.vocab_size; first += kVectors * kSpan) {
      Floats<kWidth> x[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (const int column = first + lane * kWidth + i * kSpan; column < rows.vocab_size)
          x[i] = load_vector<kWidth>(row + column);
      // A bf16 gradient covers logits up to the middle of these: now every thread has read them.
      if constexpr (kGroup > kWarp) __syncthreads();
      if constexpr (kGroup == kWarp) __syncwarp();
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (const int column = first + lane * kWidth + i * kSpan; column < rows.vocab_size)
          gradient.write(reinterpret_cast<T*>(row), column, x[i]);
    }
  }
}

__device__ void copy_to_shared(float* to, const float* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

__device__ void end_batch_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all batches of copies but the kPending latest of this thread have arrived.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// body(std::integral_constant<int, i>) for i = 0 .. kCount - 1.
template <int kCount, int kFirst = 0, class F>
__device__ __forceinline__ void for_each_index(F&& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>{});
    for_each_index<kCount, kFirst + 1>(body);
  }
}

// A thread's columns of one row in shared memory: vector k is staged[k][thread], so that a thread
// reads what it has copied itself, and copies need no barrier.
template <int kThreads>
struct Stage {
  static constexpr int kPerBatch = CrossEntropyPlan::kVectorsPerBatch;
  float* staged;  // (vectors, kThreads, kWidth)
  int vectors, vocab_size;

  __device__ static int column_of(int k) {
    return (k * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
  }
  __device__ bool has(int k) const { return k < vectors && column_of(k) < vocab_size; }
  __device__ float* at(int k) const { return staged + column_of(k); }

  __device__ void copy_batch(const float* row, int batch) const {
#pragma unroll
    for (int i = 0; i < kPerBatch; ++i)
      if (const int k = batch * kPerBatch + i; has(k)) copy_to_shared(at(k), row + column_of(k));
  }
  __device__ void add_batch(MaxSum& total, int batch) const {
    Piece piece[kPerBatch];
#pragma unroll
    for (int i = 0; i < kPerBatch; ++i)
      if (const int k = batch * kPerBatch + i; has(k))
        piece[i] = Piece(at(k), column_of(k), vocab_size);
    add(total, piece);
  }
  template <class T>
  __device__ void write_batch(const RowGradient& gradient, T* to, int batch) const {
#pragma unroll
    for (int i = 0; i < kPerBatch; ++i)
      if (const int k = batch * kPerBatch + i; has(k))
        gradient.write(to, column_of(k), load_vector<kWidth>(at(k)));
  }
};

// Grid: as many blocks as fit on the GPU; a block takes every gridDim-th row. On chip: one row of
// logits in shared memory (up to 57344 floats), copied in kBatches batches. As soon as a batch has
// been used for the last time its place is filled from the next row, so that reading goes on while
// the gradient is written. Moves every logit once and every gradient once: 4 + 2 bytes an element
// in bf16. Numerics: exp2 with an argument rounded once; running sums per thread, then a tree.
template <class T, int kThreads, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    cross_entropy_rows_staged(LogitRows rows, int vectors) {
  constexpr int kBatches = CrossEntropyPlan::kBatches;
  extern __shared__ __align__(16) float staged[];
  __shared__ MaxSum
      of_warp[2][kThreads / kWarp];  // of even and odd rows: one barrier a row is enough
  const Stage<kThreads> stage{staged, vectors, rows.vocab_size};
  const auto copy_batch = [&](int64_t t, int batch) {
    if (t < rows.count) stage.copy_batch(rows.logits + t * rows.pitch, batch);
    end_batch_of_copies();
  };
  for (int batch = 0; batch < kBatches; ++batch) copy_batch(blockIdx.x, batch);
  int parity = 0;
  for (int64_t t = blockIdx.x; t < rows.count; t += gridDim.x, parity ^= 1) {
    float* row = rows.logits + t * rows.pitch;
    const int target = rows.targets[t];
    const float logit = threadIdx.x == 0 ? target_logit(row, target, rows.vocab_size) : 0;
    MaxSum total{-FLT_MAX, 0};
    for_each_index<kBatches>([&](auto batch) {
      wait_for_copies<kGradient ? kBatches - 1 - batch.value : kBatches - 1>();
      stage.add_batch(total, batch.value);
      if constexpr (!kGradient) copy_batch(t + gridDim.x, batch.value);
    });
    const MaxSum norm = reduce<kThreads>(total, of_warp[parity]);
    if (threadIdx.x == 0) rows.loss[t] = loss_of(norm, logit, target);
    if constexpr (kGradient) {
      // The barrier in reduce: every thread has its part of the row, which is now overwritten.
      const RowGradient gradient(norm, rows.scale, target);
      for_each_index<kBatches>([&](auto batch) {
        stage.write_batch(gradient, reinterpret_cast<T*>(row), batch.value);
        copy_batch(t + gridDim.x, batch.value);
      });
    }
  }
}

template <class T, int kThreads, bool kGradient>
void launch_staged(Context& ctx, const CrossEntropyPlan& plan, const LogitRows& rows) {
  const State& state = state_of(ctx);
  const auto kernel = cross_entropy_rows_staged<T, kThreads, kGradient>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes)),
        "asking for shared memory");
  const auto blocks = static_cast<unsigned>(plan.blocks(rows.count, state.multiprocessors));
  kernel<<<blocks, kThreads, plan.shared_bytes, state.stream>>>(rows, plan.vectors);
  check_launch("cross_entropy_rows_staged");
}

template <class T, bool kGradient>
void launch(Context& ctx, const CrossEntropyPlan& plan, const LogitRows& rows) {
  using Plan = CrossEntropyPlan;
  if (plan.rows == CrossEntropyRows::staged) {
    if (plan.threads == Plan::kSmallBlock)
      return launch_staged<T, Plan::kSmallBlock, kGradient>(ctx, plan, rows);
    return launch_staged<T, Plan::kLargeBlock, kGradient>(ctx, plan, rows);
  }
  const State& state = state_of(ctx);
  const auto blocks = static_cast<unsigned>(plan.blocks(rows.count, state.multiprocessors));
  const auto threads = static_cast<unsigned>(plan.threads);
  if (plan.rows == CrossEntropyRows::warp)
    cross_entropy_rows_direct<T, kWarp, kGradient><<<blocks, threads, 0, state.stream>>>(rows);
  else
    cross_entropy_rows_direct<T, Plan::kLargeBlock, kGradient>
        <<<blocks, threads, 0, state.stream>>>(rows);
  check_launch("cross_entropy_rows_direct");
}

}  // namespace

void launch_losses(Context& ctx, const CrossEntropyPlan& plan, const LogitRows& rows) {
  launch<float, false>(ctx, plan, rows);
}

void launch_losses_and_gradients(Context& ctx, const CrossEntropyPlan& plan, const LogitRows& rows,
                                 DType T) {
  dispatch_f32_bf16(T, [&](auto t) { launch<typename decltype(t)::type, true>(ctx, plan, rows); });
}

}  // namespace krait::cuda
