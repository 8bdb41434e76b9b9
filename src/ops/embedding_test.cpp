#include "ops/embedding.h"

#include "ops/op_test.h"

namespace krait::op_test {
namespace {

TestTensor random_tokens(int64_t tokens, int64_t vocab_size, Rng& rng) {
  TestTensor t(DType::i32, {tokens});
  std::vector<double> ids;
  for (int64_t i = 0; i < tokens; ++i)
    ids.push_back(static_cast<double>(rng.below(static_cast<uint64_t>(vocab_size))));
  return std::move(t.values(ids));
}

TEST(Embedding, ReferenceGradientMatchesDifferences) {
  Context ctx(reference_engine(), 1);
  Rng rng(1);
  TestTensor tokens(DType::i32, {5}), weight(DType::f64, {4, 3}), y(DType::f64, {5, 3}),
      dy(DType::f64, {5, 3}), dweight(DType::f64, {4, 3});
  tokens.values({2, 0, 2, 3, 2});
  weight.normal(rng);
  dy.normal(rng);
  dweight.zero();
  const Embedding op = {.tokens = tokens, .weight = weight, .y = y};
  embedding_bwd(ctx, op, {.dy = dy, .dweight = dweight});
  const auto objective = [&] {
    embedding_fwd(ctx, op);
    double sum = 0;
    for (size_t i = 0; i < 15; ++i) sum += y.to_double()[i] * dy.to_double()[i];
    return sum;
  };
  EXPECT_TRUE(gradient_matches(weight, dweight.to_double(), objective, rng));
}

void check_against_reference(DType dtype, DType y_dtype, int64_t tokens, int64_t d_model) {
  SCOPED_TRACE(testing::Message() << tokens << " x " << d_model << " " << name_of(dtype));
  Context ctx(reference_engine(), 2);
  Rng rng(4);
  const int64_t vocab_size = 11;
  const TestTensor ids = random_tokens(tokens, vocab_size, rng);
  TestTensor weight(dtype, {vocab_size, d_model}), y(y_dtype, {tokens, d_model}, d_model + 3),
      expected(y_dtype, {tokens, d_model}), dy(y_dtype, {tokens, d_model}, d_model + 1),
      dweight(DType::f32, {vocab_size, d_model}), oracle(DType::f64, {vocab_size, d_model}),
      dy_oracle(DType::f64, {tokens, d_model});
  weight.normal(rng);
  dy.normal(rng);
  dweight.normal(rng);
  oracle.copy(dweight);
  dy_oracle.copy(dy);
  Embedding op = {.tokens = ids, .weight = weight, .y = expected};
  reference::embedding_fwd(ctx, op);
  reference::embedding_bwd(ctx, op, {.dy = dy_oracle, .dweight = oracle});
  op.y = y;
  cpu::embedding_fwd(ctx, op);
  cpu::embedding_bwd(ctx, op, {.dy = dy, .dweight = dweight});
  EXPECT_TRUE(bitwise_equal(y, expected));
  EXPECT_TRUE(close(dweight, oracle.to_double(), 1e-6));
  EXPECT_TRUE(y.guards_intact() && dweight.guards_intact());
}

TEST(Embedding, CpuMatchesReference) {
  for_each_simd_target([] {
    for (int64_t d_model : {1, 2, 3, 7, 15, 16, 17, 33, 200})
      for (int64_t tokens : {0, 1, 2, 150}) {
        check_against_reference(DType::f32, DType::f32, tokens, d_model);
        check_against_reference(DType::bf16, DType::bf16, tokens, d_model);
        check_against_reference(DType::bf16, DType::f32, tokens, d_model);
      }
  });
}

TEST(Embedding, SameBitsForAnyThreads) {
  Rng rng(2);
  const TestTensor ids = random_tokens(500, 7, rng);
  TestTensor dy(DType::f32, {500, 300}), a(DType::f32, {7, 300}), b(DType::f32, {7, 300});
  dy.normal(rng);
  a.zero();
  b.zero();
  Context one(reference_engine(), 1), two(reference_engine(), 2);
  const Embedding op = {.tokens = ids, .weight = {}, .y = {}};
  cpu::embedding_bwd(one, op, {.dy = dy, .dweight = a});
  cpu::embedding_bwd(two, op, {.dy = dy, .dweight = b});
  EXPECT_TRUE(bitwise_equal(a, b));
}

TEST(Embedding, EntryRefusesTokensOutOfRange) {
  Context ctx(reference_engine(), 1);
  TestTensor tokens(DType::i32, {2}), weight(DType::f32, {3, 4}), y(DType::f32, {2, 4});
  weight.zero();
  const Embedding op = {.tokens = tokens, .weight = weight, .y = y};
  const EmbeddingGrad grad = {.dy = weight.view().slice(0, 0, 2), .dweight = weight};
  tokens.values({0, 2});
  embedding_fwd(ctx, op);
  for (double bad : {3.0, -1.0}) {
    tokens.values({0, bad});
    EXPECT_THROW(embedding_fwd(ctx, op), CheckFailure);
    EXPECT_THROW(embedding_bwd(ctx, op, grad), CheckFailure);
  }
}

}  // namespace
}  // namespace krait::op_test
