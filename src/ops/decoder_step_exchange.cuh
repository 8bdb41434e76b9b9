// decoder_step: what a block publishes for the others.
#pragma once

#include "ops/cuda/exchanged_words.cuh"
#include "ops/decoder_step.cuh"

namespace krait::cuda {

class LayerExchange {
 public:
  // first_channel: the block's.
  __device__ __forceinline__ LayerExchange(const DecoderArgs& a, int first_channel)
      : a_(a), first_channel_(first_channel), now_(round_of(a.first_layer + kDecoderRounds - 1)) {}

  __device__ __forceinline__ void begin_layer(int layer) {
    before_ = now_;
    now_ = round_of(a_.first_layer + layer);
    after_ = round_of(a_.first_layer + layer + 1);
  }
  // What is exchanged in this layer, and what was in the one before.
  __device__ const ExchangedWord* now() const { return now_; }
  __device__ const ExchangedWord* before() const { return before_; }

  // Numbers of the words of what a block has of a sequence; in u and y, which begin at `first`,
  // that of one of its channels and the next.
  __device__ int residual_word(int seq, int row) const {
    return a_.residual + seq * a_.d_model + row;
  }
  __device__ int x_dbl_word(int seq, int row) const {
    return a_.x_dbl + seq * a_.x_proj_rows + row;
  }
  __device__ int pair_word(int first, int seq, int channel) const {
    return first + seq * (a_.d_inner / 2) + (first_channel_ + channel) / 2;
  }

  // Publishes this layer's word, and withdraws the last one's: all readers of that have published
  // something since that this block has read. Whoever reads this layer's may look for the next
  // one's, where the word withdrawn in the last layer was: `gone`, from gone_of(word), is 0 when
  // that is so for all. (A store that its own thread reads back from the second-level cache is seen
  // by whoever reads there later: the hardware's order, not one that PTX promises. A fence behind
  // `withdraw` would be, and cost 3 to 4 % of 130M and of weights in 8 bits.)
  __device__ __forceinline__ void publish(int word, uint32_t data, uint32_t gone) const {
    const int place = decoder_word_place(word);
    cuda::publish(now_ + place, data | gone);
    withdraw(before_ + place);
  }
  // Asked for long before, by the thread that publishes.
  __device__ __forceinline__ uint32_t gone_of(int word) const {
    return peek(after_ + decoder_word_place(word));
  }

  // By all threads that multiply, behind the last layer: the last block that is done withdraws its
  // words. is_last: in shared memory.
  __device__ __forceinline__ void clear(int* is_last) const {
    sync_multipliers();  // all threads have read them
    if (thread_index() == 0) *is_last = atomicAdd(a_.done, 1) == gridDim.x - 1;
    sync_multipliers();
    if (!*is_last) return;
    for (int i = thread_index(); i < a_.layer_words; i += kDecoderThreads)
      withdraw(now_ + decoder_word_place(i));
    if (thread_index() == 0) *a_.done = 0;
  }

 private:
  __device__ ExchangedWord* round_of(int layer) const {
    return a_.words + layer % kDecoderRounds * a_.layer_places;
  }

  const DecoderArgs& a_;
  const int first_channel_;
  ExchangedWord *now_, *before_ = nullptr, *after_ = nullptr;
};

}  // namespace krait::cuda
