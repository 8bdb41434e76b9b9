// in_proj and the convolution of a decoder step of many sequences.
#include "ops/causal_conv1d_taps.cuh"
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/math.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/decoder_batch_kernels.h"
#include "ops/decoder_batch_product.cuh"

namespace krait::cuda {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kBefore = 3;  // inputs that the convolution's state holds

// Where in global memory the states of the block's channels are, (kBefore, d_inner), of one of its
// sequences.
template <class S, class Product>
__device__ S* states_of(const Product& product, const DecoderBatchIn& p, int seq) {
  return static_cast<S*>(p.conv) + int64_t{product.slot[seq]} * kBefore * product.cut.rows +
         product.row0;
}

// The multiplying threads: start to copy the block's states to shared memory, (sequences, kBefore,
// box_rows), 16 bytes at a time.
template <class S, class Product>
__device__ void copy_states(const Product& product, const DecoderBatchIn& p) {
  constexpr int kVector = 16 / sizeof(S);
  const int vectors = product.cut.box_rows / kVector, d_inner = product.cut.rows;
  const int count = max(0, product.seqs) * kBefore * vectors;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32 * Product::kCopyWarp) {
    const int run = i / vectors, channel = i % vectors * kVector;
    if (product.row0 + channel < d_inner)
      copy_async_uncached(
          shared_address(product.states + 16 * i),
          states_of<S>(product, p, run / kBefore) + run % kBefore * int64_t{d_inner} + channel);
  }
  end_copies();
}

// One warp: 1 / sqrt(mean(r^2) + eps) of the sequences that this block finishes.
template <class Product>
__device__ void take_scales(const Product& product, const DecoderBatchIn& p) {
  constexpr int kTogether = 32;
  for (int seq = Product::lane(); seq < product.seqs; seq += 32) {
    const float* const from = p.squares.sums + product.seq0 + seq;
    float sum = 0;
    for (int tile = 0; tile < p.squares.tiles; tile += kTogether) {
      float squares[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        squares[i] = tile + i < p.squares.tiles ? from[(tile + i) * kDecoderBatchMaxSeqs] : 0.f;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum += squares[i];
    }
    product.scale[seq] = rsqrtf(fmaf(sum, p.per_d_model, p.eps));
  }
}

// Of a thread's four channels; where there are none, of the first.
struct Channels {
  Taps<4> taps;
  Floats<4> x_bias{}, z_bias{};

  __device__ Channels(const DecoderBatchIn& p, int d_inner, int channel)
      : taps(p.conv_weight, p.conv_bias, channel) {
    if (!p.bias) return;
    x_bias = load_vector<4>(p.bias + channel);
    z_bias = load_vector<4>(p.bias + d_inner + channel);
  }
};

// From the sums to u, z and the states.
template <class S, class Product>
__device__ void finish(const Product& product, const DecoderBatchIn& p, const BatchShare& share,
                       const Channels& channels) {
  const DecoderBatchProduct& cut = product.cut;
  const auto [column, channel, first, at_once, there] = share;
#pragma unroll 2
  for (int seq = first; there && seq < product.seqs; seq += at_once) {
    const S* const before =
        reinterpret_cast<const S*>(product.states) + seq * kBefore * cut.box_rows + column;
    const Floats<4> x0 = load_vector<4>(before), x1 = load_vector<4>(before + cut.box_rows),
                    x2 = load_vector<4>(before + 2 * cut.box_rows);
    const float scale = product.scale[seq];
    Floats<4> x = product.total(seq, column), z = product.total(seq, cut.box_rows + column), u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = fmaf(x[i], scale, channels.x_bias[i]);
      z[i] = fmaf(z[i], scale, channels.z_bias[i]);
    }
    x = unpack(pack<bf16>(x));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u[i] = silu(channels.taps.convolve(i, x0[i], x1[i], x2[i], x[i]));
    }
    const int64_t to = int64_t{product.seq0 + seq} * cut.rows + channel;
    store_vector(p.u + to, u);
    store_vector(p.z + to, z);
    S* const state = states_of<S>(product, p, seq) + column;
    store_vector(state, x1);
    store_vector(state + cut.rows, x2);
    store_vector(state + int64_t{2} * cut.rows, x);
  }
}

#endif

// Grid: clusters over boxes of channels; the blocks of a cluster share the inputs, then the
// sequences (decoder_batch_product.cuh). Moves the weights once, x once for each cluster (from the
// L2 cache), the convolution's states in and out, u and z. Numerics: sums in f32, of bf16(r weight)
// times the weights, each part's as the tensor core adds, then the parts in order; scaled, rounded
// to bf16, then as causal_conv1d_step.
template <int kSeqs, int kGroups>
__global__ void __launch_bounds__(128 * kGroups + 64, 1)
    decoder_batch_in(const __grid_constant__ CUtensorMap weights,
                     const __grid_constant__ CUtensorMap vectors,
                     const __grid_constant__ DecoderBatchProduct cut,
                     const __grid_constant__ DecoderBatchIn p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  using Product = BatchProduct<kSeqs, kGroups>;
  const Product product(cut, memory);
  product.init(weights, vectors);
  if (const int seq = static_cast<int>(threadIdx.x); seq < product.seqs)
    product.slot[seq] = p.slot ? p.slot[product.seq0 + seq] : product.seq0 + seq;
  __syncthreads();  // the barriers and the slots are there
  float d[Product::kSums] = {};
  const BatchShare share(product);
  const Channels channels(p, cut.rows, share.there ? share.row : 0);
  if (Product::warp() == Product::kCopyWarp) {
    product.start(weights);
    wait_for_earlier_work();
    product.stream(weights, vectors);
    let_next_start();  // not sooner: what it reads then would hold up the last weights
  } else if (Product::warp() == Product::kSideWarp) {
    wait_for_earlier_work();
    take_scales(product, p);
  } else {
    p.bf16_states ? copy_states<bf16>(product, p) : copy_states<float>(product, p);
    wait_for_earlier_work();
    product.multiply(d, Product::warp() / 4);
    wait_for_copies<0>();
  }
  product.exchange(d);
  p.bf16_states ? finish<bf16>(product, p, share, channels)
                : finish<float>(product, p, share, channels);
  product.part_from_cluster();
#endif
}

}  // namespace

void launch_decoder_batch_in(const State& gpu, const DecoderBatchProduct& plan,
                             const DecoderBatchIn& p, const Tensor& weight, const Tensor& x) {
  launch_batch_product(
      gpu, "decoder_batch_in",
      kernel_of(plan, [](auto seqs, auto groups) { return decoder_batch_in<seqs, groups>; }), plan,
      weight, x, p);
}

}  // namespace krait::cuda
