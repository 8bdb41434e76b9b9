// What keeps recordings and mirrored tensors right, on an engine that is as asynchronous as a
// GPU's.
#include "ops/recordings.h"

#include <gtest/gtest.h>

#include "ops/deferred_engine.h"
#include "ops/mirrored_tensor.h"

namespace krait::op_test {
namespace {

struct Counted {
  Context ctx{deferred_engine(), 1};
  MirroredTensor x{ctx, DType::f32, {4}}, sum{ctx, DType::f32, {4}};
  Recordings recordings;
  int calls = 0;

  // sum += x^2 by way of the workspace.
  void run(int64_t key, int64_t scratch = 1000) {
    recordings.run(ctx, {key}, [&] {
      ++calls;
      const Arena::Scope scope(ctx.workspace());
      const Tensor copy = ctx.workspace().tensor(DType::f32, {4});
      ctx.workspace().allocate(static_cast<size_t>(scratch));
      copy_elements(ctx, x, copy);
      add_product(ctx, copy, x, sum);
    });
  }
  void set(float value) {
    std::fill_n(x.host_ptr<float>(), 4, value);
    x.upload(4);
  }
  float result() {
    sum.download(4);
    return sum.host_ptr<float>()[3];
  }
};

TEST(Recordings, RunOnceRecordOnceThenReplay) {
  Counted c;
  const int64_t before = deferred_replays();
  for (int i = 1; i <= 5; ++i) {
    c.set(static_cast<float>(i));
    c.run(7);
  }
  EXPECT_EQ(c.result(), 1 + 4 + 9 + 16 + 25);
  EXPECT_EQ(c.calls, 2);
  EXPECT_EQ(deferred_replays(), before + 4);
  c.run(8);  // another kind of work
  EXPECT_EQ(c.calls, 3);
}

TEST(Recordings, AreForgottenWhenTheWorkspaceMoves) {
  Counted c;
  c.set(1);
  for (int i = 0; i < 3; ++i) c.run(1);
  EXPECT_EQ(c.calls, 2);
  c.run(2, int64_t{4} << 20);  // the workspace grows: what was recorded uses memory that is gone
  c.run(1);
  EXPECT_EQ(c.calls, 4);
  for (int i = 0; i < 4; ++i) c.run(i % 2 + 1, i % 2 ? int64_t{4} << 20 : 1000);
  EXPECT_EQ(c.calls, 6);
  EXPECT_EQ(c.result(), 9);
}

TEST(Recordings, RunEveryTimeWhereTheEngineDoesNotRecord) {
  Context ctx(cpu_engine(), 1);
  Recordings recordings;
  int calls = 0;
  for (int i = 0; i < 4; ++i) recordings.run(ctx, {1}, [&] { ++calls; });
  EXPECT_EQ(calls, 4);
}

// The host may fill the next one while those before it are on their way.
TEST(MirroredTensor, TakesSeveralUploads) {
  for (const Engine* engine : {&cpu_engine(), &deferred_engine()}) {
    Context ctx(*engine, 1);
    MirroredTensor x(ctx, DType::f32, {3}, /*mirrors=*/2), sum(ctx, DType::f32, {3});
    MirroredTensor ones(ctx, DType::f32, {3});
    std::fill_n(ones.host_ptr<float>(), 3, 1.0f);
    ones.upload(3);
    for (int i = 1; i <= 6; ++i) {
      std::fill_n(x.host_ptr<float>(), 3, static_cast<float>(i));
      x.upload(3);
      add_product(ctx, x, ones, sum);
    }
    sum.download(3);
    EXPECT_EQ(sum.host_ptr<float>()[0], 21) << engine->name;
  }
}

}  // namespace
}  // namespace krait::op_test
