// Selective scan on the GPU, forward. One kernel scans tiles of tokens that lie in shared memory;
// where sequences are few and long, their segments (selective_scan_plan.h) are scanned side by side
// by three kernels; where channels are few, too, another kernel's warps take turns.
#include <algorithm>
#include <string>
#include <type_traits>

#include "core/dtype.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/f32_states.h"
#include "ops/cuda/state.h"
#include "ops/cuda/vector_access.h"
#include "ops/engine.h"
#include "ops/selective_scan_relay.cuh"

namespace krait::cuda {
namespace {

using namespace scan_fwd;

// Blocks of a multiprocessor: bounds registers.
template <int L, int S, bool kOutput>
constexpr int kMinBlocks = L* S > 64           ? 1
                           : L* S > 16         ? 3
                           : S == 8 || kOutput ? 4
                                               : 5;

// Grid: x over pieces (sequences, or slots of segments) and, faster, blocks of kChannels channels
// of a group; a block scans its piece from its first token to its last. L lanes share a channel,
// each keeps S states in registers for the whole piece, with A; nothing of (tokens, d_inner,
// d_state) exists. On chip: B and C of two tiles as f32 (16 KiB at d_state 16), four steps of u, dt
// and z as they come (12 KiB in bf16 for two lanes and 64 channels), delta and sums over states of
// two steps (16 KiB), the states at the start of a middle segment (4 KiB). Moves u, dt, z, y once,
// B and C once for each block of channels; with `saved` d_state floats for every channel and 64
// tokens. Barriers: one for each tile of B and C (it is staged, and the one before the last is done
// with); __syncwarp for each step (see step()).
// Numerics: f32 throughout, exp by ex2.approx of delta (log2(e) A). y is summed over pairs of
// states by fma, then as a tree, in every layout, so that the choice of L and S does not change a
// bit.
// What limits: instruction slots and the exp unit alike. With two lanes a (token, channel) takes
// about 144 lane instructions (16 more in the middle segments of a long sequence) and 19 of the exp
// unit; each is busy for three quarters of the time. H200, bf16 with gate, d_state 16: 8 x 5120 x
// 2048 takes 0.544 ms, 154 G elements/s, 59 % of the 261 that the exps alone allow; 32 x 1536 x
// 2048 0.650 ms, 155; 8 x 1024 x 2048 0.147 ms, 114.
template <class T, int L, int S, int kChannels, bool kOutput>
__global__ void __launch_bounds__(L* kChannels, kMinBlocks<L, S, kOutput>)
    selective_scan_fwd_tiled(const __grid_constant__ Args a, const Mode mode) {
  using Block = Tile<T, L, S, kChannels, kOutput>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Block::Shared*>(memory);
  const Piece piece = find_piece(a, mode, blockIdx.x / a.channel_blocks);
  if (piece.begin >= piece.end) return;
  const int block = blockIdx.x % a.channel_blocks, group = block / a.group_blocks;
  const int c0 = group * a.group_width + block % a.group_blocks * kChannels;
  const int c_end = (group + 1) * a.group_width;

  const int c = c0 + threadIdx.x / 32 * Block::kWarpChannels + Block::channel_of();
  const int lane = Block::lane_of(), n = lane * S;
  const bool there = c < c_end;
  const int count = there ? a.d_state - n : 0;
  const int64_t row = static_cast<int64_t>(c) * a.d_state + n,
                plane = static_cast<int64_t>(a.d_inner) * a.d_state;
  float A[S], h[S], g[S], sum = 0;
  load_states(A, a.A + row, count, a.vector_saved);
#pragma unroll
  for (int s = 0; s < S; ++s) A[s] *= kLog2E, g[s] = 0;
  const int64_t state_slot = a.slot ? a.slot[piece.sequence] : piece.sequence;
  if (mode == Mode::segments)
    load_states(h, a.start_states + piece.segment_slot * plane + row, count, a.vector_saved);
  else
    load_states(h, a.state + state_slot * plane + row,
                a.state && piece.begin == piece.seq_begin ? count : 0, a.vector_saved);

  typename Block::Lane at;
  const int owner = threadIdx.x % 32, token = owner / Block::kOwners;
  const int own_c =
      c0 + threadIdx.x / 32 * Block::kWarpChannels + owner % Block::kOwners * Block::kOwn;
  const int64_t first = piece.begin + token;
  at.u = static_cast<const T*>(a.u) + first * a.u_row + own_c;
  at.dt = static_cast<const T*>(a.dt) + first * a.dt_row + own_c;
  at.z = static_cast<const T*>(a.z) + first * a.z_row + own_c;
  at.y = static_cast<T*>(a.y) + (first - Block::kStep) * a.y_row + own_c;
  at.there = token < Block::kStep && own_c < c_end;
#pragma unroll
  for (int i = 0; i < Block::kOwn; ++i) {
    at.D[i] = at.there && a.D ? a.D[own_c + i] : 0.f;
    at.bias[i] = at.there && a.dt_bias ? a.dt_bias[own_c + i] : 0.f;
  }
  typename Block::Quads raw;
  raw.from = Block::quads_of(a, piece.begin, group);
  const auto fetch_bc = [&](int left) {
    if (a.vector_states)
      Block::template fetch_bc<true>(raw, a, left);
    else
      Block::template fetch_bc<false>(raw, a, left);
  };
  // Tokens from t0 to the piece's end; more than two tiles and five steps need not be counted.
  const auto left_at = [&](int64_t t0) {
    return static_cast<int>(min(piece.end - t0, int64_t{4 * kScanChunk}));
  };
  fetch_bc(left_at(piece.begin));
  typename Block::Pipeline pipeline{};
  auto& warp = shared.warp[threadIdx.x / 32];
  at.to = shared_address(warp.inputs) + owner * Block::kCopyBytes;
  at.u_at = Block::place_of(at.u, at.to, 0), at.dt_at = Block::place_of(at.dt, at.to, 1);
  at.z_at = Block::place_of(at.z, at.to, 2);
  at.left = left_at(piece.begin) - token, at.due = at.step = 0;
#pragma unroll
  for (int i = 0; i < Block::kStages; ++i)
    Block::fetch_own(at, a, i, i, at.left - i * Block::kStep);
  wait_for_copies<Block::kStages - 1>();
  pipeline.now = Block::take_own(at, 0);
  Block::hand_over(warp.pair[0], Block::deltas(pipeline.now, at), owner);
  Block::stage_bc(shared.bc[0], raw);

  int tile = 0;
  const auto scan_tiles = [&](auto from_zero, int64_t t0, int64_t end) {
    constexpr bool kFromZero = decltype(from_zero)::value;
#pragma unroll 1
    for (; t0 < end; t0 += Block::kTokens, tile ^= 1) {
      const int64_t behind = t0 - piece.seq_begin;
      const int left = left_at(t0);
      __syncthreads();  // the tile's B and C are there, and all have done with the other tile's
      fetch_bc(left - Block::kTokens);
      if (a.saved && behind % kScanChunk == 0 && behind > 0 && mode != Mode::ends)
        store_states(a.saved + (t0 / kScanChunk - 1) * plane + row, h, count, a.vector_saved);
      at.left = left - token;
      Block::template scan_tile<kFromZero>(shared.bc[tile], warp, pipeline,
                                           min(Block::kTokens, left), A, h, g, sum, at, a);
      Block::stage_bc(shared.bc[tile ^ 1], raw);
    }
  };
  for (int64_t t0 = piece.begin; t0 < piece.end; t0 += kScanSegment) {
    const int64_t end = min(t0 + kScanSegment, piece.end);
    if (t0 == piece.begin || end == piece.end) {
      scan_tiles(std::false_type{}, t0, end);
      continue;
    }
    // In between the state is kept from zero, too, and what it started with waits.
    sum = 0;
#pragma unroll
    for (int s = 0; s < S; ++s) shared.start[s][threadIdx.x] = h[s], g[s] = 0;
    scan_tiles(std::true_type{}, t0, end);
#pragma unroll
    for (int s = 0; s < S; ++s)
      h[s] = fmaf(exp2_approx(A[s] * sum), shared.start[s][threadIdx.x], g[s]);
  }
  if constexpr (kOutput) Block::finish(pipeline.before, Block::take_sums(warp.y[1], owner), at, a);

  if (mode == Mode::ends) {
    store_states(a.start_states + piece.segment_slot * plane + row, h, count, a.vector_saved);
    if (n == 0 && there) a.delta_sums[piece.segment_slot * a.d_inner + c] = sum;
  } else if (kOutput && a.state && piece.end == piece.seq_end) {
    unsign_zeros(h);
    store_states(a.state + state_slot * plane + row, h, count, a.vector_saved);
  }
}

// Grid: as above, with blocks of 8 channels, whose warps scan steps of 8 tokens in turn. On chip:
// for each warp what selective_scan_fwd_tiled has for one, and B and C of two steps; the state,
// which goes round. Barriers: an mbarrier for each warp, which the 32 lanes of the warp before it
// arrive at when the state is there; __syncwarp for each step. Numerics: the same bits as
// selective_scan_fwd_tiled. What limits: a step of 392 instructions takes a warp some 2,000 cycles,
// of which the state stays with it for 200; six warps overlap. H200, bf16: 1 x 1536 x 2048 takes
// 0.050 ms, 63 G elements/s, 8 x 128 x 256 0.0087 ms, 30.
template <class T>
__global__ void __launch_bounds__(32 * kScanRelayWarps, 2)
    selective_scan_fwd_relay(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Relay<T>::Shared*>(memory);
  const Piece piece = find_piece(a, Mode::sequences, blockIdx.x / a.channel_blocks);
  if (piece.begin < piece.end) Relay<T>::scan_piece(shared, a, piece);
}

// From what segments end with to what they start with, in place. One thread for each (sequence,
// channel, state); loads of kAhead segments are under way at once.
__global__ void __launch_bounds__(kChainThreads)
    selective_scan_fwd_chain(const __grid_constant__ Args a, int64_t blocks_per_sequence) {
  constexpr int kAhead = 16;
  const int sequence = static_cast<int>(blockIdx.x / blocks_per_sequence);
  const int64_t plane = static_cast<int64_t>(a.d_inner) * a.d_state;
  const int64_t i = blockIdx.x % blocks_per_sequence * blockDim.x + threadIdx.x;
  if (i >= plane) return;
  const int64_t begin = a.seq_start[sequence], end = a.seq_start[sequence + 1];
  const int64_t segments = (end - begin + kScanSegment - 1) / kScanSegment;
  if (segments == 0) return;
  const int64_t slot = scan_segment_slots(begin, sequence), c = i / a.d_state;
  float* states = a.start_states + slot * plane + i;
  const float* sums = a.delta_sums + slot * a.d_inner + c;
  const float A = a.A[i] * kLog2E;
  float h = 0;
  if (a.state) h = a.state[(a.slot ? a.slot[sequence] : sequence) * plane + i];
  for (int64_t j0 = 0; j0 < segments; j0 += kAhead) {
    float end_state[kAhead], sum[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (j0 + k + 1 < segments) {
        end_state[k] = states[(j0 + k) * plane];
        sum[k] = sums[(j0 + k) * a.d_inner];
      }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (j0 + k >= segments) return;
      states[(j0 + k) * plane] = h;
      h = j0 + k == 0 ? end_state[k] : fmaf(exp2_approx(A * sum[k]), h, end_state[k]);
    }
  }
}

Args arguments(const SelectiveScan& op) {
  Args a{};
  a.u = op.u.data, a.dt = op.dt.data, a.z = op.z ? op.z.data : op.u.data, a.B = op.B.data,
  a.C = op.C.data;
  a.y = op.y.data, a.gated = static_cast<bool>(op.z);
  a.u_row = row(op.u), a.dt_row = row(op.dt), a.z_row = op.z ? row(op.z) : row(op.u),
  a.y_row = row(op.y);
  a.B_row = row(op.B), a.C_row = row(op.C);
  a.B_group = op.B.stride[1], a.C_group = op.C.stride[1];
  a.A = f32(op.A), a.D = f32(op.D), a.dt_bias = f32(op.dt_bias);
  a.state = f32(op.state), a.saved = f32(op.saved);
  a.seq_start = i32(op.seq_start);
  a.slot = op.state && op.slot ? op.slot.ptr<int32_t>() : nullptr;
  a.d_inner = static_cast<int>(op.u.shape[1]);
  a.d_state = static_cast<int>(op.A.shape[1]);
  a.group_width = static_cast<int>(op.u.shape[1] / op.B.shape[1]);
  a.vector_states = vector_rows(op.B, 4) && vector_rows(op.C, 4);
  a.vector_saved = op.A.shape[1] % 4 == 0 && aligned(a.A) && aligned(a.state) && aligned(a.saved);
  return a;
}

// How many channels of u, dt, z and y may be read at once.
int row_vector(const SelectiveScan& op) {
  const auto may = [&](int V) {
    return vector_rows(op.u, V) && vector_rows(op.dt, V) && vector_rows(op.z, V) &&
           vector_rows(op.y, V) && op.u.shape[1] / op.B.shape[1] % V == 0;
  };
  return may(4) ? 4 : may(2) ? 2 : 1;
}

// bytes: of as many elements as a warp goes forward by tokens.
void set_steps(Args& a, int64_t bytes) {
  const auto step = [&](int64_t row) {
    KRAIT_CHECK(row * bytes < int64_t{1} << 31, "rows of " + std::to_string(row) + " elements");
    return static_cast<int>(row * bytes);
  };
  step(std::max(a.B_row, a.C_row));  // relay goes from row to row of these
  a.u_step = step(a.u_row), a.dt_step = step(a.dt_row), a.z_step = step(a.z_row);
  a.y_step = step(a.y_row);
}

template <class T, int L, int S, int kChannels, bool kOutput>
void launch(Args a, const ScanForwardPlan& plan, Mode mode, cudaStream_t stream) {
  using Block = Tile<T, L, S, kChannels, kOutput>;
  set_steps(a, Block::kStep * int64_t{sizeof(T)});
  a.group_blocks = static_cast<int>(plan.group_blocks);
  a.channel_blocks = static_cast<int>(plan.channel_blocks);
  const auto kernel = selective_scan_fwd_tiled<T, L, S, kChannels, kOutput>;
  constexpr int kShared = static_cast<int>(sizeof(typename Block::Shared));
  static_assert(kShared <= 99 * 1024, "what every GPU from compute capability 8.0 on has");
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  check(raised, "preparing selective_scan_fwd_tiled");
  kernel<<<static_cast<unsigned>(plan.blocks), L * kChannels, kShared, stream>>>(a, mode);
  check_launch("selective_scan_fwd_tiled");
}

template <class T>
void launch_relay(Args a, const ScanForwardPlan& plan, cudaStream_t stream) {
  set_steps(a, Relay<T>::kStep * kScanRelayWarps * int64_t{sizeof(T)});
  a.group_blocks = static_cast<int>(plan.relay_group_blocks);
  a.channel_blocks = static_cast<int>(plan.relay_channel_blocks);
  constexpr int kShared = static_cast<int>(sizeof(typename Relay<T>::Shared));
  static_assert(kShared <= 48 * 1024);
  selective_scan_fwd_relay<T><<<static_cast<unsigned>(plan.pieces * plan.relay_channel_blocks),
                                32 * kScanRelayWarps, kShared, stream>>>(a);
  check_launch("selective_scan_fwd_relay");
}

template <class T, bool kOutput>
void launch(const Args& a, const ScanForwardPlan& plan, Mode mode, cudaStream_t stream) {
  if constexpr (kOutput)
    if (plan.relay) return launch_relay<T>(a, plan, stream);
  const auto is = [&](int lanes, int lane_states, int channels) {
    return plan.lanes == lanes && plan.lane_states == lane_states && plan.channels == channels;
  };
  if (is(2, 8, 64)) return launch<T, 2, 8, 64, kOutput>(a, plan, mode, stream);
  if (is(4, 4, 32)) return launch<T, 4, 4, 32, kOutput>(a, plan, mode, stream);
  if (is(8, 2, 16)) return launch<T, 8, 2, 16, kOutput>(a, plan, mode, stream);
  if (is(8, 8, 16)) return launch<T, 8, 8, 16, kOutput>(a, plan, mode, stream);
  if (is(16, 8, 16)) return launch<T, 16, 8, 16, kOutput>(a, plan, mode, stream);
  KRAIT_CHECK(is(32, 8, 8), plan.to_string());
  launch<T, 32, 8, 8, kOutput>(a, plan, mode, stream);
}

}  // namespace

int64_t scan_stage(Context& ctx, int64_t tokens, int64_t num_seqs, int64_t d_inner,
                   int64_t d_state) {
  return scan_stage_tokens({.tokens = tokens,
                            .num_seqs = num_seqs,
                            .d_inner = d_inner,
                            .d_state = d_state,
                            .n_groups = 1},
                           state_of(ctx).multiprocessors);
}

// Without y: fills op.saved and leaves op.state as it is.
void selective_scan_fwd(Context& ctx, const SelectiveScan& op) {
  if (op.state.dtype == DType::bf16) return with_f32_states(ctx, op, selective_scan_fwd);
  State& gpu = state_of(ctx);
  const ScanShape shape = {.tokens = op.u.shape[0],
                           .num_seqs = op.seq_start.shape[0] - 1,
                           .d_inner = op.u.shape[1],
                           .d_state = op.A.shape[1],
                           .n_groups = op.B.shape[1],
                           .row_vector = row_vector(op),
                           .output = static_cast<bool>(op.y),
                           .beside = op.beside};
  const ScanForwardPlan plan = plan_selective_scan_fwd(shape, gpu.multiprocessors);
  Args a = arguments(op);
  a.num_seqs = static_cast<int>(shape.num_seqs);
  dispatch_f32_bf16(op.u.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Mode mode = Mode::sequences;
    const Arena::Scope scope(ctx.workspace());
    if (plan.segmented) {
      mode = Mode::segments;
      a.start_states = ctx.workspace().array<float>(plan.start_states);
      a.delta_sums = ctx.workspace().array<float>(plan.delta_sums);
      ScanShape ends = shape;
      ends.ends = true;
      const ScanForwardPlan ends_plan = plan_selective_scan_fwd(ends, gpu.multiprocessors);
      launch<T, false>(a, ends_plan, Mode::ends, gpu.stream);
      selective_scan_fwd_chain<<<static_cast<unsigned>(plan.chain_blocks), kChainThreads, 0,
                                 gpu.stream>>>(a, plan.chain_blocks / shape.num_seqs);
      check_launch("selective_scan_fwd_chain");
    }
    if (op.y)
      launch<T, true>(a, plan, mode, gpu.stream);
    else
      launch<T, false>(a, plan, mode, gpu.stream);
  });
}

}  // namespace krait::cuda
