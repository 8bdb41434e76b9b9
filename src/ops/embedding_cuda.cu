// Embedding on a GPU. The gradient sorts the tokens by id, keeping their order, and then adds up
// runs of equal ids in pieces of fixed size: no atomics, and a frequent id is no bottleneck.
#include <cub/device/device_radix_sort.cuh>

#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/embedding_plan.h"

namespace krait::cuda {
namespace {

// Grid: a thread owns V columns of a token. Moves a row of weight and of y to each token.
template <int V, class T, class Y>
__global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_fwd_gather(const int32_t* token, const T* weight, Y* y, const int64_t weight_stride,
                         const int64_t y_stride, const int64_t tokens, const int64_t d_model) {
  const int64_t vectors = d_model / V;
  const int64_t id = int64_t{blockIdx.x} * kEmbeddingThreads + threadIdx.x;
  if (id >= tokens * vectors) return;
  const int64_t t = id / vectors, i = id % vectors * V;
  store_vector(y + t * y_stride + i, load_vector<V>(weight + token[t] * weight_stride + i));
}

__global__ void embedding_bwd_number(int32_t* position, const int64_t tokens) {
  const int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (t < tokens) position[t] = static_cast<int32_t>(t);
}

template <class Y>
struct EmbeddingSums {
  const int32_t *token, *position;  // (tokens) sorted by token, then by position
  const Y* dy;
  float* dweight;
  float* open;  // (pieces, 2, d_model): sums of runs that cross a piece's front [0] or only its
                // back [1]
  int64_t dy_stride, dweight_stride;
  int64_t tokens, d_model;

  // Is sorted place i of the same token as the one before it?
  __device__ bool continues(int64_t i) const {
    return i > 0 && i < tokens && token[i] == token[i - 1];
  }
  __device__ float* open_sums(int64_t piece, bool front) const {
    return open + (2 * piece + (front ? 0 : 1)) * d_model;
  }
};

template <int V>
__device__ void add_to(float* to, const Floats<V>& x) {
  Floats<V> sum = load_vector<V>(to);
#pragma unroll
  for (int k = 0; k < V; ++k) sum[k] += x[k];
  store_vector(to, sum);
}

// Grid: pieces x column_blocks, a thread owns V columns of a piece and walks it in order. Moves dy
// once, dweight's rows in and out once for each token that occurs, and 8 bytes a column and piece
// for runs that cross pieces. H200, all kernels, 65536 x 768 in bf16: 0.154 ms with 50280 ids (50 %
// of 4.25 TB/s), 0.077 ms with 256 (31 %), of which sorting takes about 0.04.
template <int V, class Y>
__global__ void embedding_bwd_pieces(const EmbeddingSums<Y> op) {
  constexpr int kTogether = 8;  // rows of dy in flight
  const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (column >= op.d_model) return;
  const int64_t piece = blockIdx.x, begin = piece * kEmbeddingPiece;
  const int64_t end = min(begin + kEmbeddingPiece, op.tokens);
  bool front_open = op.continues(begin);
  int32_t current = op.token[begin];
  Floats<V> sum = constant<V>(0);
  const auto finish_run = [&](bool back_open) {
    if (front_open || back_open) {
      store_vector(op.open_sums(piece, front_open) + column, sum);
    } else {
      add_to(op.dweight + current * op.dweight_stride + column, sum);
    }
    front_open = false;
    sum = constant<V>(0);
  };
  for (int64_t i = begin; i < end; i += kTogether) {
    Packed<Y, V> dy[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u)
      if (i + u < end) dy[u] = load_packed<V>(op.dy + op.position[i + u] * op.dy_stride + column);
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (i + u >= end) break;
      if (const int32_t next = op.token[i + u]; next != current) {
        finish_run(false);
        current = next;
      }
      const Floats<V> x = unpack(dy[u]);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += x[k];
    }
  }
  finish_run(op.continues(end));
}

// Grid: pieces x column_blocks of 32 V columns. Of a run that begins in this block's piece and goes
// on past it: adds up what its pieces gave, every 8th to a row of threads, then the rows in order.
template <int V, class Y>
__global__ void __launch_bounds__(32 * kEmbeddingCombineRows)
    embedding_bwd_combine(const EmbeddingSums<Y> op) {
  __shared__ float rows[kEmbeddingCombineRows][32 * V];
  const int64_t piece = blockIdx.x, begin = piece * kEmbeddingPiece;
  const int64_t end = begin + kEmbeddingPiece;
  if (!op.continues(end)) return;
  const int32_t token = op.token[end];
  if (op.token[begin] == token && op.continues(begin)) return;  // it began earlier
  int64_t low = end, high = op.tokens;  // token[low] is the run's, token[high] is not
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (op.token[middle] == token ? low : high) = middle;
  }
  const int64_t last = low / kEmbeddingPiece;
  const int64_t column = (int64_t{blockIdx.y} * 32 + threadIdx.x) * V;
  Floats<V> sum = constant<V>(0);
  if (column < op.d_model) {
#pragma unroll 4
    for (int64_t p = piece + threadIdx.y; p <= last; p += kEmbeddingCombineRows) {
      const Floats<V> x = load_vector<V>(op.open_sums(p, p > piece) + column);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += x[k];
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) rows[threadIdx.y][k * 32 + threadIdx.x] = sum[k];
  __syncthreads();  // every row's sums are there
  if (threadIdx.y > 0 || column >= op.d_model) return;
  for (int row = 1; row < kEmbeddingCombineRows; ++row)
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += rows[row][k * 32 + threadIdx.x];
  add_to(op.dweight + token * op.dweight_stride + column, sum);
}

bool vectors(std::initializer_list<const Tensor*> tensors) {
  return std::ranges::all_of(tensors, [](auto t) { return vector_rows(*t, kEmbeddingVector); });
}

struct Sorted {
  const int32_t *token, *position;
};

// The tokens by id, equal ones by position.
Sorted sort_tokens(Context& ctx, const Tensor& tokens, int key_bits) {
  const cudaStream_t stream = state_of(ctx).stream;
  const int64_t count = tokens.shape[0];
  Arena& workspace = ctx.workspace();
  int32_t* const number = workspace.array<int32_t>(count);
  int32_t* const token = workspace.array<int32_t>(count);
  int32_t* const position = workspace.array<int32_t>(count);
  constexpr unsigned kThreads = kEmbeddingThreads;
  embedding_bwd_number<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0,
                         stream>>>(number, count);
  check_launch("embedding_bwd_number");
  const auto* const in = reinterpret_cast<const uint32_t*>(tokens.ptr<int32_t>());
  const auto sort = [&](void* scratch, size_t& bytes) {
    check(cub::DeviceRadixSort::SortPairs(scratch, bytes, in, reinterpret_cast<uint32_t*>(token),
                                          number, position, static_cast<int>(count), 0, key_bits,
                                          stream),
          "sorting tokens");
  };
  size_t bytes = 0;
  sort(nullptr, bytes);
  sort(workspace.allocate(bytes), bytes);
  return {token, position};
}

}  // namespace

void embedding_fwd(Context& ctx, const Embedding& op) {
  const int64_t tokens = op.y.shape[0], d_model = op.y.shape[1];
  if (tokens == 0 || d_model == 0) return;
  const auto launch = [&]<int V, class T, class Y>() {
    const EmbeddingPlan plan = plan_embedding(tokens, op.weight.shape[0], d_model, V);
    embedding_fwd_gather<V>
        <<<static_cast<unsigned>(plan.fwd_blocks), kEmbeddingThreads, 0, state_of(ctx).stream>>>(
            op.tokens.ptr<int32_t>(), op.weight.ptr<T>(), op.y.ptr<Y>(), op.weight.stride[0],
            op.y.stride[0], tokens, d_model);
    check_launch("embedding_fwd_gather");
  };
  const bool fast = vectors({&op.weight, &op.y});
  dispatch_f32_bf16(op.y.dtype, [&](auto y) {
    using Y = typename decltype(y)::type;
    if (op.weight.dtype == DType::bf16) {
      fast ? launch.template operator()<kEmbeddingVector, bf16, Y>()
           : launch.template operator()<1, bf16, Y>();
    } else if constexpr (std::is_same_v<Y, float>) {
      fast ? launch.template operator()<kEmbeddingVector, float, Y>()
           : launch.template operator()<1, float, Y>();
    }
  });
}

void embedding_bwd(Context& ctx, const Embedding& op, const EmbeddingGrad& grad) {
  const int64_t tokens = grad.dy.shape[0], d_model = grad.dy.shape[1];
  if (tokens == 0 || d_model == 0) return;
  const cudaStream_t stream = state_of(ctx).stream;
  const Arena::Scope scope(ctx.workspace());
  const auto launch = [&]<int V, class Y>() {
    const EmbeddingPlan plan = plan_embedding(tokens, grad.dweight.shape[0], d_model, V);
    const Sorted sorted = sort_tokens(ctx, op.tokens, plan.key_bits);
    const EmbeddingSums<Y> args = {.token = sorted.token,
                                   .position = sorted.position,
                                   .dy = grad.dy.ptr<Y>(),
                                   .dweight = grad.dweight.ptr<float>(),
                                   .open = ctx.workspace().array<float>(2 * plan.pieces * d_model),
                                   .dy_stride = grad.dy.stride[0],
                                   .dweight_stride = grad.dweight.stride[0],
                                   .tokens = tokens,
                                   .d_model = d_model};
    const auto pieces = static_cast<unsigned>(plan.pieces);
    embedding_bwd_pieces<V>
        <<<dim3(pieces, static_cast<unsigned>(plan.column_blocks)), plan.columns, 0, stream>>>(
            args);
    check_launch("embedding_bwd_pieces");
    const auto column_blocks = static_cast<unsigned>((d_model + 32 * V - 1) / (32 * V));
    embedding_bwd_combine<V>
        <<<dim3(pieces, column_blocks), dim3(32, kEmbeddingCombineRows), 0, stream>>>(args);
    check_launch("embedding_bwd_combine");
  };
  const bool fast = vectors({&grad.dy, &grad.dweight});
  dispatch_f32_bf16(grad.dy.dtype, [&](auto y) {
    using Y = typename decltype(y)::type;
    fast ? launch.template operator()<kEmbeddingVector, Y>() : launch.template operator()<1, Y>();
  });
}

}  // namespace krait::cuda
