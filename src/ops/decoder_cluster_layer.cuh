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
        wait_for_phase(b_.x_full(), phase);
        in_proj();
        wait_for_copies<0>();
        Warps::meet();  // the sums and the convolution's states are there
        S* const states = b_.template conv<S>(layer);
        const ConvStates next = convolve(phase, channels, states);
        x_proj();
        store_states(states, channels, next);
      }
      const ScanChannel channel(*this, layer);
      in_proj();
      dt_proj(phase);
      take_steps(channel);
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
    Floats<4> bias{};

    __device__ Channels(const ClusterLayers& of, const DecoderClusterLayer& layer)
        : own(of.w_.four_of(of.cut_.channels)), taps(layer.conv_weight, layer.conv_bias, at(of)) {
      if (layer.in_bias) bias = load_vector<4>(layer.in_bias + at(of));
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
  // The sums of half of in_proj's rows for the block's channels, first those of x, then, while
  // x_dbl is on its way, those of z: two steps of inputs to a stage.
  __device__ __forceinline__ void in_proj() {
    const int rows = cut_.channels;
    const uint64_t x = blocks_descriptor(b_.address(cut_.shared.x), 128, cut_.d_model * 16);
    w_.product(
        rows, cut_.d_model / (2 * kClusterTile), /*one_stage=*/false,
        [&](float(&d)[kSums], uint32_t stage, int i, int tile) {
#pragma unroll
          for (int step = 0; step < 2; ++step)
            Warps::multiply_step(d, tile_descriptor(Warps::tile_at(stage, step, rows, tile)), x,
                                 2 * i + step);
        },
        [&](const float(&d)[kSums], int, int tile) { keep_sums(d, tile, cut_.shared.sums); });
  }
  // Of a tile of the block's channels, by sequences.
  __device__ void keep_sums(const float (&d)[kSums], int tile, int place) const {
    float* const sums = b_.template at<float>(place);
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      if (const int row = tile * kClusterTile + Warps::row_of(i); row < cut_.channels)
        sums[Warps::seq_of(i) * cut_.sums_pitch() + row] = d[i];
  }
  // From the sums to u and the states, kConvTogether sequences at a time.
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
        Floats<4> x = load_vector<4>(sums);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = fmaf(x[i], scale, channels.bias[i]);
        x = unpack(pack<bf16>(x));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          u[i] = silu(channels.taps.convolve(i, before[0][i], before[1][i], before[2][i], x[i]));
        store_vector(b_.template at<bf16>(cut_.shared.u) + vector_place(cut_.u_width, seq, column),
                     u);
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
  // Its sums by sequences; before, what the scan takes of the layer.
  __device__ void dt_proj(uint32_t phase) {
    keep_parameters(w_.await_stage());
    wait_for_phase(b_.x_dbl_full(), phase);
    const uint64_t dt = blocks_descriptor(b_.address(cut_.shared.x_dbl), kSeqs * 16, 128);
    w_.product(
        cut_.channels, cut_.dt_steps(), /*one_stage=*/true,
        [&](float(&d)[kSums], uint32_t stage, int step, int tile) {
          const uint64_t a = tile_descriptor(Warps::tile_at(stage, step, cut_.channels, tile));
      // Beyond dt_rank the tile is zero: times whatever x_dbl holds.
#pragma unroll
          for (int k = 0; k < kClusterTile; k += 16)
            multiply_tiles(
                d, behind(a, static_cast<uint32_t>(k / 8)),
                behind(dt, static_cast<uint32_t>(
                               min(step * kClusterTile + k, cut_.x_proj_rows - 16) / 8 * kSeqs)));
        },
        [&](const float(&d)[kSums], int, int tile) { keep_sums(d, tile, cut_.shared.dt_sums); });
    Warps::meet();  // the sums, of z, too, and A and D are there; x has been read
  }
  // A thread's channel on the way to the scan, of every at_once-th sequence.
  struct ScanChannel {
    int channel, first, at_once;
    float dt_bias, z_bias = 0;

    __device__ ScanChannel(const ClusterLayers& of, const DecoderClusterLayer& layer)
        : channel(of.w_.thread % of.cut_.channels),
          first(of.w_.thread / of.cut_.channels),
          at_once(kClusterThreads / of.cut_.channels) {
      const int in_all = of.b_.rank * of.cut_.channels + channel;
      if (first >= at_once) first = kSeqs;
      dt_bias = layer.dt_bias[in_all];
      if (layer.in_bias) z_bias = layer.in_bias[of.cut_.d_inner + in_all];
    }
  };
  // What the scan takes of sequences, out of y's place to x's.
  __device__ void take_steps(const ScanChannel& c) const {
    const float* const dt_sums = b_.template at<float>(cut_.shared.dt_sums) + c.channel;
    const float* const z_sums = b_.template at<float>(cut_.shared.sums) + c.channel;
    const float* const scales = b_.template at<float>(cut_.shared.scale);
    const bf16* const us =
        b_.template at<bf16>(cut_.shared.u) + vector_place(cut_.u_width, 0, c.channel);
#pragma unroll 2
    for (int seq = c.first; seq < b_.seqs; seq += c.at_once) {
      const float u = load_vector<1>(us + vector_place(cut_.u_width, seq, 0))[0];
      const float z = fmaf(z_sums[seq * cut_.sums_pitch()], scales[seq], c.z_bias);
      const Floats<1> sum{{dt_sums[seq * cut_.sums_pitch()]}};
      const float delta = softplus(unpack(pack<bf16>(sum))[0] + c.dt_bias);
      b_.template at<float2>(cut_.shared.steps)[seq * cut_.steps_pitch() + c.channel] =
          make_float2(delta, delta * u);
      store_vector(b_.template at<bf16>(cut_.shared.uz) + 2 * (seq * cut_.channels + c.channel),
                   Floats<2>{{u, z}});
    }
    const auto* const BC =
        b_.template at<uint4>(cut_.shared.x_dbl + 2 * x_dbl_place(kSeqs, 0, cut_.dt_rank));
    constexpr int kVectors = kSeqs * 2 * kClusterStates / 8;
    if (w_.thread < kVectors) b_.template at<uint4>(cut_.shared.BC)[w_.thread] = BC[w_.thread];
    Warps::tell(b_.place_left());
    Warps::meet();  // all that the scan takes is there
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
  // Each warpgroup takes every third stage.
  __device__ void out_proj(uint32_t phase) {
    wait_for_phase(b_.y_full(), phase);
    const int stages = cut_.d_inner / (kClusterOutSteps * kClusterTile);
    const uint64_t y = blocks_descriptor(b_.address(cut_.shared.y), 128, cut_.d_inner * 16);
    float* const sums =
        b_.template at<float>(cut_.shared.out_sums) + w_.group * kSeqs * cut_.out_pitch();
    float d[kSums] = {};
    w_.product_in_turn(d, stages, [&](uint32_t stage, int i) {
#pragma unroll
      for (int step = 0; step < kClusterOutSteps; ++step)
        Warps::multiply_step(d, tile_descriptor(Warps::tile_at(stage, step, cut_.outputs, 0)), y,
                             i * kClusterOutSteps + step);
    });
    Warps::meet();  // y has been read
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      sums[Warps::seq_of(i) * cut_.out_pitch() + Warps::row_of(i)] = d[i];
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
