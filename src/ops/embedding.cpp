#include "ops/embedding.h"

#include "ops/check.h"
#include "ops/engine.h"

namespace krait {
namespace {

// Where the host can look.
void check_tokens(const Context& ctx, const Tensor& tokens, int64_t vocab_size) {
  if (!ctx.memory().on_host()) return;
  check_tensor(tokens, "tokens", DType::i32, {-1});
  const int32_t* token = tokens.ptr<int32_t>();
  for (int64_t t = 0; t < tokens.shape[0]; ++t)
    KRAIT_CHECK(token[t] >= 0 && token[t] < vocab_size,
                "token " + std::to_string(token[t]) + " at " + std::to_string(t));
}

}  // namespace

Cost embedding_cost(const Embedding& op) {
  const double row = static_cast<double>(op.y.shape[1] * op.y.shape[0]);
  return {.flops = 0,
          .bytes = row * static_cast<double>(size_of(op.weight.dtype) + size_of(op.y.dtype))};
}

void embedding_fwd(Context& ctx, const Embedding& op) {
  check_tensor(op.weight, "weight", op.weight.dtype, {-1, -1});
  check_tokens(ctx, op.tokens, op.weight.shape[0]);
  const DType y = op.y.dtype == op.weight.dtype ? op.y.dtype : full_precision(op.weight);
  check_tensor(op.y, "y", y, {op.tokens.shape[0], op.weight.shape[1]});
  ctx.engine().embedding_fwd(ctx, op);
}

void embedding_bwd(Context& ctx, const Embedding& op, const EmbeddingGrad& grad) {
  check_tensor(grad.dweight, "dweight", full_precision(grad.dy), {-1, -1});
  check_tokens(ctx, op.tokens, grad.dweight.shape[0]);
  check_tensor(grad.dy, "dy", grad.dy.dtype, {op.tokens.shape[0], grad.dweight.shape[1]});
  ctx.engine().embedding_bwd(ctx, op, grad);
}

}  // namespace krait
