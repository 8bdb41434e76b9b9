// One Mamba block without its norm (arXiv 2312.00752, figure 3):
//   x, z = in_proj(n);  u = silu(conv1d(x));  dt, B, C = x_proj(u);  y = scan(u, dt_proj(dt), B, C,
//   z);  m = out_proj(y)
// and its backward pass. Internal to model/.
#pragma once

#include <functional>

#include "model/weights.h"
#include "ops/context.h"

namespace krait {

// What the block's layer and the batch give. All views.
struct BlockArguments {
  const Config& config;
  const LayerParameters& parameters;
  Tensor A;          // (d_inner, d_state)  f32
  Tensor seq_start;  // (num_seqs + 1)  i32; none in a step
  Tensor slot;       // (num_seqs)      i32; none: sequence i uses slot i
  Tensor conv;       // (slots, d_conv - 1, d_inner)  f32 or bf16; none: no state
  Tensor ssm;        // (slots, d_inner, d_state)     f32 or bf16; none: no state
};

// Activations of one block. Forward reads n and writes the others. Backward reads all but y, and
// leaves gradients in y and dt. Blocks of a training step share n and y, and whatever
// block_recompute fills again.
struct BlockActivations {
  Tensor n;      // (tokens, d_model)      T  the normed input
  Tensor xz;     // (tokens, 2 d_inner)    T
  Tensor u;      // (tokens, d_inner)      T
  Tensor x_dbl;  // (tokens, x_proj_size)  T  dt, B, C; none when nothing is selective
  Tensor dt;  // (tokens, d_inner)      T  before bias and softplus; row stride 0 when delta is not
              // selective
  Tensor y;   // (tokens, d_inner)      T  what out_proj reads
  Tensor saved;  // the scan's own, f32; none: not kept
};

// What inference needs: y takes the place of x in xz, and there is no `saved`.
BlockActivations allocate_activations(Context& ctx, const Config& config, DType dtype,
                                      int64_t tokens);
// Those of some tokens, without `saved`.
BlockActivations rows_of(const BlockActivations& a, int64_t begin, int64_t end);
// Parts of them: u and dt; in_proj's and x_proj's outputs. saved: with memory for the scan's
// states; else the scan's backward pass scans once more.
void allocate_scan_inputs(Context& ctx, const Config& config, DType dtype, int64_t tokens,
                          BlockActivations& a);
void allocate_products(Context& ctx, const Config& config, DType dtype, int64_t tokens, bool saved,
                       BlockActivations& a);

// m: (tokens, d_model) T, written. The state, where there is one, is advanced.
void block_forward(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                   const Tensor& m);
// Its three parts: all before the scan, the scan, all behind it. beside: so many blocks' scans run
// at once (Context::side_by_side).
void block_inputs(Context& ctx, const BlockArguments& block, const BlockActivations& a);
void block_scan(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                int beside = 1);
void block_output(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                  const Tensor& m);
// The same for one token of each sequence; the state is needed.
void block_step(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                const Tensor& m);

// Fills u and dt again from xz and x_dbl; with `products` these too, from n. The state is left as
// it was before block_forward.
void block_recompute(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                     bool products);

struct BlockGradients {
  const LayerParameters& parameters;  // f32, added to
  Tensor dm;                          // (tokens, d_model)             T
  Tensor dn;                          // (tokens, d_model)             T, written
  Tensor dconv;  // (slots, d_conv - 1, d_inner)  f32, in: of the final state, out: of the initial
                 // one; none: not wanted
  Tensor dssm;   // (slots, d_inner, d_state)     the same
  bool fresh = false;  // matrices' gradients are written, whatever they held
};

// block.conv and block.ssm hold the state as it was before block_forward. Calls norm_backward()
// once dn is there and dm has been read; a.n is read behind it only, and may be dn itself.
void block_backward(Context& ctx, const BlockArguments& block, const BlockActivations& a,
                    const BlockGradients& g, const std::function<void()>& norm_backward);

}  // namespace krait
