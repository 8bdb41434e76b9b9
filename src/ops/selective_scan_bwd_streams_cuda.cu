// The selective scan's backward pass for bf16: 16 states and up to 64 channels at a time, or 16
// channels and up to 128 states.
//
// A block walks a piece of a sequence from its end to its start, each warp with 16 channels; lane =
// pair of channels * 4 + quad of states, and what flows back (the carry) stays in registers. Of
// each tile of 64 tokens it scans forward once more from the state that the forward pass saved,
// keeping the states before every eighth token; then, eight tokens (a run) at a time from the last,
// it computes A_bar and h into registers (8 x 8 of each) and goes back over them, meanwhile
// computing most of the next run's A_bar.
//
// The lane layout is that of the tensor cores' operand A (rows: channels, columns: states), which
// do the sums that end in bf16 (tf32: 2^-11, below what bf16 rounds away): y is h times C, of whose
// 8 columns, one for each token of the run, the token's own is kept. dB and dC sum over channels,
// that is over rows: a product with the identity turns the values around, a second one adds them up
// into the token's column. q and w, whose sum over tokens is ddt_bias in f32, go through shared
// memory.
//
// With more states than 16 the warps of a block have the same channels and 16 states each: dB and
// dC are theirs alone, y, q and w sums over warps, too; everything else is done once for all of
// them, a channel of a token by one thread.
#include <type_traits>

#include "ops/cuda/arguments.h"
#include "ops/cuda/partial_sums.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector_access.h"
#include "ops/selective_scan_bwd_streams_block.cuh"
#include "ops/selective_scan_bwd_streams_wide.cuh"

namespace krait::cuda {
namespace {

using namespace scan_streams;

// Grid: plan.blocks x plan.walkers; a block has 64 (or 32) channels, or 16, and walks every
// walkers-th piece (or part). On chip, 16 states: for each warp rows of delta and delta u (9 KB),
// states before runs (8 KB), q and w of a run by lane (4 KB), what lanes keep (2 KB); for the block
// B and C of the tile (8 KB), dB and dC of two runs (8 KB): two blocks of four warps and 255
// registers a multiprocessor. 64 states: one set of rows (9 KB), B and C (32 KB), states (32 KB), q
// and w (16 KB): two blocks; 32 states: four of two warps, 128: one of eight. Moves 15 bytes an
// element, and sums of dB and dC: 4 bytes more with 16 states, 64 with 64. A barrier a tile, for B
// and C, and a run, for the sums over warps; where those are of q and w an mbarrier tells that they
// have been read. Sums in f32, those of y, dB and dC of values cut to tf32, whose mean error is
// taken out. On an H200 2.54 ms for all passes at (32, 1536, 2048, 16), 39.6 G elements/s: 408
// instructions an element, 2.2 a clock on a multiprocessor's 8 warps, where all issue slots would
// give 82; 1.66 ms at (8, 1024, 2048, 64), 10.1 G elements/s, 372 instructions for 16 states.
template <class Block>
__global__ void __launch_bounds__(Block::kThreads,
                                  32 * kScanStreamsWarpsPerMultiprocessor / Block::kThreads)
    selective_scan_bwd_streams_walk(const __grid_constant__ Args a) {
  extern __shared__ __align__(64) char memory[];
  Block block(a, *reinterpret_cast<typename Block::SharedMemory*>(memory));
  const int parts = a.part > 0 ? kPiece / a.part : 1;
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.y); index < a.whole + (a.pieces - a.whole) * parts;
       index += static_cast<int>(gridDim.y)) {
    const int cut = index - static_cast<int>(a.whole);  // the number among all parts
    Piece p;
    if (!find_piece(a, cut < 0 ? index : a.whole + cut / parts, p)) continue;
    if (cut >= 0 && !find_part(a, p, cut % parts)) continue;
    block.walk(p);
  }
  block.store_sums();
}

struct Sum {
  const float* partial;  // (groups * group_blocks, tokens, sums_row)
  bf16* out;
  int64_t row, group_stride;
};

// dB (grid.y 0) and dC (1) from the blocks' sums. A thread has four states of a token and group.
template <int kStates>
__global__ void __launch_bounds__(256)
    selective_scan_bwd_streams_add(const Sum dB, const Sum dC, int64_t tokens, int groups,
                                   int group_blocks) {
  const Sum& s = blockIdx.y ? dC : dB;
  constexpr int kQuads = kStates / 4, kRow = sums_row(kStates);
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= tokens * groups * kQuads) return;
  const int n = static_cast<int>(i % kQuads) * 4, group = static_cast<int>(i / kQuads % groups);
  const int64_t t = i / kQuads / groups;
  const float* from = s.partial + (group * group_blocks * tokens + t) * kRow + n;
  Floats<4> sum = constant<4>(0);
#pragma unroll 8
  for (int b = 0; b < group_blocks; ++b) {
    const Floats<4> x = load_vector<4>(from + b * tokens * kRow);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += x[k];
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[k] *= 1 + kCutToTf32;
  store_vector(s.out + t * s.row + group * s.group_stride + n, sum);
}

struct AddTo {
  float *first, *second;  // null: not wanted
  int64_t count;          // of each
  __device__ void operator()(int64_t i, float sum) const {
    float* to = i < count ? first : second;
    if (to) to[i < count ? i : i - count] += sum;
  }
};

Args arguments(const SelectiveScan& op, const SelectiveScanGrad& grad) {
  Args a{};
  const auto bind = [](const Tensor& t, auto*& p, uint32_t& row) {
    p = t ? t.ptr<bf16>() : nullptr;
    row = t ? static_cast<uint32_t>(t.stride[0] * 2) : 0;
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
  a.d_inner = static_cast<int>(op.u.shape[1]);
  a.d_state = static_cast<int>(op.A.shape[1]);
  a.plane = int64_t{a.d_inner} * a.d_state;
  a.group_channels = static_cast<int>(op.u.shape[1] / op.B.shape[1]);
  return a;
}

void allocate(Args& a, const ScanStreamsPlan& plan, Arena& work) {
  const int64_t plane = a.plane, sums = plan.blocks * a.tokens * a.d_state;
  a.pieces = plan.pieces, a.whole = plan.whole, a.part = static_cast<int>(plan.part);
  a.dB = work.array<float>(2 * sums);
  a.dC = a.dB + (sums_row(a.d_state) == a.d_state ? sums : a.d_state);
  a.dA = work.array<float>(plan.walkers * plane);
  a.dD_dbias = work.array<float>(plan.walkers * 2 * a.d_inner);
  if (plan.chain_blocks > 0) {
    a.behind = work.array<float>(plan.slots * plane);
    a.behind_last = work.array<float>(plan.slots * plane);
    a.delta_sums = work.array<float>(plan.slots * a.d_inner);
  }
  if (plan.part > 0) a.behind_part = work.array<float>(plan.part_slots * plane);
}

template <class Block>
void launch_walk(const Args& a, const ScanStreamsPlan& plan, cudaStream_t stream) {
  const auto kernel = selective_scan_bwd_streams_walk<Block>;
  constexpr int kBytes = sizeof(typename Block::SharedMemory);
  static_assert(kBytes <= 227 * 1024);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "preparing selective_scan_bwd_streams_walk");
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.walkers));
  kernel<<<grid, Block::kThreads, kBytes, stream>>>(a);
  check_launch("selective_scan_bwd_streams_walk");
}

constexpr int kFewWarps = kScanStreamsMaxWarps / 2;

// Calls f with the number of states as a constant.
template <class F>
void with_states(int64_t d_state, const F& f) {
  if (d_state == 16) f(std::integral_constant<int, 16>{});
  if (d_state == 32) f(std::integral_constant<int, 32>{});
  if (d_state == 64) f(std::integral_constant<int, 64>{});
  if (d_state == 128) f(std::integral_constant<int, 128>{});
}

template <int kStates>
void walk(const Args& a, const ScanStreamsPlan& plan, cudaStream_t stream) {
  if constexpr (kStates > kWarpStates)
    launch_walk<WideBlock<kStates / kWarpStates>>(a, plan, stream);
  else if (plan.warps == kFewWarps)
    launch_walk<Block<kFewWarps>>(a, plan, stream);
  else
    launch_walk<Block<kScanStreamsMaxWarps>>(a, plan, stream);
}

template <int kStates>
void add_blocks(const Args& a, const ScanStreamsPlan& plan, const SelectiveScanGrad& grad,
                cudaStream_t stream) {
  const auto sum = [](const float* from, const Tensor& out) {
    return Sum{from, out.ptr<bf16>(), out.stride[0], out.stride[1]};
  };
  const int groups = a.d_inner / a.group_channels;
  const auto blocks = static_cast<unsigned>((a.tokens * groups * (kStates / 4) + 255) / 256);
  selective_scan_bwd_streams_add<kStates>
      <<<dim3(blocks, 2), 256, 0, stream>>>(sum(a.dB, grad.dB), sum(a.dC, grad.dC), a.tokens,
                                            groups, static_cast<int>(plan.group_blocks));
  check_launch("selective_scan_bwd_streams_add");
}

// What the smallest block takes of shared memory; 0 where there is none for so many states.
size_t least_shared_bytes(int64_t d_state) {
  size_t bytes = 0;
  with_states(d_state, [&](auto states) {
    constexpr int kWarps = states / kWarpStates;
    if constexpr (kWarps == 1)
      bytes = sizeof(Shared<kFewWarps>);
    else
      bytes = sizeof(WideShared<kWarps>);
  });
  return bytes;
}

}  // namespace

bool scan_streams_apply(const SelectiveScan& op, const SelectiveScanGrad& grad,
                        size_t shared_bytes_per_block) {
  const int64_t d_state = op.A.shape[1], group_channels = op.u.shape[1] / op.B.shape[1];
  if (op.u.dtype != DType::bf16 || !op.z) return false;
  const size_t bytes = least_shared_bytes(d_state);
  if (bytes == 0 || bytes > shared_bytes_per_block) return false;
  if (group_channels % (kScanStreamsChannels * (d_state == kWarpStates ? kFewWarps : 1)) != 0)
    return false;
  for (const Tensor* t : {&op.u, &op.dt, &op.z, &grad.dy, &grad.du, &grad.ddt, &grad.dz, &grad.y})
    if (!vector_rows(*t, 2)) return false;
  for (const Tensor* t : {&op.B, &op.C, &grad.dB, &grad.dC})
    if (!vector_rows(*t, 4)) return false;
  for (const Tensor* t : {&op.A, &op.D, &op.dt_bias, &op.state, &op.saved, &grad.dstate})
    if (!aligned(*t)) return false;
  return true;
}

void selective_scan_bwd_streams(Context& ctx, const SelectiveScan& op,
                                const SelectiveScanGrad& grad) {
  State& gpu = state_of(ctx);
  Args a = arguments(op, grad);
  const int groups = static_cast<int>(op.B.shape[1]);
  const bool fits = sizeof(Shared<kScanStreamsMaxWarps>) <= gpu.shared_bytes_per_block;
  const ScanStreamsPlan plan =
      plan_scan_streams({.tokens = a.tokens,
                         .num_seqs = a.num_seqs,
                         .d_inner = a.d_inner,
                         .n_groups = groups,
                         .d_state = a.d_state,
                         .max_warps = fits ? kScanStreamsMaxWarps : kFewWarps},
                        gpu.multiprocessors);
  allocate(a, plan, ctx.workspace());
  find_carries(a, plan, gpu.stream);
  with_states(a.d_state, [&](auto states) {
    walk<states>(a, plan, gpu.stream);
    add_blocks<states>(a, plan, grad, gpu.stream);
  });
  launch_add_partial_sums(gpu.stream, a.dA, plan.walkers, a.plane,
                          AddTo{f32(grad.dA), nullptr, a.plane});
  launch_add_partial_sums(gpu.stream, a.dD_dbias, plan.walkers, int64_t{2} * a.d_inner,
                          AddTo{f32(grad.dD), f32(grad.ddt_bias), a.d_inner});
}

}  // namespace krait::cuda
