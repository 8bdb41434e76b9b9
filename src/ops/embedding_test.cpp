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

struct Shape {
  int64_t tokens, vocab_size, d_model;
  int64_t gap = 3;  // between the rows of y and dy
};

void check_against_reference(Context& ctx, DType dtype, DType y_dtype, Shape shape) {
  const auto [tokens, vocab_size, d_model, gap] = shape;
  SCOPED_TRACE(testing::Message() << tokens << " of " << vocab_size << " x " << d_model << " "
                                  << name_of(dtype) << " " << name_of(y_dtype));
  Context reference(reference_engine(), 1);
  Rng rng(4);
  const TestTensor ids = random_tokens(tokens, vocab_size, rng);
  TestTensor weight(dtype, {vocab_size, d_model}), y(y_dtype, {tokens, d_model}, d_model + gap),
      expected(y_dtype, {tokens, d_model}), dy(y_dtype, {tokens, d_model}, d_model + gap),
      dweight(DType::f32, {vocab_size, d_model}), oracle(DType::f64, {vocab_size, d_model}),
      dy_oracle(DType::f64, {tokens, d_model});
  weight.normal(rng);
  dy.normal(rng);
  dweight.normal(rng);
  oracle.copy(dweight);
  dy_oracle.copy(dy);
  Embedding op = {.tokens = ids, .weight = weight, .y = expected};
  embedding_fwd(reference, op);
  embedding_bwd(reference, op, {.dy = dy_oracle, .dweight = oracle});
  op.y = y;
  embedding_fwd(ctx, op);
  embedding_bwd(ctx, op, {.dy = dy, .dweight = dweight});
  EXPECT_TRUE(bitwise_equal(y, expected));
  EXPECT_TRUE(close(dweight, oracle.to_double(), 1e-6));
  EXPECT_TRUE(y.guards_intact() && dweight.guards_intact());
}

void check_types_against_reference(Context& ctx, Shape shape) {
  check_against_reference(ctx, DType::f32, DType::f32, shape);
  check_against_reference(ctx, DType::bf16, DType::bf16, shape);
  check_against_reference(ctx, DType::bf16, DType::f32, shape);
}

TEST(Embedding, CpuMatchesReference) {
  for_each_simd_target([] {
    Context ctx(cpu_engine(), 2);
    for (int64_t d_model : {1, 2, 3, 7, 15, 16, 17, 33, 200})
      for (int64_t tokens : {0, 1, 2, 150})
        check_types_against_reference(ctx, {tokens, 11, d_model});
  });
}

// Odd rows and rows for 16-byte accesses; runs of equal tokens within a piece, across one border,
// and over many pieces; a large vocabulary.
TEST(EmbeddingCuda, MatchesReference) {
  on_cuda([](Context& ctx) {
    for (int64_t d_model : {1, 7, 8, 200})
      for (int64_t tokens : {0, 1, 31, 32, 33, 150})
        check_types_against_reference(ctx, {tokens, 11, d_model, 8});
    check_types_against_reference(ctx, {150, 11, 33});
    check_types_against_reference(ctx, {3000, 2, 16, 8});
    check_types_against_reference(ctx, {1000, 1, 264, 8});
    check_types_against_reference(ctx, {500, 300, 1032, 8});
    check_types_against_reference(ctx, {40, 70000, 8, 8});
  });
}

void check_same_bits(Context& one, Context& two) {
  Rng rng(2);
  const TestTensor ids = random_tokens(500, 7, rng);
  TestTensor dy(DType::f32, {500, 300}), a(DType::f32, {7, 300}), b(DType::f32, {7, 300});
  dy.normal(rng);
  a.zero();
  b.zero();
  const Embedding op = {.tokens = ids, .weight = {}, .y = {}};
  embedding_bwd(one, op, {.dy = dy, .dweight = a});
  embedding_bwd(two, op, {.dy = dy, .dweight = b});
  EXPECT_TRUE(bitwise_equal(a, b));
}

TEST(Embedding, SameBitsForAnyThreads) {
  Context one(cpu_engine(), 1), two(cpu_engine(), 2);
  check_same_bits(one, two);
}

TEST(EmbeddingCuda, SameBitsTwice) {
  on_cuda([](Context& ctx) { check_same_bits(ctx, ctx); });
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
