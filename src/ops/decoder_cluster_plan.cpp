#include "ops/decoder_cluster_plan.h"

#include <algorithm>
#include <utility>

namespace krait::cuda {
namespace {

constexpr int kRowBytes = kClusterTile * 2;  // of a tile
// Fewer would leave memory idle while a block awaits others.
constexpr int kMinStages = 3;
// Of the barriers: two for each stage, then one for each thing that is awaited.
constexpr int kBarrierBytes = 8 * (2 * kClusterMaxStages + 9 + kClusterMaxOctets);

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

bool possible(const DecoderShape& s) {
  return !s.int8 && s.num_seqs >= 1 && s.n_layer >= 1 && s.n_layer <= kClusterMaxLayers &&
         s.d_state == kClusterStates && s.d_conv == kClusterBefore + 1 &&
         s.d_model % (8 * kClusterBlocks) == 0 && s.d_model <= kClusterTile * kClusterBlocks &&
         // Whole k-steps of the tensor cores for each block.
         s.d_inner % (16 * kClusterBlocks) == 0 &&
         2 * s.d_inner <= kClusterGroups * kClusterTiles * kClusterTile * kClusterBlocks &&
         s.dt_rank >= 8 && s.dt_rank % 8 == 0 && s.x_proj_rows() <= kClusterGroups * kClusterTile;
}

// The most that a block copies at a time: two steps of inputs of half of in_proj, all of x_proj, of
// dt_proj with A and D, or kClusterOutSteps of out_proj.
int stage_bytes(const DecoderClusterPlan& p) {
  const int x_proj = p.u_width / kClusterTile * p.x_proj_rows * kRowBytes;
  const int scan = p.channels * (p.dt_steps() * kRowBytes + kClusterStates * 4 + 4);
  return round_up(std::max({2 * p.channels * kRowBytes, x_proj, scan,
                            kClusterOutSteps * p.outputs * kRowBytes}),
                  kClusterAlignment);
}

DecoderClusterShared lay_out(const DecoderClusterPlan& p, int state_bytes, int ring_bytes) {
  DecoderClusterShared s;
  int at = ring_bytes;
  const auto take = [&](int bytes) { return std::exchange(at, at + round_up(bytes, 128)); };
  s.x = take(p.seqs * p.d_model * 2);
  const int behind_x = std::exchange(at, s.x);
  s.steps = take(p.seqs * p.steps_pitch() * 8);
  s.uz = take(p.seqs * p.channels * 4);
  s.BC = take(p.seqs * 2 * kClusterStates * 2);
  at = std::max(at, behind_x);
  s.y = take(p.seqs * p.d_inner * 2);
  const int behind_y = std::exchange(at, s.y);
  s.conv = s.dt_sums = take(p.seqs * kClusterBefore * p.channels * state_bytes);
  s.sums = take(p.seqs * p.sums_pitch() * 4);
  s.x_sent = take(p.seqs * p.outputs * 2);
  s.out_sums = take(kClusterGroups * p.seqs * p.out_pitch() * 4);
  const int behind_sums = std::exchange(at, s.out_sums);
  s.u = take(p.seqs * p.u_width * 2);
  s.x_dbl = take(p.seqs * p.x_proj_rows * 2);
  s.parts = take(p.seqs * p.x_proj_rows * 4);
  at = std::max({at, behind_sums, behind_y});
  s.received = s.y_sent =
      take(std::max(kClusterBlocks * p.own_runs() * 32, p.seqs * p.channels * 2));
  s.A = take(p.channels * kClusterStates * 4);
  s.D = take(p.channels * 4);
  s.squares = take(kClusterBlocks * p.seqs * 4);
  s.row_squares = take(p.seqs * p.outputs);
  s.scale = take(p.seqs * 4);
  s.residual = take(p.seqs * p.outputs * 4);
  s.slots = take(p.seqs * 4);
  s.barriers = take(kBarrierBytes);
  s.bytes = at;
  return s;
}

}  // namespace

DecoderClusterPlan plan_decoder_cluster(const DecoderShape& s, int state_bytes, int clusters,
                                        size_t shared_bytes) {
  DecoderClusterPlan p;
  if (!possible(s) || clusters < 1) return p;
  const int most = clusters * kClusterMaxSeqs;  // of a pass
  if (s.num_seqs > int64_t{kClusterMaxPasses} * most) return p;
  const int num_seqs = static_cast<int>(s.num_seqs);
  p.passes = ceil_div(num_seqs, most);
  if (p.passes > (state_bytes == 2 ? kClusterMaxPassesOfBf16 : kClusterMaxPasses)) return p;
  if (p.passes > 1) {
    DecoderShape full = s;
    full.num_seqs = most;
    if (!plan_decoder_cluster(full, state_bytes, clusters, shared_bytes).usable) return p;
  }
  const int at_once = ceil_div(num_seqs, p.passes);
  p.clusters = std::min(clusters, at_once);
  p.seqs = round_up(ceil_div(at_once, p.clusters), kClusterOctet);
  p.d_model = static_cast<int>(s.d_model);
  p.d_inner = static_cast<int>(s.d_inner);
  p.channels = p.d_inner / kClusterBlocks;
  p.u_width = round_up(p.channels, kClusterTile);
  p.outputs = p.d_model / kClusterBlocks;
  p.x_proj_rows = static_cast<int>(s.x_proj_rows());
  p.dt_rank = static_cast<int>(s.dt_rank);
  p.stage_bytes = stage_bytes(p);
  for (p.state_seqs = kClusterOctet;
       p.state_seqs * p.channels * kClusterStates * state_bytes > p.stage_bytes;)
    p.state_seqs /= 2;
  const int room =
      static_cast<int>(shared_bytes) - kClusterAlignment - lay_out(p, state_bytes, 0).bytes;
  p.stages = std::min(room / p.stage_bytes, kClusterMaxStages);
  if (p.stages < kMinStages) return p;
  p.shared = lay_out(p, state_bytes, p.stages * p.stage_bytes);
  p.usable = true;
  return p;
}

}  // namespace krait::cuda
