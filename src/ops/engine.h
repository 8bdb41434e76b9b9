// An engine is a table of implementations, one entry for each pass of each op. The functions in the
// ops' headers check their arguments once and then call through the context's engine; nothing else
// knows which one runs.
#pragma once

#include "ops/adamw.h"
#include "ops/causal_conv1d.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/selective_scan.h"

namespace krait {

struct Engine {
  const char* name;

  void (*embedding_fwd)(Context&, const Embedding&);
  void (*embedding_bwd)(Context&, const Embedding&, const EmbeddingGrad&);
  void (*rms_norm_fwd)(Context&, const RmsNorm&);
  void (*rms_norm_bwd)(Context&, const RmsNorm&, const RmsNormGrad&);
  void (*linear_fwd)(Context&, const Linear&);
  void (*linear_bwd)(Context&, const Linear&, const LinearGrad&);
  void (*causal_conv1d_fwd)(Context&, const CausalConv1d&);
  void (*causal_conv1d_bwd)(Context&, const CausalConv1d&, const CausalConv1dGrad&);
  void (*causal_conv1d_step)(Context&, const CausalConv1d&);
  void (*selective_scan_fwd)(Context&, const SelectiveScan&);
  void (*selective_scan_bwd)(Context&, const SelectiveScan&, const SelectiveScanGrad&);
  void (*selective_scan_step)(Context&, const SelectiveScan&);
  void (*cross_entropy_fwd)(Context&, const CrossEntropy&);
  void (*cross_entropy_bwd)(Context&, const CrossEntropy&, const CrossEntropyGrad&);
  void (*adamw)(Context&, const AdamW&);
  void (*global_norm)(Context&, const GlobalNorm&);
};

// The specification: scalar code in the inputs' precision or, with f64 tensors, wholly in double.
// Every tensor that the headers give as T, R or f32 is then f64.
const Engine& reference_engine();
// Vector code for this CPU (Highway, chosen at run time), matrix products by oneDNN, threads by
// OpenMP.
const Engine& cpu_engine();

// The implementations, listed by reference_engine.cpp and cpu_engine.cpp and used by nobody else.
#define KRAIT_DECLARE_ENGINE_OPS                                                     \
  void embedding_fwd(Context&, const Embedding&);                                    \
  void embedding_bwd(Context&, const Embedding&, const EmbeddingGrad&);              \
  void rms_norm_fwd(Context&, const RmsNorm&);                                       \
  void rms_norm_bwd(Context&, const RmsNorm&, const RmsNormGrad&);                   \
  void linear_fwd(Context&, const Linear&);                                          \
  void linear_bwd(Context&, const Linear&, const LinearGrad&);                       \
  void causal_conv1d_fwd(Context&, const CausalConv1d&);                             \
  void causal_conv1d_bwd(Context&, const CausalConv1d&, const CausalConv1dGrad&);    \
  void causal_conv1d_step(Context&, const CausalConv1d&);                            \
  void selective_scan_fwd(Context&, const SelectiveScan&);                           \
  void selective_scan_bwd(Context&, const SelectiveScan&, const SelectiveScanGrad&); \
  void selective_scan_step(Context&, const SelectiveScan&);                          \
  void cross_entropy_fwd(Context&, const CrossEntropy&);                             \
  void cross_entropy_bwd(Context&, const CrossEntropy&, const CrossEntropyGrad&);    \
  void adamw(Context&, const AdamW&);                                                \
  void global_norm(Context&, const GlobalNorm&);

namespace reference {
KRAIT_DECLARE_ENGINE_OPS
}
namespace cpu {
KRAIT_DECLARE_ENGINE_OPS
}
#undef KRAIT_DECLARE_ENGINE_OPS

}  // namespace krait
