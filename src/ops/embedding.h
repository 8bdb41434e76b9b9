// Embedding: y_t = weight[tokens_t].  Its gradient: dweight[v] += sum over t with tokens_t = v of
// dy_t, in order of t.
#pragma once

#include "ops/context.h"
#include "ops/cost.h"

namespace krait {

struct Embedding {
  Tensor tokens;  // (tokens)               i32, in [0, vocab_size)
  Tensor weight;  // (vocab_size, d_model)  T
  Tensor y;       // (tokens, d_model)      T or f32
};

struct EmbeddingGrad {
  Tensor dy;       // (tokens, d_model)      as y
  Tensor dweight;  // (vocab_size, d_model)  f32, added to
};

Cost embedding_cost(const Embedding&);
void embedding_fwd(Context&, const Embedding&);
void embedding_bwd(Context&, const Embedding&, const EmbeddingGrad&);  // reads op.tokens only

}  // namespace krait
