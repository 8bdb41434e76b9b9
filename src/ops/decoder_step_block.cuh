// decoder_step: a block's way through the model, product by product.
#pragma once

#include "ops/decoder_step_exchange.cuh"
#include "ops/decoder_step_tiles.cuh"

namespace krait::cuda {

template <int kSeqs, class W>
class Decoder {
 public:
  __device__ __forceinline__ Decoder(const DecoderArgs& args, const DecoderProducts<W>& products,
                                     const WeightRing& ring, char* memory)
      : a_(args),
        products_(products),
        weights_(ring),
        narrow_{reinterpret_cast<bf16*>(memory + args.shared.narrow), args.narrow_stride,
                reinterpret_cast<float*>(memory + args.shared.scale),
                reinterpret_cast<float*>(memory + args.shared.partial)},
        wide_{reinterpret_cast<bf16*>(memory + args.shared.wide), args.wide_stride,
              narrow_.scale + kSeqs, narrow_.partial},
        narrow_rows_(args, narrow_),
        wide_rows_(args, wide_),
        wide_parts_(args, wide_, args.d_inner * static_cast<int>(sizeof(bf16)) / kDecoderParts),
        sums_(reinterpret_cast<float*>(memory + args.shared.sums)),
        x_dbl_(reinterpret_cast<float*>(memory + args.shared.x_dbl)),
        gate_(reinterpret_cast<float*>(memory + args.shared.gate)),
        u_(reinterpret_cast<float*>(memory + args.shared.u)),
        residual_(reinterpret_cast<float*>(memory + args.shared.residual)),
        slots_(reinterpret_cast<int*>(memory + args.shared.slots)),
        channels_(products.shape(DecoderProduct::in_x).count),
        first_channel_(products.shape(DecoderProduct::in_x).first),
        exchange_(args, first_channel_) {
    if (const int seq = thread_index(); seq < args.num_seqs)
      slots_[seq] = args.slot ? args.slot[seq] : seq;
    take_own_residual();
    sync_multipliers();  // the slots are there
    item_ = scan_item(0);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int layer = 0; layer < a_.n_layer; ++layer) {
      exchange_.begin_layer(layer);
      multiply<DecoderProduct::in_x>(layer);
      multiply<DecoderProduct::in_z>(layer);
      multiply<DecoderProduct::x_proj>(layer);
      States states = states_of(layer, 0);
      scan(layer, states);
      multiply<DecoderProduct::out_proj>(layer);
    }
    if (!a_.head) return;  // the launch after this one goes on
    multiply<DecoderProduct::head>(a_.n_layer);
    exchange_.clear(slots_);
  }

 private:
  // What a thread needs besides the sum of its row and sequence of a product, asked for before the
  // vectors are awaited.
  struct Scaled {
    float scale = 1, bias = 0;
    uint32_t gone = 0;
  };
  // In in_x the convolution's taps and the inputs before.
  struct Conv {
    Floats<4> taps{};
    float x0 = 0, x1 = 0, x2 = 0, bias = 0;
    uint32_t gone = 0;
    StatesAt window;
  };
  // A thread scans four states of one of the block's channels for kScanSeqs sequences, and
  // another's kScanThreads items further.
  static constexpr int kScanSeqs = kSeqs == 1 ? 1 : 2;
  static constexpr int kScanThreads = kDecoderThreads / (kSeqs / kScanSeqs);
  struct ScanItem {
    int quad, channel;  // none: channel >= channels_
  };
  struct States {
    Floats<4> h[kScanSeqs]{}, A{};
    float D = 0, dt_bias = 0;
    Packed<bf16, 8> dt_proj[kDecoderDtPieces]{};  // every so many-th of the channel's row
    StatesAt place[kScanSeqs];
    uint32_t gone[kScanSeqs]{};
  };

  static constexpr int kGroupRows = decoder_group_rows(kSeqs);
  static constexpr int kGroupTiles = kGroupRows / kDecoderTile;

  // Whether weights have scales, and vectors come in bytes, too.
  static constexpr bool is_scaled(DecoderProduct kind) {
    return sizeof(W) == 1 && kind != DecoderProduct::x_proj;
  }

  __device__ int64_t slot_of(int seq) const { return slots_[seq]; }

  // The vectors are awaited and multiplied, and what comes of the sums is published. Thread i has
  // row i / kSeqs and sequence i % kSeqs of a group of tiles.
  template <DecoderProduct kKind>
  __device__ __forceinline__ void multiply(int layer) {
    const ProductShape& shape = products_.shape(kKind);
    if (shape.count == 0) return;
    const int tiles = shape.tiles, row_bytes = shape.bytes, halved = shape.halved;
    const int row = thread_index() / kSeqs, seq = thread_index() % kSeqs;
    Scaled scaled = scale_of<kKind>(layer, 0, row, seq);
    Conv conv;
    if constexpr (kKind == DecoderProduct::in_x) conv = conv_of(layer, 0, row, seq);
    if constexpr (kKind != DecoderProduct::in_z) await_vectors<kKind>(layer);  // in_x's
    sync_multipliers();  // the vectors are there, the last sums have been read
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += kGroupTiles) {
      if (tile > 0) {
        scaled = scale_of<kKind>(layer, tile, row, seq);
        if constexpr (kKind == DecoderProduct::in_x) conv = conv_of(layer, tile, row, seq);
        sync_multipliers();  // the last group's sums have been read
      }
      const int in_group = min(kGroupTiles, tiles - tile);
      if constexpr (kKind == DecoderProduct::x_proj)
        wide_parts_.multiply(weights_, row_bytes, in_group, halved - tile, sums_);
      else if constexpr (kKind == DecoderProduct::out_proj)
        wide_rows_.multiply(weights_, row_bytes, in_group, halved - tile, sums_);
      else
        narrow_rows_.multiply(weights_, row_bytes, in_group, halved - tile, sums_);
      sync_multipliers();  // every warp's sums are there
      if (thread_index() / 32 * 32 >= in_group * kDecoderTile * kSeqs) continue;
      const float sum = sum_of(row, seq);
      if constexpr (is_scaled(kKind))
        scaled.scale *= (kKind == DecoderProduct::out_proj ? wide_ : narrow_).scale[seq];
      finish<kKind>(tile, row, seq, sum, scaled, conv);
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
      if constexpr (kKind == DecoderProduct::in_x || kKind == DecoderProduct::in_z)
        scale = l.in_scale, bias = l.in_bias;
      if constexpr (kKind == DecoderProduct::out_proj) scale = l.out_scale, bias = l.out_bias;
    }
    constexpr bool kPublishes =
        kKind == DecoderProduct::x_proj || kKind == DecoderProduct::out_proj;
    if (!is_scaled(kKind) && !bias && !kPublishes) return s;
    const ProductShape& shape = products_.shape(kKind);
    const int index = row_of(kKind, tile, row);
    if (!is_there<kKind>(index, row, seq)) return s;
    const int at = shape.first + index;
    if constexpr (kKind == DecoderProduct::x_proj)
      s.gone = exchange_.gone_of(exchange_.x_dbl_word(seq, at));
    if constexpr (kKind == DecoderProduct::out_proj)
      s.gone = exchange_.gone_of(exchange_.residual_word(seq, at));
    if constexpr (is_scaled(kKind)) s.scale = scale[at];
    if (bias) s.bias = bias[at];
    return s;
  }

  __device__ __forceinline__ Conv conv_of(int layer, int tile, int row, int seq) const {
    const DecoderLayerArgs& l = products_.layer(layer);
    const int index = row_of(DecoderProduct::in_x, tile, row);
    const int channel = first_channel_ + index;
    Conv c;
    if (index >= channels_ || seq >= a_.num_seqs) return c;
    c.taps = load_vector<4>(l.conv_weight + 4 * channel);
    if (l.conv_bias) c.bias = l.conv_bias[channel];
    if (index % 2 == 0) c.gone = exchange_.gone_of(exchange_.pair_word(a_.u, seq, index));
    c.window = StatesAt{l.conv, a_.bf16_states} + (slot_of(seq) * 3 * a_.d_inner + channel);
    c.x0 = load_states<1>(c.window)[0];
    c.x1 = load_states<1>(c.window + a_.d_inner)[0];
    c.x2 = load_states<1>(c.window + 2 * a_.d_inner)[0];
    return c;
  }

  // Number among the block's rows.
  static __device__ int row_of(DecoderProduct kind, int tile, int row) {
    if (kind == DecoderProduct::x_proj)
      return (tile + row / kDecoderTile) * kDecoderPartRows + row % kDecoderTile;
    return tile * kDecoderTile + row;
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
        r = __uint_as_float(~exchange_.now()[decoder_word_place(exchange_.residual_word(seq, at))]);
      residual_[seq * a_.max_out_rows + row] = r;
    }
  }

  template <DecoderProduct kKind>
  __device__ __forceinline__ void await_vectors(int layer) const {
    if constexpr (kKind == DecoderProduct::in_x || kKind == DecoderProduct::head) {
      const float* weight = kKind == DecoderProduct::head ? a_.norm_f : products_.layer(layer).norm;
      ResidualTaker<kSeqs, W> residual(a_, weight);
      const bool is_head = kKind == DecoderProduct::head;
      residual.take(narrow_, layer == 0 ? a_.embedding : nullptr,
                    is_head ? exchange_.now() : exchange_.before());
    } else if constexpr (kKind == DecoderProduct::x_proj) {
      take_vectors<kSeqs, bf16>(a_, wide_, exchange_.now(), a_.u, a_.d_inner);
    } else {
      prefetch_norm(layer + 1);
      take_vectors<kSeqs, W>(a_, wide_, exchange_.now(), a_.y, a_.d_inner);
    }
  }

  // The weights of a layer's norm, on their way to the cache before they are needed.
  __device__ __forceinline__ void prefetch_norm(int layer) const {
    const float* norm = layer < a_.n_layer ? products_.layer(layer).norm : a_.norm_f;
    const int line = thread_index() * 32;
    if (norm && line < a_.d_model)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(norm + line)));
  }

  template <DecoderProduct kKind>
  __device__ bool is_there(int index, int row, int seq) const {
    return index < products_.shape(kKind).count && seq < a_.num_seqs &&
           (kKind != DecoderProduct::x_proj || row % kDecoderTile < kDecoderPartRows);
  }

  // All lanes of the warp call it, for rows and sequences too that are not there.
  template <DecoderProduct kKind>
  __device__ __forceinline__ void finish(int tile, int row, int seq, float sum,
                                         const Scaled& scaled, const Conv& conv) {
    const ProductShape& shape = products_.shape(kKind);
    const int index = row_of(kKind, tile, row);
    const float value = fmaf(sum, scaled.scale, scaled.bias);
    if constexpr (kKind == DecoderProduct::in_x) {
      convolve(index, seq, round_bf16(value), conv);
    } else if (!is_there<kKind>(index, row, seq)) {
      return;
    } else if constexpr (kKind == DecoderProduct::in_z) {
      gate_[seq * a_.max_channels + index] = silu(round_bf16(value));
    } else if constexpr (kKind == DecoderProduct::x_proj) {
      exchange_.publish(exchange_.x_dbl_word(seq, shape.first + index),
                        __float_as_uint(round_bf16(value)), scaled.gone);
    } else if constexpr (kKind == DecoderProduct::out_proj) {
      float& own = residual_[seq * a_.max_out_rows + index];
      const float r = own + round_bf16(value);
      own = a_.residual_f32 ? r : round_bf16(r);
      exchange_.publish(exchange_.residual_word(seq, shape.first + index), __float_as_uint(own),
                        scaled.gone);
    } else {
      a_.logits[seq * a_.logits_stride + shape.first + index] = value;
    }
  }

  // in_proj's x goes through the convolution: u is kept and published.
  __device__ __forceinline__ void convolve(int channel, int seq, float x, const Conv& c) {
    float s = fmaf(c.taps[0], c.x0, c.bias);
    s = fmaf(c.taps[1], c.x1, s);
    s = fmaf(c.taps[2], c.x2, s);
    s = fmaf(c.taps[3], x, s);
    const float u = round_bf16(silu(s)), next = __shfl_down_sync(~0u, u, kSeqs);
    if (!c.window.states) return;
    if (channel % 2 == 0)
      exchange_.publish(exchange_.pair_word(a_.u, seq, channel), pack_bf16(u, next), c.gone);
    u_[seq * a_.max_channels + channel] = u;
    store_states<1>(c.window, {c.x1});
    store_states<1>(c.window + a_.d_inner, {c.x2});
    store_states<1>(c.window + 2 * a_.d_inner, {x});
  }

  static __device__ int first_scan_seq() { return thread_index() / kScanThreads * kScanSeqs; }
  // Of items `first` and the following, one to a thread.
  __device__ ScanItem scan_item(int first) const {
    const int quads = a_.d_state / 4, item = first + thread_index() % kScanThreads;
    return {item % quads, item / quads};
  }

  __device__ __forceinline__ States states_of(int layer, int first) const {
    const DecoderLayerArgs& l = products_.layer(layer);
    const ScanItem i = first == 0 ? item_ : scan_item(first);
    States s;
    if (i.channel >= channels_ || first_scan_seq() >= a_.num_seqs) return s;
    const int channel = first_channel_ + i.channel;
    const int64_t at = static_cast<int64_t>(channel) * a_.d_state + 4 * i.quad;
#pragma unroll
    for (int k = 0; k < kScanSeqs; ++k)
      if (const int seq = first_scan_seq() + k; seq < a_.num_seqs) {
        s.place[k] =
            StatesAt{l.ssm, a_.bf16_states} + (slot_of(seq) * a_.d_inner * a_.d_state + at);
        s.h[k] = load_states<4>(s.place[k]);
        if (i.quad == 0 && i.channel % 2 == 0)
          s.gone[k] = exchange_.gone_of(exchange_.pair_word(a_.y, seq, i.channel));
      }
    s.A = load_vector<4>(l.A + at);
    s.D = l.D[channel];
    s.dt_bias = l.dt_bias[channel];
    const bf16* const dt_proj = l.dt_proj + static_cast<int64_t>(channel) * a_.dt_rank;
#pragma unroll
    for (int k = 0; k < kDecoderDtPieces; ++k)
      if (const int at_dt = 8 * (i.quad + k * (a_.d_state / 4)); at_dt < a_.dt_rank)
        s.dt_proj[k] = load_packed<8>(dt_proj + at_dt);
    return s;
  }

  // A lane's share of dt_proj's sum for its channel and a sequence.
  __device__ __forceinline__ float share_of_dt(const States& s, int quad, int seq) const {
    const int quads = a_.d_state / 4;
    const float* const dt = x_dbl_ + seq * a_.x_proj_rows;
    Floats<4> sum{};
#pragma unroll
    for (int k = 0; k < kDecoderDtPieces; ++k)
      if (const int at = 8 * (quad + k * quads); at < a_.dt_rank) {
        const Floats<8> w = unpack(s.dt_proj[k]), x = load_vector<8>(dt + at);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j % 4] = fmaf(w[j], x[j], sum[j % 4]);
      }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // x_proj's outputs are awaited; the scan of the block's channels, y is published. s: of the first
  // items.
  __device__ __forceinline__ void scan(int layer, States& s) {
    const int items = channels_ * (a_.d_state / 4);
    take_x_dbl<kSeqs>(a_, x_dbl_, exchange_.now());
    sync_multipliers();  // they are there
#pragma unroll 1
    for (int first = 0; first < items; first += kScanThreads) {
      if (first > 0) s = states_of(layer, first);
      const ScanItem i = first == 0 ? item_ : scan_item(first);
#pragma unroll
      for (int k = 0; k < kScanSeqs; ++k)
        scan(i, first_scan_seq() + k, s, s.h[k], s.place[k], s.gone[k]);
    }
  }

  // By all lanes of a warp, also those of channels and sequences that are not there.
  __device__ __forceinline__ void scan(const ScanItem& i, int seq, const States& s, Floats<4>& h,
                                       const StatesAt& place, uint32_t gone) {
    const int quads = a_.d_state / 4, at = seq * a_.max_channels + i.channel;
    float y = 0, u = 0, dt = place.states ? share_of_dt(s, i.quad, seq) : 0;
    for (int d = quads / 2; d > 0; d /= 2) dt += __shfl_xor_sync(~0u, dt, d);
    if (place.states) {
      const float* B = x_dbl_ + seq * a_.x_proj_rows + a_.dt_rank + 4 * i.quad;
      const float* C = B + a_.d_state;
      u = u_[at];
      const float delta = softplus(round_bf16(dt) + s.dt_bias);
      const float input = delta * u, log2_delta = delta * kLog2E;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        h[k] = fmaf(exp2_approx(log2_delta * s.A[k]), h[k], input * B[k]);
        y = fmaf(C[k], h[k], y);
      }
    }
    for (int d = quads / 2; d > 0; d /= 2) y += __shfl_xor_sync(~0u, y, d);
    if (place.states) y = round_bf16(fmaf(s.D, u, y) * gate_[at]);
    const float next = __shfl_down_sync(~0u, y, static_cast<unsigned>(quads));
    if (place.states && i.quad == 0 && i.channel % 2 == 0)
      exchange_.publish(exchange_.pair_word(a_.y, seq, i.channel), pack_bf16(y, next), gone);
    if (place.states) store_states<4>(place, h);
  }

  const DecoderArgs& a_;
  const DecoderProducts<W>& products_;
  WeightReader weights_;
  const Vectors narrow_, wide_;
  const TileMultiplier<kSeqs, RowProduct<W, kSeqs>> narrow_rows_, wide_rows_;
  const TileMultiplier<kSeqs, PartProduct<kSeqs>> wide_parts_;
  float* sums_;       // (warps, rows of a group, kSeqs)
  float* x_dbl_;      // (kSeqs, x_proj_rows)
  float *gate_, *u_;  // (kSeqs, max_channels)               silu(z)
  float* residual_;   // (kSeqs, max_out_rows)
  int* slots_;        // (kSeqs)
  const int channels_, first_channel_;
  LayerExchange exchange_;
  ScanItem item_;
};

}  // namespace krait::cuda
