// What the computing warps of a block do in a decoder step by clusters.
#pragma once

#include "ops/causal_conv1d_taps.cuh"
#include "ops/cuda/math.cuh"
#include "ops/decoder_cluster_scan.cuh"
#include "ops/decoder_cluster_warps.cuh"

namespace krait::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// S: of states.
template <int kSeqs, class S>
class ClusterLayers {
 public:
  __device__ explicit ClusterLayers(const ClusterBlock<kSeqs>& block)
      : w_(block), share_(w_.warp(), block.cut.channels), b_(block), cut_(block.cut) {}

  __device__ void run() {
    embed();
    for (int l = 0; l < b_.a.n_layer; ++l) {
      const DecoderClusterLayer& layer = b_.a.layer[l];
      const auto phase = static_cast<uint32_t>(l);
      {
        const Channels channels(*this, layer);
        copy_conv_states(layer);
        in_proj(phase);
        S* const states = b_.template conv<S>(layer);
        const ConvStates next = convolve(phase, channels, states);
        x_proj();
        store_states(states, channels, next);
      }
      const Floats<2 * kClusterTiles> bias = dt_bias(layer);
      dt_proj(phase, bias);
      ClusterScan<kSeqs, S>(w_, share_).run(layer);
      const Outputs outputs(*this, layer, l + 1 < b_.a.n_layer ? b_.a.layer[l + 1].norm : nullptr);
      out_proj(phase);
      finish(outputs);
    }
  }

 private:
  using Warps = ClusterWarps<kSeqs>;
  static constexpr int kSums = Warps::kSums;

  // --- The residual stream ---
  // Token by token: its row is the residual stream.
  __device__ void embed() {
    const ClusterFour own = w_.four_of(cut_.outputs);
    const int output = b_.rank * cut_.outputs + own.column;
    const Floats<4> norm = load_vector<4>(b_.a.layer[0].norm + output);
    for (int seq = own.first; seq < b_.seqs; seq += own.at_once) {
      const Floats<4> r = load_vector<4>(
          b_.a.embedding + int64_t{b_.a.tokens[b_.seq0 + seq]} * cut_.d_model + output);
      give(seq, own.column, r, norm);
    }
    Warps::tell(b_.x_ready());
  }
  // The residual stream of the next layer: kept, and what others need of it.
  __device__ void give(int seq, int column, const Floats<4>& r, const Floats<4>& norm) const {
    store_vector(b_.template at<float>(cut_.shared.residual) + seq * cut_.outputs + column, r);
    Floats<4> x;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(r[i], r[i], sum), x[i] = r[i] * norm[i];
    store_vector(b_.template at<bf16>(cut_.shared.x) +
                     vector_place(cut_.d_model, seq, b_.rank * cut_.outputs + column),
                 x);
    store_vector(b_.template at<bf16>(cut_.shared.x_sent) + vector_place(cut_.outputs, seq, column),
                 x);
    b_.template at<float>(cut_.shared.row_squares)[seq * (cut_.outputs / 4) + column / 4] = sum;
  }

  // --- in_proj and the convolution ---
  // Of a thread's four channels.
  struct Channels {
    ClusterFour own;
    Taps<4> taps;
    Floats<4> x_bias{}, z_bias{};

    __device__ Channels(const ClusterLayers& of, const DecoderClusterLayer& layer)
        : own(of.w_.four_of(of.cut_.channels)), taps(layer.conv_weight, layer.conv_bias, at(of)) {
      if (!layer.in_bias) return;
      x_bias = load_vector<4>(layer.in_bias + at(of));
      z_bias = load_vector<4>(layer.in_bias + of.cut_.d_inner + at(of));
    }
    __device__ int at(const ClusterLayers& of) const {
      return of.b_.rank * of.cut_.channels + own.column;
    }
  };
  // Starts to copy the convolution's states: (sequences, kClusterBefore, channels).
  __device__ void copy_conv_states(const DecoderClusterLayer& layer) const {
    constexpr int kVector = 16 / sizeof(S);
    const int vectors = cut_.channels / kVector, count = b_.seqs * kClusterBefore * vectors;
    const uint32_t to = b_.address(cut_.shared.conv);
    const S* const states = b_.template conv<const S>(layer);
#pragma unroll 4
    for (int i = w_.thread; i < count; i += kClusterThreads) {
      const int run = i / vectors;
      copy_async_uncached(to + static_cast<uint32_t>(16 * i),
                          b_.conv_of(states, run / kClusterBefore) +
                              run % kClusterBefore * cut_.d_inner + i % vectors * kVector);
    }
    end_copies();
  }
  // The sums of the block's channels' x, then z, of each sequence.
  __device__ void in_proj(uint32_t phase) {
    wait_for_phase(b_.x_full(), phase);
    const int rows = 2 * cut_.channels;
    const uint64_t x = blocks_descriptor(b_.address(cut_.shared.x), 128, cut_.d_model * 16);
    float* const sums = b_.template at<float>(cut_.shared.sums);
    w_.product(
        rows, cut_.d_model / kClusterTile, /*one_stage=*/false,
        [&](float(&d)[kSums], uint32_t stage, int step, int tile) {
          Warps::multiply_step(
              d, tile_descriptor(stage + static_cast<uint32_t>(tile * kClusterTile * kTileBytes)),
              x, step);
        },
        [&](const float(&d)[kSums], int, int tile) {
#pragma unroll
          for (int i = 0; i < kSums; ++i)
            if (const int row = tile * kClusterTile + Warps::row_of(i); row < rows)
              sums[Warps::seq_of(i) * cut_.sums_pitch() + row] = d[i];
        });
    wait_for_copies<0>();
    Warps::meet();  // the sums and the convolution's states are there; x has been read
  }
  // From the sums to u, z and the states, kConvTogether sequences at a time.
  static constexpr int kConvTogether = 2;
  // States of a thread's last sequences: stored when x_proj's sums are on their way, for whoever
  // publishes u waits for its stores.
  struct ConvStates {
    int first;  // sequence
    Floats<4> state[kConvTogether][kClusterBefore];
  };
  __device__ ConvStates convolve(uint32_t phase, const Channels& channels, S* states) const {
    const auto [column, first, at_once] = channels.own;
    const int width = cut_.channels;
    ConvStates next{.first = first, .state = {}};
    wait_for_phase(b_.scales_ready(), phase);
    for (int seq0 = first; seq0 < b_.seqs; seq0 += kConvTogether * at_once) {
      if (seq0 > first) store_states(states, channels, next);
      next.first = seq0;
#pragma unroll
      for (int k = 0; k < kConvTogether; ++k) {
        const int seq = seq0 + k * at_once;
        if (seq >= b_.seqs) break;
        Floats<4> before[kClusterBefore], u;
#pragma unroll
        for (int i = 0; i < kClusterBefore; ++i)
          before[i] = load_vector<4>(b_.template at<S>(cut_.shared.conv) +
                                     (seq * kClusterBefore + i) * width + column);
        const float* const sums =
            b_.template at<float>(cut_.shared.sums) + seq * cut_.sums_pitch() + column;
        const float scale = b_.template at<float>(cut_.shared.scale)[seq];
        Floats<4> x = load_vector<4>(sums), z = load_vector<4>(sums + width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = fmaf(x[i], scale, channels.x_bias[i]);
          z[i] = fmaf(z[i], scale, channels.z_bias[i]);
        }
        x = unpack(pack<bf16>(x));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          u[i] = silu(channels.taps.convolve(i, before[0][i], before[1][i], before[2][i], x[i]));
        store_vector(b_.template at<bf16>(cut_.shared.u) + vector_place(cut_.u_width, seq, column),
                     u);
        store_vector(b_.template at<bf16>(cut_.shared.z) + seq * width + column, z);
        next.state[k][0] = before[1], next.state[k][1] = before[2], next.state[k][2] = x;
      }
    }
    // Up to a whole tile x_proj's inputs are the next block's: times zero.
    for (int i = w_.thread; i < kSeqs * (cut_.u_width - width) / 8; i += kClusterThreads)
      *b_.template at<uint4>(cut_.shared.u +
                             2 * vector_place(cut_.u_width, i % kSeqs, width + i / kSeqs * 8)) =
          make_uint4(0, 0, 0, 0);
    publish_to_copies();
    Warps::meet();  // u is there
    return next;
  }
  __device__ void store_states(S* states, const Channels& channels, const ConvStates& next) const {
#pragma unroll
    for (int k = 0; k < kConvTogether; ++k) {
      const int seq = next.first + k * channels.own.at_once;
      if (seq >= b_.seqs) break;
      S* const to = b_.conv_of(states + channels.own.column, seq);
#pragma unroll
      for (int i = 0; i < kClusterBefore; ++i)
        store_vector(to + i * cut_.d_inner, next.state[k][i]);
    }
  }

  // --- x_proj and dt_proj ---
  // Of this block's u only: parts of x_dbl's sums.
  __device__ void x_proj() {
    const int rows = cut_.x_proj_rows;
    const uint64_t u = blocks_descriptor(b_.address(cut_.shared.u), 128, cut_.u_width * 16);
    float* const parts = b_.template at<float>(cut_.shared.parts);
    w_.product(
        rows, cut_.u_width / kClusterTile, /*one_stage=*/true,
        [&](float(&d)[kSums], uint32_t stage, int step, int tile) {
          Warps::multiply_step(d, tile_descriptor(Warps::tile_at(stage, step, rows, tile)), u,
                               step);
        },
        [&](const float(&d)[kSums], int, int tile) {
#pragma unroll
          for (int i = 0; i < kSums; ++i)
            if (const int row = tile * kClusterTile + Warps::row_of(i); row < rows)
              parts[x_dbl_place(kSeqs, Warps::seq_of(i), row)] = d[i];
        });
    Warps::tell(b_.parts_ready());
  }
  // Of a thread's rows of dt_proj's tiles.
  __device__ Floats<2 * kClusterTiles> dt_bias(const DecoderClusterLayer& layer) const {
    Floats<2 * kClusterTiles> bias{};
    w_.for_tiles(cut_.channels, [&](int t, int tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (const int row = tile * kClusterTile + Warps::row_of(2 * half); row < cut_.channels)
          bias[2 * t + half] = layer.dt_bias[b_.rank * cut_.channels + row];
    });
    return bias;
  }
  // delta and delta u of each sequence and channel.
  __device__ void dt_proj(uint32_t phase, const Floats<2 * kClusterTiles>& bias) {
    wait_for_phase(b_.x_dbl_full(), phase);
    keep_parameters(w_.await_stage());
    const uint64_t dt = blocks_descriptor(b_.address(cut_.shared.x_dbl), kSeqs * 16, 128);
    const bf16* const u = b_.template at<bf16>(cut_.shared.u);
    auto* const steps = b_.template at<float2>(cut_.shared.steps);
    w_.product(
        cut_.channels, cut_.dt_steps(), /*one_stage=*/true,
        [&](float(&d)[kSums], uint32_t stage, int step, int tile) {
          const uint64_t a = tile_descriptor(Warps::tile_at(stage, step, cut_.channels, tile));
      // Beyond dt_rank the tile is zero: times whatever x_dbl holds.
#pragma unroll
          for (int k = 0; k < kClusterTile; k += 16)
            multiply_tiles(
                d, a + k / 8,
                dt + static_cast<uint32_t>(min(step * kClusterTile + k, cut_.x_proj_rows - 16) / 8 *
                                           kSeqs));
        },
        [&](const float(&d)[kSums], int t, int tile) {
          float2 step[kSums];
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            const int row = min(tile * kClusterTile + Warps::row_of(i), cut_.channels - 1);
            const float sum = unpack(pack<bf16>(Floats<1>{{d[i]}}))[0];
            const float delta = softplus(sum + bias[2 * t + i % 4 / 2]);
            const float in =
                load_vector<1>(u + vector_place(cut_.u_width, Warps::seq_of(i), row))[0];
            step[i] = make_float2(delta, delta * in);
          }
#pragma unroll
          for (int i = 0; i < kSums; ++i)
            if (const int row = tile * kClusterTile + Warps::row_of(i); row < cut_.channels)
              steps[Warps::seq_of(i) * cut_.steps_pitch() + row] = step[i];
        });
    Warps::meet();  // delta, A and D are there
  }
  // A, times log2 e, and D, out of the stage behind dt_proj's tiles.
  __device__ void keep_parameters(uint32_t stage) const {
    const int tiles = cut_.dt_steps();
    const auto* const from = b_.template at<float>(static_cast<int>(stage - b_.memory_at) +
                                                   tiles * cut_.channels * kTileBytes);
    float* const A = b_.template at<float>(cut_.shared.A);
    for (int i = 4 * w_.thread; i < cut_.channels * kClusterStates; i += 4 * kClusterThreads) {
      Floats<4> rates = load_vector<4>(from + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) rates[k] *= kLog2E;
      store_vector(A + i, rates);
    }
    if (w_.thread < cut_.channels)
      b_.template at<float>(cut_.shared.D)[w_.thread] =
          from[cut_.channels * kClusterStates + w_.thread];
  }

  // --- out_proj ---
  // Of a thread's four outputs. next_norm: null behind the last layer.
  struct Outputs {
    ClusterFour own;
    int output;
    bool last;
    Floats<4> bias{}, norm{};

    __device__ Outputs(const ClusterLayers& of, const DecoderClusterLayer& layer,
                       const float* next_norm)
        : own(of.w_.four_of(of.cut_.outputs)),
          output(of.b_.rank * of.cut_.outputs + own.column),
          last(!next_norm) {
      if (layer.out_bias) bias = load_vector<4>(layer.out_bias + output);
      if (next_norm) norm = load_vector<4>(next_norm + output);
    }
  };
  // Each warpgroup takes every third step of the inputs.
  __device__ void out_proj(uint32_t phase) {
    wait_for_phase(b_.y_full(), phase);
    const int steps = cut_.d_inner / kClusterTile;
    const uint64_t y = blocks_descriptor(b_.address(cut_.shared.y), 128, cut_.d_inner * 16);
    float* const sums =
        b_.template at<float>(cut_.shared.out_sums) + w_.group * kSeqs * cut_.out_pitch();
    w_.template product_of<1>(
        (steps + kClusterGroups - 1) / kClusterGroups, /*one_stage=*/false,
        [&](float(&d)[kSums], uint32_t stage, int i, int) {
          const uint64_t a =
              tile_descriptor(stage + static_cast<uint32_t>(w_.group * cut_.outputs * kTileBytes));
          // Behind the last step the tile is zero: times any of y.
          Warps::multiply_step(d, a, y, min(i * kClusterGroups + w_.group, steps - 1));
        },
        [&](const float(&d)[kSums], int, int) {
          Warps::meet();  // y has been read
#pragma unroll
          for (int i = 0; i < kSums; ++i)
            sums[Warps::seq_of(i) * cut_.out_pitch() + Warps::row_of(i)] = d[i];
        });
    Warps::meet();  // all warpgroups' sums are there
  }
  // From the sums to the residual stream.
  __device__ void finish(const Outputs& outputs) const {
    const auto [column, first, at_once] = outputs.own;
    for (int seq = first; seq < b_.seqs; seq += at_once) {
      Floats<4> r =
          load_vector<4>(b_.template at<float>(cut_.shared.residual) + seq * cut_.outputs + column);
      const Floats<4> m = unpack(pack<bf16>(total(seq, column, outputs.bias)));
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] += m[i];
      if (!b_.a.residual_f32) r = unpack(pack<bf16>(r));
      if (outputs.last)
        leave(int64_t{b_.seq0 + seq} * cut_.d_model + outputs.output, r);
      else
        give(seq, column, r, outputs.norm);
    }
    if (!outputs.last) Warps::tell(b_.x_ready());
  }
  __device__ Floats<4> total(int seq, int column, const Floats<4>& bias) const {
    const float* const sums =
        b_.template at<float>(cut_.shared.out_sums) + seq * cut_.out_pitch() + column;
    Floats<4> sum = load_vector<4>(sums);
#pragma unroll
    for (int group = 1; group < kClusterGroups; ++group) {
      const Floats<4> more = load_vector<4>(sums + group * kSeqs * cut_.out_pitch());
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += more[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += bias[i];
    return sum;
  }
  __device__ void leave(int64_t place, const Floats<4>& r) const {
    if (b_.a.residual_f32)
      store_vector(static_cast<float*>(b_.a.residual) + place, r);
    else
      store_vector(static_cast<bf16*>(b_.a.residual) + place, r);
  }

  Warps w_;
  const ClusterScanShare share_;
  const ClusterBlock<kSeqs>& b_;
  const DecoderClusterPlan& cut_;
};

#endif

}  // namespace krait::cuda
