// The selective scan's backward pass for bf16, 16 states and up to 64 channels at a time.
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
#include "ops/cuda/arguments.h"
#include "ops/cuda/partial_sums.cuh"
#include "ops/cuda/state.h"
#include "ops/cuda/vector_access.h"
#include "ops/selective_scan_bwd_streams_block.cuh"

namespace krait::cuda {
namespace {

using namespace scan_streams;

// Grid: plan.blocks x plan.walkers; a block has 64 (or 32) channels and walks every walkers-th
// piece (or part). On chip: for each warp rows of delta and delta u (9 KB), states before runs (8
// KB), q and w of a run by lane (4 KB), what lanes keep (2 KB); for the block B and C of the tile
// (8 KB), dB and dC of two runs (8 KB): two blocks of four warps and 255 registers a
// multiprocessor. Moves 15 bytes an element (4 more for the sums of dB and dC). A barrier a tile,
// for B and C, and a run, for the sums over warps. Sums in f32, those of y, dB and dC of values cut
// to tf32, whose mean error is taken out. On an H200 2.54 ms for all passes at (32, 1536,
// 2048), 39.6 G elements/s: 408 instructions an element, 2.2 a clock on a multiprocessor's 8 warps,
// where all issue slots would give 82.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kScanStreamsWarpsPerMultiprocessor / kWarps)
    selective_scan_bwd_streams_walk(const __grid_constant__ Args a) {
  extern __shared__ __align__(64) char memory[];
  Block<kWarps> block(a, *reinterpret_cast<Shared<kWarps>*>(memory));
  const int parts = a.part > 0 ? kPiece / a.part : 1;
#pragma unroll 1
  for (int64_t index = blockIdx.y; index < a.pieces * parts; index += gridDim.y) {
    Piece p;
    if (!find_piece(a, index / parts, p)) continue;
    if (a.part > 0 && !find_part(a, p, static_cast<int>(index % parts))) continue;
    block.walk(p);
  }
  block.store_sums();
}

struct Sum {
  const float* partial;  // (groups * group_blocks, tokens, 16)
  bf16* out;
  int64_t row, group_stride;
};

// dB (grid.y 0) and dC (1) from the blocks' sums. A thread has four states of a token and group.
__global__ void __launch_bounds__(256)
    selective_scan_bwd_streams_add(const Sum dB, const Sum dC, int64_t tokens, int groups,
                                   int group_blocks) {
  const Sum& s = blockIdx.y ? dC : dB;
  constexpr int kQuads = kStates / 4;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= tokens * groups * kQuads) return;
  const int n = static_cast<int>(i % kQuads) * 4, group = static_cast<int>(i / kQuads % groups);
  const int64_t t = i / kQuads / groups;
  const float* from = s.partial + (group * group_blocks * tokens + t) * kStates + n;
  Floats<4> sum = constant<4>(0);
#pragma unroll 8
  for (int b = 0; b < group_blocks; ++b) {
    const Floats<4> x = load_vector<4>(from + b * tokens * kStates);
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
  a.group_channels = static_cast<int>(op.u.shape[1] / op.B.shape[1]);
  return a;
}

void allocate(Args& a, const ScanStreamsPlan& plan, Arena& work) {
  const int64_t plane = int64_t{a.d_inner} * kStates, sums = plan.blocks * a.tokens * kStates;
  a.pieces = plan.pieces, a.part = static_cast<int>(plan.part);
  a.dB = work.array<float>(sums), a.dC = work.array<float>(sums);
  a.dA = work.array<float>(plan.walkers * plane);
  a.dD_dbias = work.array<float>(plan.walkers * 2 * a.d_inner);
  if (plan.chain_blocks > 0) {
    a.behind = work.array<float>(plan.slots * plane);
    a.behind_last = work.array<float>(plan.slots * plane);
    a.delta_sums = work.array<float>(plan.slots * a.d_inner);
  }
  if (plan.part > 0) a.behind_part = work.array<float>(plan.part_slots * plane);
}

template <int kWarps>
void walk(const Args& a, const ScanStreamsPlan& plan, cudaStream_t stream) {
  const auto kernel = selective_scan_bwd_streams_walk<kWarps>;
  constexpr int kBytes = sizeof(Shared<kWarps>);
  static_assert(kBytes <= 227 * 1024);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "preparing selective_scan_bwd_streams_walk");
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.walkers));
  kernel<<<grid, 32 * kWarps, kBytes, stream>>>(a);
  check_launch("selective_scan_bwd_streams_walk");
}

}  // namespace

bool scan_streams_apply(const SelectiveScan& op, const SelectiveScanGrad& grad) {
  if (op.u.dtype != DType::bf16 || op.A.shape[1] != kStates || !op.z) return false;
  if (op.u.shape[1] / op.B.shape[1] % (2 * kScanStreamsChannels) != 0) return false;
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
  constexpr int kFew = kScanStreamsMaxWarps / 2;
  static_assert(sizeof(Shared<kFew>) <= 99 * 1024, "what every GPU from 8.0 on has");
  const bool fits = sizeof(Shared<kScanStreamsMaxWarps>) <= gpu.shared_bytes_per_block;
  const ScanStreamsPlan plan = plan_scan_streams(
      {a.tokens, a.num_seqs, a.d_inner, groups, fits ? kScanStreamsMaxWarps : kFew},
      gpu.multiprocessors);
  allocate(a, plan, ctx.workspace());
  find_carries(a, plan, gpu.stream);
  if (plan.warps == kScanStreamsMaxWarps)
    walk<kScanStreamsMaxWarps>(a, plan, gpu.stream);
  else
    walk<kFew>(a, plan, gpu.stream);

  const auto sum = [](const float* from, const Tensor& out) {
    return Sum{from, out.ptr<bf16>(), out.stride[0], out.stride[1]};
  };
  const int64_t plane = int64_t{a.d_inner} * kStates;
  const auto blocks = static_cast<unsigned>((a.tokens * groups * (kStates / 4) + 255) / 256);
  selective_scan_bwd_streams_add<<<dim3(blocks, 2), 256, 0, gpu.stream>>>(
      sum(a.dB, grad.dB), sum(a.dC, grad.dC), a.tokens, groups,
      static_cast<int>(plan.group_blocks));
  check_launch("selective_scan_bwd_streams_add");
  launch_add_partial_sums(gpu.stream, a.dA, plan.walkers, plane,
                          AddTo{f32(grad.dA), nullptr, plane});
  launch_add_partial_sums(gpu.stream, a.dD_dbias, plan.walkers, int64_t{2} * a.d_inner,
                          AddTo{f32(grad.dD), f32(grad.ddt_bias), a.d_inner});
}

}  // namespace krait::cuda
