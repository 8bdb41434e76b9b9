// decoder_step: the kernel's arguments, and what a block has of them.
#pragma once

#include <cstdint>

#include "ops/cuda/exchanged_words.cuh"
#include "ops/cuda/math.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/decoder_step_weights.cuh"

namespace krait::cuda {

struct DecoderLayerArgs {
  const float *norm, *in_scale, *in_bias, *conv_weight, *conv_bias, *dt_bias, *A, *D, *out_scale,
      *out_bias;
  const void *in_proj, *x_proj, *out_proj;
  const bf16* dt_proj;
  void *conv, *ssm;
};
static_assert(sizeof(DecoderLayerArgs) == kDecoderLayerBytes);

struct DecoderArgs {
  DecoderLayerArgs layer[kDecoderMaxLayers];
  int n_layer, first_layer;      // of this launch; of the model's before it
  const int32_t *tokens, *slot;  // slot: null: sequence i uses slot i
  const bf16* embedding;         // null: the residual comes from the launch before
  const float* norm_f;           // null: the launch after goes on
  const void* head;
  const float* head_scale;
  float* logits;
  int64_t logits_stride;
  uint32_t* done;        // blocks that have read all of a step's words
  ExchangedWord* words;  // (kDecoderRounds, layer_places)
  int layer_words, layer_places;
  int residual, u, y, x_dbl;  // numbers of the first words of each among a layer's
  DecoderShared shared;
  int num_seqs, d_model, d_inner, d_state, dt_rank, x_proj_rows, vocab_size;
  int narrow_stride, wide_stride, max_channels, max_out_rows;
  float eps, per_d_model;  // per_d_model: 1 / d_model
  bool residual_f32, bf16_states, streams;
};

// Where states begin, of f32 or bf16.
struct StatesAt {
  void* states = nullptr;  // null: none
  bool is_bf16;

  __device__ __forceinline__ StatesAt operator+(int64_t i) const {
    return {static_cast<char*>(states) + i * (is_bf16 ? 2 : 4), is_bf16};
  }
};
template <int V>
__device__ __forceinline__ Floats<V> load_states(const StatesAt& from) {
  return from.is_bf16 ? load_vector<V>(static_cast<const bf16*>(from.states))
                      : load_vector<V>(static_cast<const float*>(from.states));
}
template <int V>
__device__ __forceinline__ void store_states(const StatesAt& to, const Floats<V>& x) {
  if (to.is_bf16)
    store_vector<V>(static_cast<bf16*>(to.states), x);
  else
    store_vector<V>(static_cast<float*>(to.states), x);
}

// Of `count` things, in `unit`s, the ones that a block owns.
struct Share {
  int begin, end;
  __device__ Share(int count, int unit = 1) {
    const auto blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    begin = block * (count / unit) / blocks * unit;
    end = (block + 1) * (count / unit) / blocks * unit;
  }
  __device__ int size() const { return end - begin; }
};

enum class DecoderProduct { in_x, in_z, x_proj, out_proj, head };
inline constexpr int kDecoderLayerProducts = 4;
static_assert(kDecoderProducts == kDecoderLayerProducts + 1);

// The products of a step in their order: four of each layer, then the head. in_proj's are two: what
// comes of x's part is awaited by others, and z's part is multiplied while it is on its way.
// dt_proj is a part of the scan.
template <class W>
class DecoderProducts {
 public:
  // shapes: kDecoderProducts, layers: n_layer; in shared memory, where a layer's addresses are at
  // hand (as arguments they would be fetched from far away, each for the first time).
  __device__ __forceinline__ DecoderProducts(const DecoderArgs& a, char* memory)
      : a_(a),
        shapes_(reinterpret_cast<ProductShape*>(memory + a.shared.shapes)),
        layers_(reinterpret_cast<DecoderLayerArgs*>(memory + a.shared.layers)) {}

  // By the whole block, there for all behind a barrier.
  __device__ __forceinline__ void fill() const {
    const DecoderArgs& a = a_;
    const auto* from = reinterpret_cast<const uint64_t*>(a.layer);
    auto* to = reinterpret_cast<uint64_t*>(layers_);
    const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < a.n_layer * kDecoderLayerBytes / 8; i += threads) to[i] = from[i];
    if (thread > 0) return;
    constexpr int kBytes = static_cast<int>(sizeof(W));
    const Share channels(a.d_inner, 2);
    shapes_[0] = shapes_[1] = whole_rows(a.d_model * kBytes, channels);
    shapes_[1].first += a.d_inner;
    const Share x_proj(a.x_proj_rows, kDecoderPartRows);
    const int row_bytes = a.d_inner * static_cast<int>(sizeof(bf16));
    shapes_[2] = {row_bytes,
                  row_bytes / kDecoderParts,
                  x_proj.begin,
                  x_proj.size(),
                  kDecoderPartRows,
                  x_proj.size() / kDecoderPartRows,
                  -1};
    shapes_[3] = whole_rows(a.d_inner * kBytes, Share(a.d_model));
    shapes_[4] = whole_rows(a.d_model * kBytes, Share(a.head ? a.vocab_size : 0));
  }

  __device__ int count() const { return kDecoderLayerProducts * a_.n_layer + 1; }
  __device__ DecoderProduct kind(int product) const {
    return product >= kDecoderLayerProducts * a_.n_layer
               ? DecoderProduct::head
               : static_cast<DecoderProduct>(product % kDecoderLayerProducts);
  }
  __device__ const ProductShape& shape(DecoderProduct kind) const {
    return shapes_[static_cast<int>(kind)];
  }
  __device__ const ProductShape& shape(int product) const { return shape(kind(product)); }
  __device__ const DecoderLayerArgs& layer(int i) const { return layers_[i]; }
  __device__ const char* matrix(int product) const {
    const DecoderProduct k = kind(product);
    if (k == DecoderProduct::head) return static_cast<const char*>(a_.head);
    const DecoderLayerArgs& l = layers_[product / kDecoderLayerProducts];
    return static_cast<const char*>(k == DecoderProduct::x_proj     ? l.x_proj
                                    : k == DecoderProduct::out_proj ? l.out_proj
                                                                    : l.in_proj);
  }

 private:
  __device__ ProductShape whole_rows(int bytes, const Share& rows) const {
    const int count = rows.size(), tiles = (count + kDecoderTile - 1) / kDecoderTile;
    const bool halves = a_.streams && sizeof(W) > 1 && decoder_halves_last(count);
    return {bytes, bytes, rows.begin, count, kDecoderTile, tiles, halves ? tiles - 1 : -1};
  }

  const DecoderArgs& a_;
  ProductShape* const shapes_;
  DecoderLayerArgs* const layers_;
};

}  // namespace krait::cuda
