#include "ops/check.h"

#include <vector>

namespace krait {

void check_tensor(const Tensor& t, const char* name, DType dtype,
                  std::initializer_list<int64_t> shape) {
  const auto message = [&] { return std::string(name) + " is " + shape_string(t); };
  KRAIT_CHECK(t.rank == static_cast<int>(shape.size()), message());
  KRAIT_CHECK(t.dtype == dtype, message() + ", needs " + name_of(dtype));
  size_t i = 0;
  for (int64_t extent : shape) {
    KRAIT_CHECK(extent < 0 || t.shape[i] == extent, message() + ", needs extent " +
                                                        std::to_string(extent) + " in dimension " +
                                                        std::to_string(i));
    ++i;
  }
  KRAIT_CHECK(t.data != nullptr || t.size() == 0, message() + " without memory");
  KRAIT_CHECK(t.stride[i - 1] == 1 || t.shape[i - 1] <= 1,
              message() + ", last dimension not contiguous");
}

void check_optional(const Tensor& t, const char* name, DType dtype,
                    std::initializer_list<int64_t> shape) {
  if (t) check_tensor(t, name, dtype, shape);
}

void check_state(const Tensor& state, DType full, std::initializer_list<int64_t> shape) {
  check_optional(state, "state", state.dtype == DType::bf16 ? DType::bf16 : full, shape);
  KRAIT_CHECK(!state || state.contiguous());
}

void check_slots(const Context& ctx, const Tensor& slot, const Tensor& state, int64_t num_seqs) {
  if (!state) return;
  if (!slot) {
    KRAIT_CHECK(num_seqs <= state.shape[0], "more sequences than slots");
    return;
  }
  check_tensor(slot, "slot", DType::i32, {num_seqs});
  if (!ctx.memory().on_host()) return;
  const int32_t* used = slot.ptr<int32_t>();
  for (int64_t i = 0; i < num_seqs; ++i)
    KRAIT_CHECK(used[i] >= 0 && used[i] < state.shape[0], "slot out of range");
  if (num_seqs <= 64) {  // a decoding step: no allocation
    for (int64_t i = 0; i < num_seqs; ++i)
      for (int64_t j = 0; j < i; ++j) KRAIT_CHECK(used[i] != used[j], "two sequences share a slot");
    return;
  }
  std::vector<bool> taken(static_cast<size_t>(state.shape[0]));
  for (int64_t i = 0; i < num_seqs; ++i) {
    const size_t s = static_cast<size_t>(used[i]);
    KRAIT_CHECK(!taken[s], "two sequences share a slot");
    taken[s] = true;
  }
}

void check_sequences(const Context& ctx, const Tensor& seq_start, const Tensor& slot,
                     const Tensor& state, int64_t tokens) {
  check_tensor(seq_start, "seq_start", DType::i32, {-1});
  const int64_t num_seqs = seq_start.shape[0] - 1;
  KRAIT_CHECK(num_seqs >= 0);
  if (!ctx.memory().on_host()) return check_slots(ctx, slot, state, num_seqs);
  const int32_t* start = seq_start.ptr<int32_t>();
  KRAIT_CHECK(start[0] == 0 && start[num_seqs] == tokens, "seq_start must run from 0 to tokens");
  for (int64_t i = 0; i < num_seqs; ++i)
    KRAIT_CHECK(start[i] <= start[i + 1], "seq_start decreases");
  check_slots(ctx, slot, state, num_seqs);
}

}  // namespace krait
