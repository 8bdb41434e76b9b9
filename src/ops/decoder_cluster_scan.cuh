// The scan of a decoder step by clusters, by the computing warps of a block.
#pragma once

#include "ops/cuda/math.cuh"
#include "ops/decoder_cluster_warps.cuh"

namespace krait::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Four neighbouring lanes share a channel, four states each, of as many sequences at a time, whose
// outputs they share. S: of states.
template <int kSeqs, class S>
class ClusterScan {
 public:
  __device__ explicit ClusterScan(ClusterWarps<kSeqs>& warps)
      : w_(warps), b_(warps.block), cut_(warps.cut) {}

  // From the ring's stages to y, which is told octet by octet, and the states.
  __device__ void run(const DecoderClusterLayer& layer) {
    const int lanes = 4 * cut_.channels;  // of a sequence
    S* const states = b_.template ssm<S>(layer);
    for (int first = 0; first < b_.seqs; first += cut_.state_seqs) {
      const int end = min(first + cut_.state_seqs, b_.seqs);
      const S* const in = b_.template at<S>(static_cast<int>(w_.await_stage() - b_.memory_at));
      for (int place = w_.thread; place < lanes; place += kClusterThreads) {
        const Channel channel(b_, place);
        for (int seq = first; seq < end; seq += kTogether) {
          const S* const from = in + 4 * ((seq - first) * lanes + place);
          if (seq + kTogether <= end)
            advance<true>(channel, seq, end, from, states + 4 * place);
          else
            advance<false>(channel, seq, end, from, states + 4 * place);
        }
      }
      w_.leave_stage();
      if (end % kClusterOctet == 0 || end == b_.seqs) w_.tell(b_.y_ready(first / kClusterOctet));
    }
  }

 private:
  static constexpr int kTogether = 4;

  // Of a lane of the scan: what all sequences share, and where theirs is for the first one.
  struct Channel {
    Floats<4> A;
    float D;
    const float2* step;
    const bf16 *B, *C, *u, *z;
    bf16 *y, *y_sent;

    __device__ Channel(const ClusterBlock<kSeqs>& block, int place) {
      const DecoderClusterPlan& cut = block.cut;
      const int channel = place >> 2, n = (place & 3) * 4;
      const bf16* const x_dbl = block.template at<bf16>(cut.shared.x_dbl);
      A = load_vector<4>(block.template at<float>(cut.shared.A) + 4 * place);
      D = block.template at<float>(cut.shared.D)[channel];
      step = block.template at<float2>(cut.shared.steps) + channel;
      B = x_dbl + x_dbl_place(kSeqs, 0, cut.dt_rank + n);
      C = x_dbl + x_dbl_place(kSeqs, 0, cut.dt_rank + kClusterStates + n);
      u = block.template at<bf16>(cut.shared.u) + vector_place(cut.u_width, 0, channel);
      z = block.template at<bf16>(cut.shared.z) + channel;
      y = block.template at<bf16>(cut.shared.y) +
          vector_place(cut.d_inner, 0, block.rank * cut.channels + channel);
      y_sent = block.template at<bf16>(cut.shared.y_sent) + vector_place(cut.channels, 0, channel);
    }
  };
  // in: the lane's states of sequence seq0; out: of slot 0. kAll: all kTogether are there.
  template <bool kAll>
  __device__ __forceinline__ void advance(const Channel& c, int seq0, int end, const S* in,
                                          S* out) const {
    Floats<4> h[kTogether];
    float y[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int more = kAll ? k : min(k, end - 1 - seq0), seq = seq0 + more;
      h[k] = load_vector<4>(in + more * 16 * cut_.channels);
      const float2 step = c.step[seq * cut_.channels];
      const Floats<4> B = load_vector<4>(c.B + seq * 8), C = load_vector<4>(c.C + seq * 8);
      y[k] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        h[k][i] = fmaf(exp2_approx(step.x * c.A[i]), h[k][i], step.y * B[i]);
        y[k] = fmaf(C[i], h[k][i], y[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (kAll || seq0 + k < end) store_vector(out + b_.ssm_place(seq0 + k), h[k]);
#pragma unroll
    for (int d = 2; d > 0; d /= 2)
#pragma unroll
      for (int k = 0; k < kTogether; ++k) y[k] += __shfl_xor_sync(~0u, y[k], d);
    const int own = w_.thread & 3, seq = seq0 + own;
    float sum = y[0];
#pragma unroll
    for (int k = 1; k < kTogether; ++k) sum = own == k ? y[k] : sum;
    if (!kAll && seq >= end) return;
    const int of_octet = (seq >> 3) * 8, in_octet = (seq & 7) * 8;
    const float u = load_vector<1>(c.u + of_octet * cut_.u_width + in_octet)[0];
    const float z = load_vector<1>(c.z + seq * cut_.channels)[0];
    const Floats<1> gated{{fmaf(c.D, u, sum) * silu(z)}};
    store_vector(c.y + of_octet * cut_.d_inner + in_octet, gated);
    store_vector(c.y_sent + of_octet * cut_.channels + in_octet, gated);
  }

  ClusterWarps<kSeqs>& w_;
  const ClusterBlock<kSeqs>& b_;
  const DecoderClusterPlan& cut_;
};

#endif

}  // namespace krait::cuda
