// The convolution of a token, for whoever convolves on a GPU.
#pragma once

#include "ops/causal_conv1d_plan.h"
#include "ops/cuda/vector.cuh"

namespace krait::cuda {

// Weights and bias of V channels, d_conv < 4 with zeros in front.
template <int V>
struct Taps {
  Floats<V> weight[kConvTaps], bias;

  // Op: has weight, bias and d_conv.
  template <class Op>
  __device__ Taps(const Op& op, int64_t channel) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int k = 0; k < kConvTaps; ++k) {
        const int tap = k - (kConvTaps - op.d_conv);
        weight[k][i] = tap >= 0 ? op.weight[(channel + i) * op.d_conv + tap] : 0.0f;
      }
      bias[i] = op.bias ? op.bias[channel + i] : 0.0f;
    }
  }
  // d_conv 4, 16-byte aligned: a load for each channel.
  __device__ Taps(const float* weights, const float* biases, int64_t channel) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Floats<4> taps = load_vector<4>(weights + (channel + i) * 4);
#pragma unroll
      for (int k = 0; k < kConvTaps; ++k) weight[k][i] = taps[k];
    }
    bias = biases ? load_vector<V>(biases + channel) : constant<V>(0);
  }
  // One order for every pass, so that whole = split = step by step, bit for bit. x[0] is the
  // oldest.
  __device__ float convolve(int i, float x0, float x1, float x2, float x3) const {
    float s = fmaf(weight[0][i], x0, bias[i]);
    s = fmaf(weight[1][i], x1, s);
    s = fmaf(weight[2][i], x2, s);
    return fmaf(weight[3][i], x3, s);
  }
};

}  // namespace krait::cuda
