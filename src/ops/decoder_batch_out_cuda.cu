// out_proj of a decoder step of many sequences, into the residual stream, and the next norm's first
// half.
#include "ops/cuda/dependent_launch.cuh"
#include "ops/cuda/vector.cuh"
#include "ops/decoder_batch_kernels.h"
#include "ops/decoder_batch_product.cuh"

namespace krait::cuda {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A thread's part of the outputs; residuals of kTogether sequences are asked for before the sums
// are there.
template <class R, class Product>
class Outputs {
 public:
  __device__ Outputs(const Product& product, const DecoderBatchOut& p)
      : product_(product), p_(p), share_(product) {
    if (!share_.there) return;
    norm_ = load_vector<4>(p.norm + share_.row);
    if (p.bias) bias_ = load_vector<4>(p.bias + share_.row);
    fetch(share_.first);
  }

  // From the sums to the residual stream, x and the sums of squares.
  __device__ void finish() {
    for (int seq0 = share_.first; share_.there && seq0 < product_.seqs;
         seq0 += kTogether * share_.at_once) {
      if (seq0 > share_.first) fetch(seq0);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int seq = seq0 + k * share_.at_once;
        if (seq < product_.seqs) finish(seq, unpack(residual_[k]));
      }
    }
    __syncthreads();  // the squares are there
    const DecoderBatchProduct& cut = product_.cut;
    const int seq = static_cast<int>(threadIdx.x);
    if (seq >= product_.seqs) return;
    const int outputs = min(cut.box_rows, cut.rows - product_.row0);
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < outputs; i += 4) sum += *squares(seq, i);
    p_.squares[static_cast<int>(blockIdx.x) / cut.split * kDecoderBatchMaxSeqs + product_.seq0 +
               seq] = sum;
  }

 private:
  static constexpr int kTogether = 6;

  __device__ int64_t place(int seq) const {
    return int64_t{product_.seq0 + seq} * product_.cut.rows + share_.row;
  }
  __device__ float* squares(int seq, int column) const {
    return product_.sums + (product_.seq0 + seq) * Product::kPitch + column;
  }
  __device__ void fetch(int seq0) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (const int seq = seq0 + k * share_.at_once; seq < product_.seqs)
        residual_[k] = load_uncached<4>(static_cast<const R*>(p_.residual) + place(seq));
  }
  __device__ void finish(int seq, Floats<4> r) const {
    Floats<4> m = product_.total(seq, share_.column), x;
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] += bias_[i];
    m = unpack(pack<bf16>(m));
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] += m[i];
    r = unpack(pack<R>(r));
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(r[i], r[i], sum), x[i] = r[i] * norm_[i];
    store_vector(static_cast<R*>(p_.residual) + place(seq), r);
    store_vector(p_.x + place(seq), x);
    *squares(seq, share_.column) = sum;
  }

  const Product& product_;
  const DecoderBatchOut& p_;
  const BatchShare share_;
  Floats<4> norm_{}, bias_{};
  Packed<R, 4> residual_[kTogether]{};
};

template <class R, class Product>
__device__ __forceinline__ void multiply_and_finish(const Product& product,
                                                    const CUtensorMap& weights,
                                                    const CUtensorMap& vectors,
                                                    const DecoderBatchOut& p) {
  float d[Product::kSums] = {};
  if (Product::warp() == Product::kCopyWarp) product.start(weights);
  // No work before this kernel that is not done yet writes what is asked for here.
  Outputs<R, Product> outputs(product, p);
  wait_for_earlier_work();
  if (Product::warp() == Product::kCopyWarp) {
    product.stream(weights, vectors);
    let_next_start();  // not sooner: what it reads then would hold up the last weights
  } else if (Product::warp() < Product::kCopyWarp) {
    product.multiply(d, Product::warp() / 4);
  }
  product.exchange(d);
  outputs.finish();
}

#endif

// Grid: clusters over boxes of outputs, as decoder_batch_in. Moves the weights once, y once for
// each cluster, the residual stream in and out, x. Numerics: as decoder_batch_in; rounded to bf16,
// added to the residual stream; squares in f32, four after one another, then by fours, then by
// boxes.
template <int kSeqs, int kGroups>
__global__ void __launch_bounds__(128 * kGroups + 64, 1)
    decoder_batch_out(const __grid_constant__ CUtensorMap weights,
                      const __grid_constant__ CUtensorMap vectors,
                      const __grid_constant__ DecoderBatchProduct cut,
                      const __grid_constant__ DecoderBatchOut p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  using Product = BatchProduct<kSeqs, kGroups>;
  const Product product(cut, memory);
  product.init(weights, vectors);
  __syncthreads();  // the barriers are there
  if (p.residual_f32)
    multiply_and_finish<float>(product, weights, vectors, p);
  else
    multiply_and_finish<bf16>(product, weights, vectors, p);
  product.part_from_cluster();
#endif
}

}  // namespace

DecoderBatchMachine decoder_batch_machine() {
  DecoderBatchMachine machine;
  for (int blocks = 1; blocks <= kDecoderBatchMaxSplit; ++blocks)
    machine.clusters[static_cast<size_t>(blocks)] =
        clusters_at_once(decoder_batch_out<kDecoderBatchMaxSeqs, kDecoderBatchMaxGroups>,
                         {.grid = {},
                          .block = dim3(128 * kDecoderBatchMaxGroups + 64),
                          .shared_bytes = kDecoderBatchSharedBytes,
                          .cluster = static_cast<unsigned>(blocks)});
  return machine;
}

void launch_decoder_batch_out(const State& gpu, const DecoderBatchProduct& plan,
                              const DecoderBatchOut& p, const Tensor& weight, const Tensor& y) {
  launch_batch_product(
      gpu, "decoder_batch_out",
      kernel_of(plan, [](auto seqs, auto groups) { return decoder_batch_out<seqs, groups>; }), plan,
      weight, y, p);
}

}  // namespace krait::cuda
