// decoder_step: a block's way through the model, product by product.
#pragma once

#include "ops/decoder_step.cuh"

namespace krait::cuda {

template <int kSeqs, class W>
class Decoder {
 public:
  __device__ __forceinline__ Decoder(const DecoderArgs& args, const DecoderProducts<W>& products,
                                     const WeightRing& ring, char* memory)
      : a_(args),
        products_(products),
        weights_(ring),
        vectors_{reinterpret_cast<bf16*>(memory + args.shared.x),
                 reinterpret_cast<float*>(memory + args.shared.scale),
                 reinterpret_cast<float*>(memory + args.shared.partial)},
        plain_(args, vectors_.x),
        scaled_(args, vectors_.x),
        sums_(reinterpret_cast<float*>(memory + args.shared.sums)),
        x_dbl_(reinterpret_cast<float*>(memory + args.shared.x_dbl)),
        gate_(reinterpret_cast<float*>(memory + args.shared.gate)),
        u_(reinterpret_cast<float*>(memory + args.shared.u)),
        residual_(reinterpret_cast<float*>(memory + args.shared.residual)),
        slots_(reinterpret_cast<int*>(memory + args.shared.slots)),
        round_(*static_cast<const volatile uint32_t*>(args.round)),
        channels_(products.shape(DecoderProduct::in_proj).count),
        first_channel_(products.shape(DecoderProduct::in_proj).first) {
    if (const int seq = thread_index(); seq < args.num_seqs)
      slots_[seq] = args.slot ? args.slot[seq] : seq;
    take_own_residual();
    sync_multipliers();  // the slots are there
    item_ = scan_item(thread_index());
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int layer = 0; layer < a_.n_layer; ++layer) {
      multiply<DecoderProduct::in_proj>(layer);
      multiply<DecoderProduct::x_proj>(layer);
      multiply<DecoderProduct::dt_proj>(layer);
      multiply<DecoderProduct::out_proj>(layer);
    }
    if (a_.head) multiply<DecoderProduct::head>(a_.n_layer);
    // Every block has read the old number: this one has heard from all of them since.
    if (blockIdx.x == 0 && threadIdx.x == 0) *a_.round = round_ + static_cast<uint32_t>(a_.n_layer);
  }

 private:
  // What a thread needs besides the sum of its row and sequence of a product, asked for before the
  // vectors are awaited.
  struct Scaled {
    float scale = 1, bias = 0;
  };
  // In x's part of in_proj the convolution's taps and the inputs before.
  struct Conv {
    Floats<4> taps{};
    float x0 = 0, x1 = 0, x2 = 0, bias = 0;
    StatesAt window;
  };
  // Four states of one of the block's channels for one sequence, of which item i is the i-th.
  struct ScanItem {
    int quad, channel, seq;
  };
  struct States {
    Floats<4> h{}, A{};
    float D = 0, dt_bias = 0;
    StatesAt place;
  };

  static constexpr int kGroupRows = decoder_group_rows(kSeqs);
  static constexpr int kGroupTiles = kGroupRows / kDecoderTile;

  // Whether weights have scales, and vectors come in bytes, too.
  static constexpr bool is_scaled(DecoderProduct kind) {
    return sizeof(W) == 1 && kind != DecoderProduct::x_proj && kind != DecoderProduct::dt_proj;
  }

  __device__ uint32_t round_of(int layer) const {
    return round_ + static_cast<uint32_t>(layer) + 1;
  }
  __device__ int64_t slot_of(int seq) const { return slots_[seq]; }

  // The vectors are awaited and multiplied, and what comes of the sums is published. Thread i has
  // row i / kSeqs and sequence i % kSeqs of a group of tiles.
  template <DecoderProduct kKind>
  __device__ __forceinline__ void multiply(int layer) {
    const ProductShape& shape = products_.shape(kKind);
    if (shape.count == 0) return;
    const int tiles = shape.tiles, row_bytes = shape.row_bytes;
    const int row = thread_index() / kSeqs, seq = thread_index() % kSeqs;
    Scaled scaled = scale_of<kKind>(layer, 0, row, seq);
    Conv conv;
    if constexpr (kKind == DecoderProduct::in_proj) conv = conv_of(layer, 0, row, seq);
    States states;
    if constexpr (kKind == DecoderProduct::dt_proj) states = states_of(layer, item_);
    await_vectors<kKind>(layer);
    sync_multipliers();  // the vectors are there
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += kGroupTiles) {
      if (tile > 0) {
        scaled = scale_of<kKind>(layer, tile, row, seq);
        if constexpr (kKind == DecoderProduct::in_proj) conv = conv_of(layer, tile, row, seq);
        sync_multipliers();  // the last group's sums have been read
      }
      const int in_group = min(kGroupTiles, tiles - tile);
      if constexpr (is_scaled(kKind))
        scaled_.multiply(weights_, row_bytes, in_group, sums_);
      else
        plain_.multiply(weights_, row_bytes, in_group, sums_);
      sync_multipliers();  // every warp's sums are there
      if constexpr (kKind == DecoderProduct::dt_proj) {
        return scan(layer, states);  // all channels are in one group
      } else {
        if (thread_index() / 32 * 32 >= in_group * kDecoderTile * kSeqs) continue;
        const float sum = sum_of(row, seq);
        if constexpr (is_scaled(kKind)) scaled.scale *= vectors_.scale[seq];
        finish<kKind>(layer, tile, row, seq, sum, scaled, conv);
      }
    }
  }

  // Of a row of the group and a sequence.
  __device__ __forceinline__ float sum_of(int row, int seq) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kDecoderWarps; ++w) sum += sums_[(w * kGroupRows + row) * kSeqs + seq];
    return sum;
  }

  // Scale and bias of row `row` of the group that begins with `tile`.
  template <DecoderProduct kKind>
  __device__ __forceinline__ Scaled scale_of(int layer, int tile, int row, int seq) const {
    Scaled s;
    const float *scale = nullptr, *bias = nullptr;
    if constexpr (kKind == DecoderProduct::head) {
      scale = a_.head_scale;
    } else {
      const DecoderLayerArgs& l = products_.layer(layer);
      if constexpr (kKind == DecoderProduct::in_proj) scale = l.in_scale, bias = l.in_bias;
      if constexpr (kKind == DecoderProduct::out_proj) scale = l.out_scale, bias = l.out_bias;
    }
    if (!is_scaled(kKind) && !bias) return s;
    const ProductShape& shape = products_.shape(kKind);
    const int index = row_of(kKind, tile, row);
    if (index >= shape.count || seq >= a_.num_seqs) return s;
    const int at =
        shape.first + index + (kKind == DecoderProduct::in_proj && is_high(row) ? a_.d_inner : 0);
    if constexpr (is_scaled(kKind)) s.scale = scale[at];
    if (bias) s.bias = bias[at];
    return s;
  }

  __device__ __forceinline__ Conv conv_of(int layer, int tile, int row, int seq) const {
    const DecoderLayerArgs& l = products_.layer(layer);
    const int index = row_of(DecoderProduct::in_proj, tile, row);
    const int channel = first_channel_ + index;
    Conv c;
    if (is_high(row) || index >= channels_ || seq >= a_.num_seqs) return c;
    c.taps = load_vector<4>(l.conv_weight + 4 * channel);
    if (l.conv_bias) c.bias = l.conv_bias[channel];
    c.window = StatesAt{l.conv, a_.bf16_states} + (slot_of(seq) * 3 * a_.d_inner + channel);
    c.x0 = load_states<1>(c.window)[0];
    c.x1 = load_states<1>(c.window + a_.d_inner)[0];
    c.x2 = load_states<1>(c.window + 2 * a_.d_inner)[0];
    return c;
  }

  // Whether a row of a group is one of its tile's high rows, which in in_proj are z's.
  static __device__ bool is_high(int row) { return row % kDecoderTile >= kDecoderTile / 2; }
  // Number among the block's rows, of in_proj among its channels.
  static __device__ int row_of(DecoderProduct kind, int tile, int row) {
    if (kind != DecoderProduct::in_proj) return tile * kDecoderTile + row;
    return (tile + row / kDecoderTile) * 8 + row % 8;
  }

  // This block's rows of the residual, (kSeqs, max_out_rows): from the embedding, or as the launch
  // before has left them.
  __device__ __forceinline__ void take_own_residual() const {
    const ProductShape& own = products_.shape(DecoderProduct::out_proj);
#pragma unroll 1
    for (int i = thread_index(); i < own.count * a_.num_seqs; i += kDecoderThreads) {
      const int seq = i / own.count, row = i % own.count, at = own.first + row;
      float r;
      if (a_.embedding)
        r = load_vector<1>(a_.embedding + static_cast<int64_t>(a_.tokens[seq]) * a_.d_model +
                           at)[0];
      else
        r = __uint_as_float(a_.residual[seq * a_.d_model + at].x);
      residual_[seq * a_.max_out_rows + row] = r;
    }
  }

  template <DecoderProduct kKind>
  __device__ __forceinline__ void await_vectors(int layer) const {
    if constexpr (kKind == DecoderProduct::in_proj || kKind == DecoderProduct::head) {
      const float* weight = kKind == DecoderProduct::head ? a_.norm_f : products_.layer(layer).norm;
      ResidualTaker<kSeqs, W> residual(a_, weight);
      residual.take(vectors_, layer == 0 ? a_.embedding : nullptr, round_of(layer - 1));
    } else if constexpr (kKind == DecoderProduct::dt_proj) {
      take_x_dbl<kSeqs>(a_, vectors_.x, x_dbl_, round_of(layer));
    } else if constexpr (kKind == DecoderProduct::x_proj) {
      take_vectors<kSeqs, bf16>(a_, vectors_, a_.u, a_.d_inner, round_of(layer));
    } else {
      prefetch_norm(layer + 1);
      take_vectors<kSeqs, W>(a_, vectors_, a_.y, a_.d_inner, round_of(layer));
    }
  }

  // The weights of a layer's norm, on their way to the cache before they are needed.
  __device__ __forceinline__ void prefetch_norm(int layer) const {
    const float* norm = layer < a_.n_layer ? products_.layer(layer).norm : a_.norm_f;
    const int line = thread_index() * 32;
    if (norm && line < a_.d_model)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(norm + line)));
  }

  // All lanes of the warp call it, for rows and sequences too that are not there.
  template <DecoderProduct kKind>
  __device__ __forceinline__ void finish(int layer, int tile, int row, int seq, float sum,
                                         const Scaled& scaled, const Conv& conv) {
    const ProductShape& shape = products_.shape(kKind);
    const int index = row_of(kKind, tile, row);
    const bool there = index < shape.count && seq < a_.num_seqs;
    const float value = fmaf(sum, scaled.scale, scaled.bias);
    if constexpr (kKind == DecoderProduct::in_proj) {
      convolve(layer, index, seq, there && is_high(row), round_bf16(value), conv);
    } else if (!there) {
      return;
    } else if constexpr (kKind == DecoderProduct::x_proj) {
      publish(a_.x_dbl + seq * a_.x_proj_rows + shape.first + index,
              __float_as_uint(round_bf16(value)), round_of(layer));
    } else if constexpr (kKind == DecoderProduct::out_proj) {
      float& own = residual_[seq * a_.max_out_rows + index];
      const float r = own + round_bf16(value);
      own = a_.residual_f32 ? r : round_bf16(r);
      publish(a_.residual + seq * a_.d_model + shape.first + index, __float_as_uint(own),
              round_of(layer));
    } else {
      a_.logits[seq * a_.logits_stride + shape.first + index] = value;
    }
  }

  // Of in_proj's outputs x goes through the convolution: u is kept and published. Of z the gate is
  // kept.
  __device__ __forceinline__ void convolve(int layer, int channel, int seq, bool is_z, float x,
                                           const Conv& c) {
    const bool is_x = c.window.states;
    float s = x;
    if (is_x) {
      s = fmaf(c.taps[0], c.x0, c.bias);
      s = fmaf(c.taps[1], c.x1, s);
      s = fmaf(c.taps[2], c.x2, s);
      s = fmaf(c.taps[3], x, s);
    }
    s = silu(s);
    const float u = round_bf16(s), next = __shfl_down_sync(~0u, u, kSeqs);
    if (is_x && channel % 2 == 0)
      publish(a_.u + seq * (a_.d_inner / 2) + (first_channel_ + channel) / 2, pack_bf16(u, next),
              round_of(layer));
    if (is_x) {
      u_[seq * a_.max_channels + channel] = u;
      store_states<1>(c.window, {c.x1});
      store_states<1>(c.window + a_.d_inner, {c.x2});
      store_states<1>(c.window + 2 * a_.d_inner, {x});
    } else if (is_z) {
      gate_[seq * a_.max_channels + channel] = s;
    }
  }

  __device__ ScanItem scan_item(int item) const {
    const int quads = a_.d_state / 4;
    return {item % quads, item / quads % channels_, item / quads / channels_};
  }

  __device__ __forceinline__ States states_of(int layer, const ScanItem& i) const {
    const DecoderLayerArgs& l = products_.layer(layer);
    States s;
    if (i.seq >= a_.num_seqs) return s;
    const int channel = first_channel_ + i.channel;
    const int64_t at = static_cast<int64_t>(channel) * a_.d_state + 4 * i.quad;
    s.place = StatesAt{l.ssm, a_.bf16_states} + (slot_of(i.seq) * a_.d_inner * a_.d_state + at);
    s.h = load_states<4>(s.place);
    s.A = load_vector<4>(l.A + at);
#pragma unroll
    for (int k = 0; k < 4; ++k) s.A[k] *= kLog2E;
    s.D = l.D[channel];
    s.dt_bias = l.dt_bias[channel];
    return s;
  }

  // The scan of the block's channels, whose deltas are in the sums; y is published.
  __device__ __forceinline__ void scan(int layer, States& s) {
    const int quads = a_.d_state / 4, items = a_.num_seqs * channels_ * quads;
    ScanItem i = item_;
#pragma unroll 1
    for (int first = 0; first < items; first += kDecoderThreads) {
      if (first > 0) {
        i = scan_item(first + thread_index());
        s = states_of(layer, i);
      }
      const int at = i.seq * a_.max_channels + i.channel;
      float y = 0, u = 0;
      if (s.place.states) {
        const float* B = x_dbl_ + i.seq * a_.x_proj_rows + a_.dt_rank + 4 * i.quad;
        const float* C = B + a_.d_state;
        u = u_[at];
        const float delta = softplus(round_bf16(sum_of(i.channel, i.seq)) + s.dt_bias);
        const float input = delta * u;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          s.h[k] = fmaf(exp2_approx(delta * s.A[k]), s.h[k], input * B[k]);
          y = fmaf(C[k], s.h[k], y);
        }
      }
      for (int d = quads / 2; d > 0; d /= 2) y += __shfl_xor_sync(~0u, y, d);
      if (s.place.states) y = round_bf16(fmaf(s.D, u, y) * gate_[at]);
      const float next = __shfl_down_sync(~0u, y, static_cast<unsigned>(quads));
      if (s.place.states && i.quad == 0 && i.channel % 2 == 0)
        publish(a_.y + i.seq * (a_.d_inner / 2) + (first_channel_ + i.channel) / 2,
                pack_bf16(y, next), round_of(layer));
      if (s.place.states) store_states<4>(s.place, s.h);
    }
  }

  const DecoderArgs& a_;
  const DecoderProducts<W>& products_;
  WeightReader weights_;
  const Vectors vectors_;
  const TileMultiplier<kSeqs, bf16> plain_;
  const TileMultiplier<kSeqs, W> scaled_;
  float* sums_;       // (warps, rows of a group, kSeqs)
  float* x_dbl_;      // (kSeqs, x_proj_rows)                 B and C
  float *gate_, *u_;  // (kSeqs, max_channels)               silu(z)
  float* residual_;   // (kSeqs, max_out_rows)
  int* slots_;        // (kSeqs)
  const uint32_t round_;
  const int channels_, first_channel_;
  ScanItem item_;
};

}  // namespace krait::cuda
