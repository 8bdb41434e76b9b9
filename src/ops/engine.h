// An engine is a table of implementations, one entry for each pass of each op. The functions in the
// ops' headers check their arguments once and then call through the context's engine; nothing else
// knows which one runs.
#pragma once

#include <functional>
#include <memory>

#include "ops/adamw.h"
#include "ops/causal_conv1d.h"
#include "ops/cross_entropy.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/sample.h"
#include "ops/selective_scan.h"

namespace krait {

struct DecoderStep;  // decoder_step.h

struct Engine {
  const char* name;
  Memory& (*memory)();           // where the tensors of its ops live
  Memory& (*transfer_memory)();  // of the host, and within the engine's reach: transfers to and
                                 // from it need not wait for the host

  int64_t scan_chunk;  // tokens between the states that selective_scan_fwd saves for _bwd

  // Ops may return before their work is done; this waits for all of it.
  void (*synchronize)(Context&);
  // A place behind all work queued so far, put in `mark` (which may hold an earlier one); wait
  // returns when the work before it is done, at once where there is no mark.
  void (*mark)(Context&, std::shared_ptr<void>& mark);
  void (*wait)(Context&, const std::shared_ptr<void>& mark);
  // What is queued in this context from now on comes behind a mark of any context. Null where
  // contexts do not work side by side.
  void (*follow)(Context&, const std::shared_ptr<void>& mark) = nullptr;
  // Runs body and gives the work that it queued as a recording, which has not been done yet; replay
  // queues it as a whole. Null where the engine does not record.
  std::shared_ptr<void> (*record)(Context&, const std::function<void()>& body);
  void (*replay)(Context&, const std::shared_ptr<void>& recording);

  // What the machine can do at best, measured: bytes per second read (on a GPU: read and written by
  // a copy), exps per second.
  double (*read_bandwidth)(Context&);
  double (*exp_rate)(Context&);

  // selective_scan_stage(); null: all tokens.
  int64_t (*scan_stage)(Context&, int64_t tokens, int64_t num_seqs, int64_t d_inner,
                        int64_t d_state) = nullptr;
  // Whether selective_scan_step takes this op with its dt_proj; null: never, the product comes
  // before it.
  bool (*scan_step_projects)(Context&, const SelectiveScan&) = nullptr;
  // Whether the engine has its own way for a step of this shape (decoder_step.h); null: never.
  bool (*takes_decoder_step)(Context&, const DecoderStep&) = nullptr;
  void (*decoder_step)(Context&, const DecoderStep&) = nullptr;

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
  void (*fill_zero)(Context&, const Tensor&);
  void (*copy_elements)(Context&, const Tensor&, const Tensor&);
  void (*round_elements)(Context&, const Tensor&, const Tensor&);
  void (*negative_exp)(Context&, const Tensor&, const Tensor&);
  void (*add_product)(Context&, const Tensor&, const Tensor&, const Tensor&);
  void (*sum_elements)(Context&, const Tensor&, const Tensor&);
  void (*clip_offsets)(Context&, const Tensor&, int64_t, int64_t, const Tensor&);
  void (*sample_tokens)(Context&, const TokenSampling&);
};

// The specification: scalar code in the inputs' precision or, with f64 tensors, wholly in double.
// Every tensor that the headers give as T, R or f32 is then f64.
const Engine& reference_engine();
// Vector code for this CPU (Highway, chosen at run time), matrix products by oneDNN, threads by
// OpenMP.
const Engine& cpu_engine();

// The implementations, listed by the files that define an engine and used by nobody else.
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
  void global_norm(Context&, const GlobalNorm&);                                     \
  void fill_zero(Context&, const Tensor&);                                           \
  void copy_elements(Context&, const Tensor&, const Tensor&);                        \
  void round_elements(Context&, const Tensor&, const Tensor&);                       \
  void negative_exp(Context&, const Tensor&, const Tensor&);                         \
  void add_product(Context&, const Tensor&, const Tensor&, const Tensor&);           \
  void sum_elements(Context&, const Tensor&, const Tensor&);                         \
  void clip_offsets(Context&, const Tensor&, int64_t, int64_t, const Tensor&);       \
  void sample_tokens(Context&, const TokenSampling&);

namespace reference {
KRAIT_DECLARE_ENGINE_OPS
}
namespace cpu {
KRAIT_DECLARE_ENGINE_OPS
double read_bandwidth(Context&);
double exp_rate(Context&);
}  // namespace cpu
namespace cuda {  // in a module of its own: cuda_engine.h
KRAIT_DECLARE_ENGINE_OPS
double read_bandwidth(Context&);
double exp_rate(Context&);
bool scan_step_projects(Context&, const SelectiveScan&);
void synchronize(Context&);
void mark(Context&, std::shared_ptr<void>&);
void wait(Context&, const std::shared_ptr<void>&);
void follow(Context&, const std::shared_ptr<void>&);
int64_t scan_stage(Context&, int64_t, int64_t, int64_t, int64_t);
std::shared_ptr<void> record(Context&, const std::function<void()>&);
void replay(Context&, const std::shared_ptr<void>&);
bool takes_decoder_step(Context&, const DecoderStep&);
void decoder_step(Context&, const DecoderStep&);
}  // namespace cuda
#undef KRAIT_DECLARE_ENGINE_OPS

}  // namespace krait
