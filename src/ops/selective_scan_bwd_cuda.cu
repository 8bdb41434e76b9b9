// The selective scan's backward pass on a GPU: the walk through time, and the sums of what blocks
// leave. selective_scan_bwd_block.cuh has what a block does with a tile. The shapes of models go to
// selective_scan_bwd_streams_cuda.cu; this is for every other.
#include "ops/cuda/arguments.h"
#include "ops/cuda/partial_sums.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector_access.h"
#include "ops/selective_scan_bwd_block.cuh"
#include "ops/selective_scan_bwd_streams.h"

namespace krait::cuda {
namespace {

using namespace scan_bwd;

template <class T, bool kCarryOnly>
__device__ void walk(Block<T>& block, const Piece& p) {
  const Args<T>& a = block.a;
  const int rounds = block.rounds();
  block.many = p.many;
  block.t0 = p.begin + (p.end - p.begin - 1) / kTile * kTile;
  block.round = block.stage = 0;
  block.begin_piece(p, kCarryOnly);
  if (a.stages > 1) block.fetch(p, 0, block.t0, 0);
  while (block.t0 >= p.begin) {
    block.tokens = min(kTile, p.end - block.t0);
    if (a.stages == 1) {
      __syncthreads();  // the tile has been stored
      block.fetch(p, 0, block.t0, block.round);
    }
    copies_wait();
    if (block.round == 0 && a.padded_states == kBlockStates) {
      if (a.vector_bc)
        block.unpack_bc(block.stage);
      else
        block.load_bc(0);
    }
    __syncthreads();  // inputs, B and C are there; the other stage and the parts are free
    const bool tile_ends = block.round + 1 == rounds;
    const int next_t0 = tile_ends ? block.t0 - kTile : block.t0;
    const int next_round = tile_ends ? 0 : block.round + 1;
    if (a.stages > 1 && next_t0 >= p.begin) block.fetch(p, block.stage ^ 1, next_t0, next_round);
    if constexpr (kCarryOnly) {
      block.unit_carry();
      __syncthreads();  // B and C are no longer in use
    } else {
      block.unit_gradients();
      const bool boundary = (block.t0 - p.seq_begin) % kSegment == 0;
      if (boundary && tile_ends && !a.cut && block.t0 > p.seq_begin) block.next_segment();
    }
    block.t0 = next_t0, block.round = next_round;
    if (a.stages > 1) block.stage ^= 1;
  }
  block.end_piece(p, kCarryOnly);
}

// Grid: plan.blocks x plan.walkers; a block owns the channels of its units, and walks every
// walkers-th sequence (or segment) backwards in time, tile by tile, unit by unit. kCarryOnly: only
// what a segment gives back from zero. On chip: scan_bwd_shared(), and 255 registers a thread.
// Moves u, dt, z, dy in and du, ddt, dz, y out once, saved states (1 byte an element at d_state
// 16), and dB, dC of blocks (4 or 8 bytes an element, written here and read once). Sums in f32,
// exp within 2 ulp. One H200, bf16: (32, 1536, 2048, 16) in 3.66 ms, 27.5 G elements/s: half of the
// issue slots (about 550 instructions an element) and two thirds of shared memory's bandwidth.
template <class T, bool kCarryOnly>
__global__ void __launch_bounds__(kScanBwdThreads, kScanBwdBlocksPerMultiprocessor)
    selective_scan_bwd_tiles(const __grid_constant__ Args<T> a) {
  extern __shared__ char memory[];
  Block<T> block(a, memory);
  block.begin();
  for (int64_t index = blockIdx.y; index < a.pieces; index += gridDim.y) {
    Piece p;
    if (!find_piece(a, index, p)) continue;
    if (kCarryOnly && (p.first || !p.many)) continue;
    walk<T, kCarryOnly>(block, p);
  }
  if constexpr (!kCarryOnly) block.end();
}

// From what segments give back from zero to what flows into them from behind, in place. Grid: a
// thread for each (channel, state) of a sequence.
template <class T>
__global__ void __launch_bounds__(kScanBwdChainThreads)
    selective_scan_bwd_chain(const __grid_constant__ Args<T> a, int64_t blocks_per_sequence) {
  const int sequence = static_cast<int>(blockIdx.x / blocks_per_sequence);
  const int64_t plane = int64_t{a.d_inner} * a.d_state;
  const int64_t i = blockIdx.x % blocks_per_sequence * blockDim.x + threadIdx.x;
  const int64_t begin = a.seq_start[sequence], length = a.seq_start[sequence + 1] - begin;
  if (i >= plane || length <= kScanBwdSegment) return;
  const int64_t slot = segment_slot(begin, sequence);
  float* behind = a.behind + slot * plane + i;
  const float* sums = a.delta_sums + slot * a.d_inner + i / a.d_state;
  const float A = a.A[i] * kLog2E;
  float x = 0;
  if (a.dstate) x = a.dstate[(a.slot ? a.slot[sequence] : sequence) * plane + i];
  constexpr int kAhead = 8;  // segments whose loads are under way at once
  for (int64_t last = (length - 1) / kScanBwdSegment; last >= 0; last -= kAhead) {
    float zero[kAhead], decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t j = last - k;
      zero[k] = j > 0 ? behind[j * plane] : 0.f;
      decay[k] = j > 0 ? exp2_approx(A * sums[j * a.d_inner]) : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (last - k < 0) break;
      behind[(last - k) * plane] = x;
      x = fmaf(decay[k], x, zero[k]);
    }
  }
}

struct Partial {
  const float* partial;  // (groups * group_blocks, tokens, d_state)
  int64_t tokens;
  int groups, group_blocks, blocks_per_pair, d_state;
};

// dB or dC from the blocks' sums: within a pair of units, then over pairs. Grid: a thread for V
// states of a token and group.
template <class T, int V>
__global__ void __launch_bounds__(256)
    selective_scan_bwd_add_blocks(const Partial p, T* out, int64_t row, int64_t group_stride) {
  const int columns = p.d_state / V;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= p.tokens * p.groups * columns) return;
  const int n = static_cast<int>(i % columns) * V;
  const int64_t t = i / columns / p.groups;
  const int group = static_cast<int>(i / columns % p.groups);
  const int64_t plane = p.tokens * p.d_state;
  const float* from = p.partial + group * p.group_blocks * plane + t * p.d_state + n;
  Floats<V> sum = constant<V>(0);
  for (int pair = 0; pair < p.group_blocks; pair += p.blocks_per_pair) {
    Floats<V> inner = constant<V>(0);
#pragma unroll 4
    for (int b = pair; b < min(pair + p.blocks_per_pair, p.group_blocks); ++b) {
      const Floats<V> x = load_vector<V>(from + b * plane);
#pragma unroll
      for (int k = 0; k < V; ++k) inner[k] += x[k];
    }
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += inner[k];
  }
  store_vector(out + t * row + group * group_stride + n, sum);
}

template <class T>
void add_blocks(const Partial& p, const Tensor& out, cudaStream_t stream) {
  const auto launch = [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const int64_t threads = p.tokens * p.groups * (p.d_state / V);
    selective_scan_bwd_add_blocks<T, V>
        <<<static_cast<unsigned>((threads + 255) / 256), 256, 0, stream>>>(
            p, out.ptr<T>(), out.stride[0], out.stride[1]);
    check_launch("selective_scan_bwd_add_blocks");
  };
  if (p.d_state % 4 == 0 && vector_rows(out, 4))
    launch(std::integral_constant<int, 4>{});
  else
    launch(std::integral_constant<int, 1>{});
}

struct AddTo {
  float *first, *second;  // null: not wanted
  int64_t count;          // of each
  __device__ void operator()(int64_t i, float sum) const {
    float* to = i < count ? first : second;
    if (to) to[i < count ? i : i - count] += sum;
  }
};

template <class T>
Args<T> arguments(const SelectiveScan& op, const SelectiveScanGrad& grad) {
  Args<T> a{};
  const auto bind = [](const Tensor& t, auto*& p, int64_t& row) {
    p = t ? t.ptr<T>() : nullptr;
    row = t ? t.stride[0] : 0;
  };
  bind(op.u, a.u, a.u_row), bind(op.dt, a.dt, a.dt_row), bind(op.z, a.z, a.z_row);
  bind(op.B, a.B, a.B_row), bind(op.C, a.C, a.C_row), bind(grad.dy, a.dy, a.dy_row);
  bind(grad.du, a.du, a.du_row), bind(grad.ddt, a.ddt, a.ddt_row);
  bind(grad.dz, a.dz, a.dz_row), bind(grad.y, a.y, a.y_row);
  a.B_group = op.B.stride[1], a.C_group = op.C.stride[1];
  a.A = f32(op.A), a.D = f32(op.D), a.dt_bias = f32(op.dt_bias);
  a.state = f32(op.state), a.saved = f32(op.saved), a.dstate = f32(grad.dstate);
  a.seq_start = op.seq_start.ptr<int32_t>();
  a.slot = i32(op.slot);
  a.tokens = op.u.shape[0];
  a.num_seqs = static_cast<int>(op.seq_start.shape[0] - 1);
  a.d_inner = static_cast<int>(op.u.shape[1]), a.d_state = static_cast<int>(op.A.shape[1]);
  a.group_channels = static_cast<int>(op.u.shape[1] / op.B.shape[1]);
  a.vector_rows = a.group_channels % 4 == 0;
  for (const Tensor* t : {&op.u, &op.dt, &op.z, &grad.dy, &grad.du, &grad.ddt, &grad.dz, &grad.y})
    a.vector_rows = a.vector_rows && vector_rows(*t, 4);
  a.vector_bc = vector_rows(op.B, 4) && vector_rows(op.C, 4);
  a.vector_states = a.d_state % kBlockStates == 0 && aligned(a.state) && aligned(a.saved);
  return a;
}

template <class T>
void launch(Context& ctx, const SelectiveScan& op, const SelectiveScanGrad& grad) {
  State& gpu = state_of(ctx);
  Args<T> a = arguments<T>(op, grad);
  const int groups = static_cast<int>(op.B.shape[1]);
  const ScanBwdPlan plan =
      plan_selective_scan_bwd({a.tokens, a.num_seqs, a.d_inner, a.d_state, groups, sizeof(T)},
                              {gpu.multiprocessors, gpu.shared_bytes_per_block});
  a.padded_states = plan.padded_states, a.group_blocks = static_cast<int>(plan.group_blocks);
  a.rounds = plan.rounds, a.stages = plan.stages;
  a.pieces = plan.pieces, a.cut = plan.cut;

  Arena& work = ctx.workspace();
  const int64_t plane = int64_t{a.d_inner} * a.d_state;
  const int64_t partial = plan.blocks * a.tokens * a.d_state;
  a.dB = work.array<float>(partial), a.dC = work.array<float>(partial);
  a.dA = work.array<float>(plan.walkers * plane);
  a.dD_dbias = work.array<float>(plan.walkers * 2 * a.d_inner);
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.walkers));
  const auto run_tiles = [&](auto kernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(plan.shared_bytes)),
          "preparing selective_scan_bwd_tiles");
    kernel<<<grid, kScanBwdThreads, plan.shared_bytes, gpu.stream>>>(a);
    check_launch("selective_scan_bwd_tiles");
  };
  if (plan.cut) {
    a.behind = work.array<float>(plan.pieces * plane);
    a.delta_sums = work.array<float>(plan.pieces * a.d_inner);
    run_tiles(selective_scan_bwd_tiles<T, true>);
    selective_scan_bwd_chain<<<static_cast<unsigned>(plan.chain_blocks), kScanBwdChainThreads, 0,
                               gpu.stream>>>(a, plan.chain_blocks / a.num_seqs);
    check_launch("selective_scan_bwd_chain");
  }
  run_tiles(selective_scan_bwd_tiles<T, false>);

  Partial sums = {.partial = a.dB,
                  .tokens = a.tokens,
                  .groups = groups,
                  .group_blocks = a.group_blocks,
                  .blocks_per_pair = kScanBwdPair / plan.rounds,
                  .d_state = a.d_state};
  add_blocks<T>(sums, grad.dB, gpu.stream);
  sums.partial = a.dC;
  add_blocks<T>(sums, grad.dC, gpu.stream);
  launch_add_partial_sums(gpu.stream, a.dA, plan.walkers, plane,
                          AddTo{f32(grad.dA), nullptr, plane});
  launch_add_partial_sums(gpu.stream, a.dD_dbias, plan.walkers, int64_t{2} * a.d_inner,
                          AddTo{f32(grad.dD), f32(grad.ddt_bias), a.d_inner});
}

}  // namespace

void selective_scan_bwd(Context& ctx, const SelectiveScan& op, const SelectiveScanGrad& grad) {
  const Arena::Scope scope(ctx.workspace());
  SelectiveScan with_saved = op;
  if (!op.saved) {
    const int64_t size = op.u.shape[0] / kScanChunk * op.u.shape[1] * op.A.shape[1];
    with_saved.saved = ctx.workspace().tensor(DType::f32, {size});
    with_saved.y = Tensor();
    if (size > 0) cuda::selective_scan_fwd(ctx, with_saved);
  }
  if (scan_streams_apply(with_saved, grad, state_of(ctx).shared_bytes_per_block))
    return selective_scan_bwd_streams(ctx, with_saved, grad);
  dispatch_f32_bf16(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch<T>(ctx, with_saved, grad);
  });
}

}  // namespace krait::cuda
