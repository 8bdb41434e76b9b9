// The scan of a decoder step by clusters, by the computing warps of a block.
#pragma once

#include "ops/cuda/math.cuh"
#include "ops/decoder_cluster_warps.cuh"

namespace krait::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What a warp takes of a stage's sequences: a unit of channels of a pair of them first, then how
// far it goes on from there, from the last unit to the next pair.
struct ClusterScanShare {
  static constexpr int kUnit = 16;  // channels
  int units, unit, pair, more_units, more_pairs;

  __device__ ClusterScanShare(int warp, int channels)
      : units(channels / kUnit),
        unit(warp % units),
        pair(warp / units),
        more_units(kClusterCopyWarp % units),
        more_pairs(kClusterCopyWarp / units) {
    // Else these are found anew for every stage.
    asm volatile("" : "+r"(units), "+r"(unit), "+r"(pair), "+r"(more_units), "+r"(more_pairs));
  }
};

// A warp takes sixteen channels of two sequences at a time. Four neighbouring lanes share a channel
// and the one eight behind it, four states each of both sequences, and end with one of the four
// outputs each. S: of states.
template <int kSeqs, class S>
class ClusterScan {
 public:
  __device__ ClusterScan(ClusterWarps<kSeqs>& warps, const ClusterScanShare& share)
      : w_(warps), b_(warps.block), cut_(warps.cut), share_(share) {}

  // From the ring's stages to y, which is told octet by octet, and the states.
  __device__ void run(const DecoderClusterLayer& layer) {
    int unit = share_.unit;
    Lane lane(b_, unit, layer);
    for (int first = 0; first < b_.seqs; first += cut_.state_seqs) {
      const int end = min(first + cut_.state_seqs, b_.seqs);
      const S* const in = b_.template at<S>(static_cast<int>(w_.await_stage() - b_.memory_at));
      for (int next = share_.unit, pair = share_.pair; first + 2 * pair < end;) {
        if (next != unit) lane = Lane(b_, unit = next, layer);
        advance(lane, first + 2 * pair, end, in + 2 * pair * cut_.channels * kClusterStates);
        pair += share_.more_pairs, next += share_.more_units;
        if (next >= share_.units) next -= share_.units, ++pair;
      }
      w_.leave_stage();
      if (end % kClusterOctet == 0 || end == b_.seqs) w_.tell(b_.y_ready(first / kClusterOctet));
    }
  }

 private:
  static constexpr int kUnit = ClusterScanShare::kUnit, kApart = kUnit / 2;  // channels
  // Of the channel behind, from the first one's.
  static constexpr int kStatesApart = kApart * kClusterStates;

  // What all sequences share, and where theirs is: of the lane's channels, and of its output, for
  // the first two sequences.
  struct Lane {
    Floats<4> A[2];
    float D;
    int in;  // elements, from a sequence's states on
    const float2* step;
    const bf16 *B, *C, *uz;
    bf16 *y, *y_sent;
    S* out;  // of slot 0

    __device__ Lane(const ClusterBlock<kSeqs>& block, int unit, const DecoderClusterLayer& layer) {
      const DecoderClusterPlan& cut = block.cut;
      const int lane = block.lane(), q = lane % 4, seq = q % 2;
      const int channel = unit * kUnit + lane / 4, own = channel + q / 2 * kApart;
      in = channel * kClusterStates + 4 * q;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        A[j] = load_vector<4>(block.template at<float>(cut.shared.A) + in + j * kStatesApart);
      D = block.template at<float>(cut.shared.D)[own];
      step = block.template at<float2>(cut.shared.steps) + channel;
      B = block.template at<bf16>(cut.shared.BC) + x_dbl_place(kSeqs, 0, 4 * q);
      C = B + x_dbl_place(kSeqs, 0, kClusterStates);
      uz = block.template at<bf16>(cut.shared.uz) + 2 * (seq * cut.channels + own);
      y = block.template at<bf16>(cut.shared.y) +
          vector_place(cut.d_inner, seq, block.rank * cut.channels + own);
      y_sent = block.template at<bf16>(cut.shared.y_sent) + vector_place(cut.channels, seq, own);
      out = block.template ssm<S>(layer) + in;
    }
  };
  // in: states of sequence seq0, an even one. Where that is the last one, it is taken twice.
  __device__ __forceinline__ void advance(const Lane& lane, int seq0, int end, const S* in) const {
    const int more = seq0 + 1 < end ? 1 : 0;
    Floats<4> h[2][2];  // of a sequence's two channels
    float y[2][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int seq = seq0 + k * more;
      const Floats<4> B = load_vector<4>(lane.B + seq * 8), C = load_vector<4>(lane.C + seq * 8);
      const S* const from = in + lane.in + k * more * cut_.channels * kClusterStates;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        h[k][j] = load_vector<4>(from + j * kStatesApart);
        const float2 step = lane.step[seq * cut_.steps_pitch() + j * kApart];
        y[k][j] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          h[k][j][i] = fmaf(exp2_approx(step.x * lane.A[j][i]), h[k][j][i], step.y * B[i]);
          y[k][j] = fmaf(C[i], h[k][j][i], y[k][j]);
        }
      }
    }
    const float sum = own_output(y);
    if (w_.thread % 2 <= more) {
      const int octet = seq0 / kClusterOctet * kClusterOctet, in_octet = seq0 % kClusterOctet * 8;
      const Floats<2> uz = load_vector<2>(lane.uz + 2 * seq0 * cut_.channels);
      const Floats<1> gated{{fmaf(lane.D, uz[0], sum) * silu(uz[1])}};
      store_vector(lane.y + octet * cut_.d_inner + in_octet, gated);
      store_vector(lane.y_sent + octet * cut_.channels + in_octet, gated);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (k <= more) {
        S* const to = b_.ssm_of(lane.out, seq0 + k);
#pragma unroll
        for (int j = 0; j < 2; ++j) store_vector(to + j * kStatesApart, h[k][j]);
      }
  }
  // The sum over four lanes of y[k][j], whose k is the lane's first bit and j its second one: each
  // gives away what others end with.
  __device__ __forceinline__ float own_output(const float (&y)[2][2]) const {
    const bool odd = w_.thread % 2 != 0, behind = w_.thread % 4 >= 2;
    float of_channel[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      of_channel[k] =
          (behind ? y[k][1] : y[k][0]) + __shfl_xor_sync(~0u, behind ? y[k][0] : y[k][1], 2);
    return (odd ? of_channel[1] : of_channel[0]) +
           __shfl_xor_sync(~0u, odd ? of_channel[0] : of_channel[1], 1);
  }

  ClusterWarps<kSeqs>& w_;
  const ClusterBlock<kSeqs>& b_;
  const DecoderClusterPlan& cut_;
  const ClusterScanShare& share_;
};

#endif

}  // namespace krait::cuda
