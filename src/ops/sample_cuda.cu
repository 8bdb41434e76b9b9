// Sampling on a GPU: one block for each row, one kernel, whatever the options. A row is read from
// the second-level cache, where the head left it, once for its maximum and once more, by few
// threads, for the candidates. All sums are of integers, so the order of atomics is of no account.
#include "ops/cuda/state.h"
#include "ops/cuda/vector.cuh"
#include "ops/cuda/vector_access.h"
#include "ops/sample_plan.h"
#include "ops/sample_row.cuh"

namespace krait::cuda {
namespace {

struct SampleRows {
  float* logits;
  int64_t stride;
  int vocab;
  int32_t* slot;
  int32_t spare_slot;
  SampledSequence* sequence;
  int32_t* recent;
  int64_t capacity;
  int32_t *tokens, *picked;
};

// Step 1: the first thread that meets a token among the recent ones changes its logit. seen: a bit
// for each token.
__device__ void penalize(const SampledSequence& s, const int32_t* recent, int64_t capacity,
                         uint32_t* seen, float* logits, int vocab) {
  for (int i = threadIdx.x; i < (vocab + 31) / 32; i += kSampleThreads) seen[i] = 0;
  __syncthreads();  // no bit is set
  int64_t count = min(s.tokens, capacity);
  if (s.repeat_last_n > 0) count = min(count, int64_t{s.repeat_last_n});
  for (int64_t i = threadIdx.x; i < count; i += kSampleThreads) {
    const int32_t id = recent[(s.tokens - 1 - i) % capacity];
    if (id < 0 || id >= vocab) continue;
    const uint32_t bit = 1u << (id % 32);
    if (atomicOr(&seen[id / 32], bit) & bit) continue;
    const float x = logits[id];
    if (isnan(x)) continue;  // as it is, with all its bits
    logits[id] = x > 0 ? __fdiv_rn(x, s.repeat_penalty) : x * s.repeat_penalty;
  }
  __syncthreads();  // the logits are changed, and `seen` is free
}

// What a row's end is in the engine's memory; one thread.
__device__ void finish_row(const SampleRows& op, int row, int32_t slot, const SampleShared& shared,
                           bool drew, int32_t token, Picked picked) {
  const SampledSequence& was = shared.sequence;
  SampledSequence& s = op.sequence[slot];
  int64_t remaining = 0;
  if (picked == Picked::token) {
    remaining = was.remaining - 1;
    for (int i = 0; i < was.end_token_count; ++i)
      if (was.end_tokens[i] == token) remaining = 0;
    op.tokens[row] = token;
    op.recent[slot * op.capacity + shared.place] = token;
    s.tokens = was.tokens + 1;
    if (drew) s.rng_position = was.rng_position + 2;
  }
  s.remaining = remaining;
  op.picked[2 * row] = token;
  op.picked[2 * row + 1] = static_cast<int32_t>(picked);
  if (remaining == 0) op.slot[row] = op.spare_slot;
}

// Grid: rows. Moves a row once, and parts of it again; on chip are the list of candidates (8 KB)
// and, where top-k leaves too many, the bins.
template <int V>
__global__ void __launch_bounds__(kSampleThreads) sample_rows(const SampleRows op) {
  extern __shared__ uint64_t bins[];
  __shared__ SampleShared shared;
  const int row = static_cast<int>(blockIdx.x);
  const int32_t slot = op.slot[row];
  constexpr int kWords = sizeof(SampledSequence) / 4;
  if (threadIdx.x < kWords)
    reinterpret_cast<uint32_t*>(&shared.sequence)[threadIdx.x] =
        reinterpret_cast<const uint32_t*>(&op.sequence[slot])[threadIdx.x];
  __syncthreads();  // the sequence is there
  const SampledSequence& s = shared.sequence;
  if (s.remaining == 0) {
    if (threadIdx.x == 0) {
      op.picked[2 * row] = op.tokens[row];
      op.picked[2 * row + 1] = static_cast<int32_t>(Picked::at_rest);
    }
    return;
  }
  const int vocab = s.vocab_limit > 0 ? min(op.vocab, s.vocab_limit) : op.vocab;
  float* const logits = op.logits + row * op.stride;
  if (s.repeat_penalty != 1 && s.repeat_last_n != 0)
    penalize(s, op.recent + slot * op.capacity, op.capacity, reinterpret_cast<uint32_t*>(bins),
             logits, vocab);
  SampleRow<V> sample{{.logits = logits,
                       .vocab = vocab,
                       .top_k = s.top_k > 0 ? min(s.top_k, vocab) : vocab,
                       .top_p = s.top_p,
                       .log_min_p = s.log_min_p,
                       .bins = bins,
                       .shared = shared}};
  if (threadIdx.x == kSampleThreads - 1) {  // while others read
    shared.place = s.tokens % op.capacity;
    if (s.temperature > 0) {
      Rng rng(s.seed);
      rng.seek(s.rng_position);
      shared.random53 = rng.next_53_bits();
      shared.log2_per_logit = kLog2E64 / s.temperature;
    }
  }
  int32_t token = 0;
  const Picked picked = sample.find_highest(token);
  const bool draws = picked == Picked::token && s.temperature > 0;
  if (draws) token = sample.choose();
  if (threadIdx.x == 0) finish_row(op, row, slot, shared, draws, token, picked);
}

}  // namespace

void sample_tokens(Context& ctx, const TokenSampling& op) {
  const int64_t vocab = op.logits.shape[1];
  const auto shared = static_cast<size_t>(sample_shared_bytes(vocab));
  const SampleRows rows = {
      .logits = op.logits.ptr<float>(),
      .stride = op.logits.stride[0],
      .vocab = static_cast<int>(vocab),
      .slot = op.slot.ptr<int32_t>(),
      .spare_slot = op.spare_slot,
      .sequence = reinterpret_cast<SampledSequence*>(op.sequence.ptr<uint8_t>()),
      .recent = op.recent.ptr<int32_t>(),
      .capacity = op.recent.shape[1],
      .tokens = op.tokens.ptr<int32_t>(),
      .picked = op.picked.ptr<int32_t>()};
  const auto launch = [&](auto kernel) {
    if (shared > 32 * 1024)  // with what else is on chip, more than a launch may have unasked
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)),
            "sample_rows");
    kernel<<<static_cast<unsigned>(op.tokens.shape[0]), kSampleThreads, shared,
             state_of(ctx).stream>>>(rows);
    check_launch("sample_rows");
  };
  vector_rows(op.logits, 4) ? launch(sample_rows<4>) : launch(sample_rows<1>);
}

}  // namespace krait::cuda
