// decoder_step: a block's way through the model, product by product.
#pragma once

#include "ops/decoder_step.cuh"

namespace krait::cuda {

template <int kSeqs, class W>
class Decoder {
 public:
  __device__ __forceinline__ Decoder(const DecoderArgs& args, char* memory)
      : a_(args),
        products_(args, shapes_in(args, memory), layers_in(args, memory)),
        ring_(ring_in(args, memory), products_),
        x_(reinterpret_cast<bf16*>(memory + args.shared.x)),
        sums_(reinterpret_cast<float*>(memory + args.shared.sums)),
        x_dbl_(reinterpret_cast<float*>(memory + args.shared.x_dbl)),
        z_(reinterpret_cast<float*>(memory + args.shared.z)),
        u_(reinterpret_cast<float*>(memory + args.shared.u)),
        delta_(reinterpret_cast<float*>(memory + args.shared.delta)),
        residual_(reinterpret_cast<float*>(memory + args.shared.residual)),
        norm_(reinterpret_cast<float*>(memory + args.shared.norm)),
        slots_(reinterpret_cast<int*>(memory + args.shared.slots)),
        round_(*static_cast<const volatile uint32_t*>(args.round)) {
    if (const int seq = static_cast<int>(threadIdx.x); seq < args.num_seqs)
      slots_[seq] = args.slot ? args.slot[seq] : seq;
    __syncthreads();  // the slots are there
  }

  static __device__ ProductShape* shapes_in(const DecoderArgs& a, char* memory) {
    return reinterpret_cast<ProductShape*>(memory + a.shared.shapes);
  }
  static __device__ DecoderLayerArgs* layers_in(const DecoderArgs& a, char* memory) {
    return reinterpret_cast<DecoderLayerArgs*>(memory + a.shared.layers);
  }
  static __device__ const void* ring_in(const DecoderArgs& a, char* memory) {
    __syncthreads();  // the shapes are there, which the ring, made next, reads
    return memory + a.shared.ring;
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int product = 0; product < products_.count(); ++product) multiply(product);
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
    float* state = nullptr;  // null: none
  };
  // In dt_proj states of the scan (of item thread_index(), not of the row).
  struct States {
    Floats<4> h{}, A{};
    float D = 0;
    float* state = nullptr;  // null: none
  };

  static constexpr int kGroupRows = decoder_group_rows(kSeqs);
  static constexpr int kGroupTiles = kGroupRows / kDecoderTile;

  __device__ uint32_t round_of(int layer) const {
    return round_ + static_cast<uint32_t>(layer) + 1;
  }
  __device__ int channels() const { return products_.shape(DecoderProduct::in_proj).count; }
  __device__ int first_channel() const { return products_.shape(DecoderProduct::in_proj).first; }
  __device__ int64_t slot_of(int seq) const { return slots_[seq]; }

  // Product by product: the vectors are awaited and multiplied, and what comes of the sums is
  // published. Thread i has row i / kSeqs and sequence i % kSeqs of a group of tiles.
  __device__ __forceinline__ void multiply(int product) {
    const DecoderProduct kind = products_.kind(product);
    const ProductShape& shape = products_.shape(kind);
    if (shape.count == 0) return;
    const int tiles = shape.tiles, row_bytes = shape.row_bytes;
    const int layer = product / 4, item = thread_index();
    const int row = item / kSeqs, seq = item % kSeqs;
    Scaled scaled = scale_of(kind, layer, 0, row, seq);
    Conv conv;
    if (kind == DecoderProduct::in_proj) conv = conv_of(layer, 0, row, seq);
    States states;
    if (kind == DecoderProduct::dt_proj) states = states_of(layer, item);
    await_vectors(kind, layer);
    __syncthreads();  // the vectors are there
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += kGroupTiles) {
      if (tile > 0) {
        scaled = scale_of(kind, layer, tile, row, seq);
        if (kind == DecoderProduct::in_proj) conv = conv_of(layer, tile, row, seq);
        __syncthreads();  // the last group's sums have been read
      }
      const int in_group = min(kGroupTiles, tiles - tile);
      if (sizeof(W) == 2 || kind == DecoderProduct::x_proj || kind == DecoderProduct::dt_proj)
        multiply_tiles<kSeqs, bf16>(a_, ring_, products_, row_bytes, in_group, x_, sums_);
      else
        multiply_tiles<kSeqs, W>(a_, ring_, products_, row_bytes, in_group, x_, sums_);
      __syncthreads();                           // every warp's sums are there
      if (item >= kGroupRows * kSeqs) continue;  // whole warps
      float sum = 0;
      if (row < in_group * kDecoderTile) {
#pragma unroll
        for (int w = 0; w < kDecoderWarps; ++w) sum += sums_[w * (kGroupRows * kSeqs) + item];
      }
      finish(kind, layer, tile, row, seq, sum, scaled, conv);
    }
    if (kind == DecoderProduct::dt_proj) scan(layer, states);
  }

  // Scale and bias of row `row` of the group that begins with `tile`.
  __device__ __forceinline__ Scaled scale_of(DecoderProduct kind, int layer, int tile, int row,
                                             int seq) const {
    const DecoderLayerArgs& l = products_.layer(min(layer, a_.n_layer - 1));
    const ProductShape& shape = products_.shape(kind);
    const float *scale = nullptr, *bias = nullptr;
    if (kind == DecoderProduct::in_proj) scale = l.in_scale, bias = l.in_bias;
    if (kind == DecoderProduct::dt_proj) bias = l.dt_bias;
    if (kind == DecoderProduct::out_proj) scale = l.out_scale, bias = l.out_bias;
    if (kind == DecoderProduct::head) scale = a_.head_scale;
    Scaled s;
    if (!(sizeof(W) == 1 && scale) && !bias) return s;
    const int index = row_of(kind, tile, row);
    if (index >= shape.count || seq >= a_.num_seqs) return s;
    const int at =
        shape.first + index + (kind == DecoderProduct::in_proj && is_high(row) ? a_.d_inner : 0);
    if (sizeof(W) == 1 && scale) s.scale = scale[at];
    if (bias) s.bias = bias[at];
    return s;
  }

  __device__ __forceinline__ Conv conv_of(int layer, int tile, int row, int seq) const {
    const DecoderLayerArgs& l = products_.layer(layer);
    const int index = row_of(DecoderProduct::in_proj, tile, row);
    const int channel = first_channel() + index;
    Conv c;
    if (is_high(row) || index >= channels() || seq >= a_.num_seqs) return c;
    c.taps = load_vector<4>(l.conv_weight + 4 * channel);
    if (l.conv_bias) c.bias = l.conv_bias[channel];
    c.state = l.conv + slot_of(seq) * 3 * a_.d_inner + channel;
    c.x0 = c.state[0];
    c.x1 = c.state[a_.d_inner];
    c.x2 = c.state[2 * a_.d_inner];
    return c;
  }

  // Whether a row of a group is one of its tile's high rows, which in in_proj are z's.
  static __device__ bool is_high(int row) { return row % kDecoderTile >= kDecoderTile / 2; }
  // Number among the block's rows, of in_proj among its channels.
  static __device__ int row_of(DecoderProduct kind, int tile, int row) {
    if (kind != DecoderProduct::in_proj) return tile * kDecoderTile + row;
    return (tile + row / kDecoderTile) * 8 + row % 8;
  }

  __device__ __forceinline__ void await_vectors(DecoderProduct kind, int layer) {
    if (kind == DecoderProduct::out_proj) prefetch_norm(layer + 1);
    switch (kind) {
      case DecoderProduct::in_proj:
      case DecoderProduct::head: {
        const float* weight =
            kind == DecoderProduct::head ? a_.norm_f : products_.layer(layer).norm;
        take_residual<kSeqs>(a_, x_, residual_, products_.shape(DecoderProduct::out_proj), norm_,
                             weight, round_of(layer - 1), layer == 0);
        break;
      }
      case DecoderProduct::dt_proj:
        take_x_dbl<kSeqs>(a_, x_, x_dbl_, round_of(layer));
        break;
      default:
        take_vectors<kSeqs>(a_, x_, kind == DecoderProduct::x_proj ? a_.u : a_.y, a_.d_inner,
                            round_of(layer));
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
  __device__ __forceinline__ void finish(DecoderProduct kind, int layer, int tile, int row, int seq,
                                         float sum, const Scaled& scaled, const Conv& conv) {
    const ProductShape& shape = products_.shape(kind);
    const int index = row_of(kind, tile, row);
    const bool there = index < shape.count && seq < a_.num_seqs;
    const float value = fmaf(sum, scaled.scale, scaled.bias);
    if (kind == DecoderProduct::in_proj)
      return convolve(layer, index, seq, there, is_high(row), round_bf16(value), conv);
    if (!there) return;
    switch (kind) {
      case DecoderProduct::x_proj:
        publish(a_.x_dbl + seq * a_.x_proj_rows + shape.first + index,
                __float_as_uint(round_bf16(value)), round_of(layer));
        return;
      case DecoderProduct::dt_proj:
        delta_[seq * a_.max_channels + index] = softplus(round_bf16(sum) + scaled.bias);
        return;
      case DecoderProduct::out_proj: {
        float& own = residual_[seq * a_.max_out_rows + index];
        const float r = own + round_bf16(value);
        own = a_.residual_f32 ? r : round_bf16(r);
        publish(a_.residual + seq * a_.d_model + shape.first + index, __float_as_uint(own),
                round_of(layer));
        return;
      }
      default:
        a_.logits[seq * a_.logits_stride + shape.first + index] = value;
    }
  }

  // Of in_proj's outputs z is kept; x goes through the convolution, u is kept and published.
  __device__ __forceinline__ void convolve(int layer, int channel, int seq, bool there, bool is_z,
                                           float x, const Conv& c) {
    float u = 0;
    if (c.state) {
      float s = fmaf(c.taps[0], c.x0, c.bias);
      s = fmaf(c.taps[1], c.x1, s);
      s = fmaf(c.taps[2], c.x2, s);
      u = round_bf16(silu(fmaf(c.taps[3], x, s)));
      u_[seq * a_.max_channels + channel] = u;
      c.state[0] = c.x1;
      c.state[a_.d_inner] = c.x2;
      c.state[2 * a_.d_inner] = x;
    } else if (there && is_z) {
      z_[seq * a_.max_channels + channel] = x;
    }
    const float next = __shfl_down_sync(~0u, u, kSeqs);
    if (c.state && channel % 2 == 0)
      publish(a_.u + seq * (a_.d_inner / 2) + (first_channel() + channel) / 2, pack_bf16(u, next),
              round_of(layer));
  }

  // Item i of the scan: four states of one of the block's channels for one sequence.
  struct ScanItem {
    int quad, channel, seq;
  };
  __device__ ScanItem scan_item(int item) const {
    const int quads = a_.d_state / 4, n = channels();
    return {item % quads, item / quads % n, item / quads / n};
  }

  __device__ __forceinline__ States states_of(int layer, int item) const {
    const DecoderLayerArgs& l = products_.layer(layer);
    const ScanItem i = scan_item(item);
    States s;
    if (i.seq >= a_.num_seqs) return s;
    const int channel = first_channel() + i.channel;
    const int64_t at = static_cast<int64_t>(channel) * a_.d_state + 4 * i.quad;
    s.state = l.ssm + slot_of(i.seq) * a_.d_inner * a_.d_state + at;
    s.h = load_vector<4>(static_cast<const float*>(s.state));
    s.A = load_vector<4>(l.A + at);
    s.D = l.D[channel];
    return s;
  }

  // The scan of the block's channels; y is published.
  __device__ __forceinline__ void scan(int layer, States& s) {
    __syncthreads();  // delta is there, as are u and z
    const int quads = a_.d_state / 4, items = a_.num_seqs * channels() * quads;
#pragma unroll 1
    for (int first = 0; first < items; first += kDecoderThreads) {
      const int item = first + thread_index();
      if (first > 0) s = states_of(layer, item);
      const ScanItem i = scan_item(item);
      const int at = i.seq * a_.max_channels + i.channel;
      float y = 0, u = 0;
      if (s.state) {
        const float* B = x_dbl_ + i.seq * a_.x_proj_rows + a_.dt_rank + 4 * i.quad;
        const float* C = B + a_.d_state;
        u = u_[at];
        const float delta = delta_[at], input = delta * u;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          s.h[k] = fmaf(exp2_approx(delta * (s.A[k] * kLog2E)), s.h[k], input * B[k]);
          y = fmaf(C[k], s.h[k], y);
        }
        store_vector<4>(s.state, s.h);
      }
      for (int d = quads / 2; d > 0; d /= 2) y += __shfl_xor_sync(~0u, y, d);
      if (s.state) y = round_bf16(fmaf(s.D, u, y) * silu(z_[at]));
      const float next = __shfl_down_sync(~0u, y, static_cast<unsigned>(quads));
      if (s.state && i.quad == 0 && i.channel % 2 == 0)
        publish(a_.y + i.seq * (a_.d_inner / 2) + (first_channel() + i.channel) / 2,
                pack_bf16(y, next), round_of(layer));
    }
  }

  const DecoderArgs& a_;
  const DecoderProducts<W> products_;
  WeightRing<decoder_stages(kSeqs)> ring_;
  bf16* x_;          // (kSeqs, x_stride)                   what is multiplied
  float* sums_;      // (warps, rows of a group, kSeqs)
  float* x_dbl_;     // (kSeqs, x_proj_rows)                 B and C
  float *z_, *u_;    // (kSeqs, max_channels)
  float* delta_;     // (kSeqs, max_channels)
  float* residual_;  // (kSeqs, max_out_rows)
  float* norm_;      // (kSeqs, warps)
  int* slots_;       // (kSeqs)
  uint32_t round_;
};

}  // namespace krait::cuda
