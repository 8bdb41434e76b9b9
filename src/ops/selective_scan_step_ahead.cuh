// A step of the scan with dt_proj for many channels of many sequences, one block for each
// multiprocessor: what a block does. A warp of its own asks for the states of the block's channels,
// a sequence at a time, as far ahead as shared memory has room. From compute capability 9.0 on.
#pragma once

#include "ops/cuda/mbarrier.cuh"
#include "ops/cuda/tile_copy.cuh"
#include "ops/selective_scan_step_ahead_plan.h"
#include "ops/selective_scan_step_projected.cuh"

namespace krait::cuda::scan_step {

#if __CUDA_ARCH__ >= 900

// A thread of block number `block`. S: of states. Each warp but the one that copies has kAheadTile
// channels, in 512 bytes of a sequence's states at a time.
template <class S>
class Ahead {
 public:
  __device__ Ahead(const ScanStepAheadPlan& plan, const Args& args, unsigned char* memory,
                   int block)
      : cut(plan), p(args), base(memory), ring(shared_address(memory)) {
    c0 = block % cut.members * cut.channels, channels = min(cut.channels, p.d_inner - c0);
    seq0 = block / cut.members * cut.group_seqs, count = min(cut.group_seqs, p.num_seqs - seq0);
  }

  __device__ void run() {
    init_barriers();
    __syncthreads();  // they are there
    warp() * kWarp == cut.threads ? copy() : compute();
  }

 private:
  static constexpr int kOwn = kLaneStates<S>, kPasses = kAheadTile * kLanes<S> / kWarp;
  static constexpr int kSteps = kProjectedMaxRank / kTerms;
  static constexpr int kHeld = 4;  // steps of terms whose weights are in registers at once
  static constexpr int kItems = kAheadRound * kAheadTile / kItem / kWarp;  // a lane's

  // Of dt_proj: of eight channels and of eight others, of one of each the terms that the lane
  // reads.
  struct Weights {
    Packed<bf16, 8> low[kHeld], high[kHeld];
  };

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int warp() { return thread() / kWarp; }
  __device__ static int lane() { return thread() % kWarp; }
  template <class T>
  __device__ T* at(int place) const {
    return reinterpret_cast<T*>(base + place);
  }
  __device__ int* slots() const { return at<int>(cut.slots); }
  // Of sequence s of a round.
  __device__ float* delta(int s) const {
    return at<float>(cut.delta) + s * (cut.channels + kAheadGap);
  }
  __device__ bf16* u(int s) const { return at<bf16>(cut.u) + s * cut.channels; }
  __device__ bf16* dt(int s) const { return at<bf16>(cut.dt) + s * cut.dt_row; }
  __device__ float* BC(int s) const { return at<float>(cut.BC) + s * 2 * kStates; }
  // Of the ring's places.
  __device__ uint32_t full(int i) const {
    return ring + static_cast<uint32_t>(cut.barriers + 8 * i);
  }
  __device__ uint32_t empty(int i) const { return full(kAheadMaxRing + i); }
  __device__ uint32_t states_in_ring(int i) const {
    return ring + static_cast<uint32_t>(i * cut.state_bytes);
  }
  // The block's part of sequence `seq` of all the block's.
  __device__ S* states(int seq) const {
    return static_cast<S*>(p.state) + (int64_t{slots()[seq]} * p.d_inner + c0) * kStates;
  }

  __device__ void init_barriers() const {
    if (thread() >= cut.ring) return;
    init_mbarrier(full(thread()), 1);
    init_mbarrier(empty(thread()), channels / kAheadTile);
    publish_mbarriers();
  }

  // --- The copying warp ---

  __device__ void ask_for_states(int i, int seq) const {
    const int bytes = channels * kStates * static_cast<int>(sizeof(S));
    arrive_and_expect(full(i), bytes);
    copy_bulk_once(states_in_ring(i), states(seq), bytes, full(i));
  }

  __device__ void copy() const {
    if (!p.settled) wait_for_earlier_work();
    for (int seq = lane(); seq < count; seq += kWarp)
      slots()[seq] = p.slot ? p.slot[seq0 + seq] : seq0 + seq;
    __syncwarp();
    const bool elected = elect_one();
    if (elected)
      for (int seq = 0; seq < min(count, cut.ring); ++seq) ask_for_states(seq, seq);
    __syncwarp();
    if (p.settled) wait_for_earlier_work();
    let_next_start();
    if (!elected) return;
    uint32_t turn = 0;
    for (int seq = cut.ring, i = 0; seq < count; ++seq) {
      wait_for_phase(empty(i), turn);
      ask_for_states(i, seq);
      if (++i == cut.ring) i = 0, ++turn;
    }
  }

  // --- The others ---

  __device__ void meet() const { meet_first(cut.threads); }

  __device__ void compute() {
    if (!p.settled) wait_for_earlier_work();
    const int channel = warp() * kAheadTile;  // the warp's first
    const bool works = channel < channels;
    Floats<kOwn> A[kPasses]{};
    float bias[2] = {};
    if (works) {
      load_A(A);
      for (int i = 0; i < 2; ++i)
        if (p.dt_bias) bias[i] = p.dt_bias[c0 + channel + i * 8 + lane() / 4];
      if (lane() < kAheadTile)
        at<float>(cut.D)[channel + lane()] = p.D ? p.D[c0 + channel + lane()] : 0;
    }
    int i = 0;  // of the ring
    uint32_t turn = 0;
    for (int first = 0; first < count; first += cut.seqs) {
      const int seqs = min(cut.seqs, count - first);
      Weights weights{};
      if (works)
#pragma unroll
        for (int k = 0; k < kHeld; ++k) load_weights(weights, k, channel);
      if (first == 0) {
        if (p.settled) wait_for_earlier_work();
        let_next_start();
      } else {
        meet();  // x_dbl is no longer needed
      }
      take_x_dbl(first, seqs);
      Packed<bf16, kItem> z[kItems];
      if (works) take_items(z, first, seqs, channel);
      wait_for_copies<0>();
      meet();  // x_dbl is there
      if (!works) continue;
      find_deltas(weights, bias, seqs, channel);
      __syncwarp();
      for (int s = 0; s < seqs; ++s) {
        scan(s, first + s, i, turn, A);
        if (++i == cut.ring) i = 0, ++turn;
      }
      __syncwarp();
      finish(z, first, seqs, channel);
    }
  }

  __device__ void load_A(Floats<kOwn> (&A)[kPasses]) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      A[pass] = load_vector<kOwn>(p.A + int64_t{c0} * kStates + own(pass));
  }
  // The lane's first of the block's states of a sequence.
  __device__ static int own(int pass) {
    return ((warp() * kPasses + pass) * kWarp + lane()) * kOwn;
  }

  // Step k of terms, of the block's channels from `channel` on.
  __device__ void load_weights(Weights& w, int k, int channel) const {
    const int term = k * kTerms + lane() % 4 * 8;
    const bf16* const row = p.dt_proj + (c0 + channel + lane() / 4) * p.dt_rank + term;
    w.low[k % kHeld] = w.high[k % kHeld] = {};
    if (term >= p.dt_rank) return;
    w.low[k % kHeld] = load_packed<8>(row);
    w.high[k % kHeld] = load_packed<8>(row + 8 * p.dt_rank);
  }

  // Of `seqs` sequences from the block's number `first` on.
  __device__ void take_x_dbl(int first, int seqs) const {
    const int pieces = p.dt_rank / 8;
    for (int i = thread(); i < seqs * pieces; i += cut.threads) {
      const int s = i / pieces, rank = i % pieces * 8;
      copy_async_uncached(shared_address(dt(s) + rank),
                          p.dt + (seq0 + first + s) * p.dt_row + rank);
    }
    end_copies();
    for (int i = thread(); i < seqs * 4; i += cut.threads) {  // eight of B or C at a time
      const int64_t seq = seq0 + first + i / 4;
      const bf16* const from = i % 4 < 2 ? p.B + seq * p.B_row : p.C + seq * p.C_row;
      store_vector(BC(i / 4) + i % 4 * 8, load_vector<8>(from + i % 2 * 8));
    }
  }

  // Item i of a lane: of sequence s of the round eight of the warp's channels.
  struct Item {
    int s, c;
  };
  __device__ static Item item(int i, int channel) {
    const int number = lane() + i * kWarp;
    return {number / (kAheadTile / kItem), channel + number % (kAheadTile / kItem) * kItem};
  }

  // u to shared memory, z.
  __device__ void take_items(Packed<bf16, kItem> (&z)[kItems], int first, int seqs,
                             int channel) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const auto [s, c] = item(i, channel);
      if (s >= seqs) continue;
      const int64_t seq = seq0 + first + s;
      copy_async_uncached(shared_address(u(s) + c), p.u + seq * p.u_row + c0 + c);
      if (p.z) z[i] = load_packed<kItem>(p.z + seq * p.z_row + c0 + c);
    }
    end_copies();
  }

  // In the order of terms that project_dt has.
  __device__ void find_deltas(Weights& w, const float (&bias)[2], int seqs, int channel) const {
    constexpr int kTiles = kAheadRound / 8;
    const int g = lane() / 4, q = lane() % 4;
    float d[kTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k * kTerms >= p.dt_rank) break;
      const int term = k * kTerms + q * 8;
      const Packed<bf16, 8>&a = w.low[k % kHeld], &b = w.high[k % kHeld];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        Packed<bf16, 8> x{};
        if (j * 8 + g < seqs && term < p.dt_rank) x = load_packed<8>(dt(j * 8 + g) + term);
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          mma_bf16(d[j], {a.word[i], b.word[i], a.word[i + 1], b.word[i + 1]}, x.word[i],
                   x.word[i + 1]);
      }
      if (k + kHeld < kSteps) load_weights(w, k + kHeld, channel);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = j * 8 + q * 2 + i % 2;
        const float sum = __bfloat162float(__float2bfloat16_rn(d[j][i]));
        if (s < seqs) delta(s)[channel + g + i / 2 * 8] = softplus(sum + bias[i / 2]);
      }
  }

  // Sequence s of the round, whose states are or will be in the ring's place number i; the sums
  // over states take the deltas' places.
  __device__ void scan(int s, int seq, int i, uint32_t turn,
                       const Floats<kOwn> (&A)[kPasses]) const {
    const int n = lane() % kLanes<S> * kOwn;
    const Floats<kOwn> B = load_vector<kOwn>(BC(s) + n), C = load_vector<kOwn>(BC(s) + kStates + n);
    float step[kPasses], du[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int channel = own(pass) / kStates;
      step[pass] = delta(s)[channel];
      du[pass] = step[pass] * load_vector<1>(u(s) + channel)[0];
    }
    wait_for_phase(full(i), turn);
    S* const to = states(seq);  // its slot was there before its states were asked for
    Floats<kOwn> h[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      h[pass] = unpack(load_copied<S, kOwn>(
          states_in_ring(i) + static_cast<uint32_t>(own(pass) * static_cast<int>(sizeof(S)))));
    __syncwarp();
    if (lane() == 0 && seq + cut.ring < count) arrive(empty(i));
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k)
        h[pass][k] =
            fmaf(exp2_approx(step[pass] * (A[pass][k] * kLog2E)), h[pass][k], du[pass] * B[k]);
      store_streaming(to + own(pass), h[pass]);
      const float y = sum_over_states<S>(h[pass], C);
      if (n == 0) delta(s)[own(pass) / kStates] = y;
    }
  }

  __device__ void finish(const Packed<bf16, kItem> (&z)[kItems], int first, int seqs,
                         int channel) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const auto [s, c] = item(i, channel);
      if (s >= seqs) continue;
      const Floats<kItem> in = load_vector<kItem>(u(s) + c), gate = unpack(z[i]),
                          D = load_vector<kItem>(at<float>(cut.D) + c),
                          sums = load_vector<kItem>(delta(s) + c);
      Floats<kItem> out;
#pragma unroll
      for (int k = 0; k < kItem; ++k) {
        const float sum = fmaf(D[k], in[k], sums[k]);
        out[k] = p.z ? sum * silu(gate[k]) : sum;
      }
      store_vector(p.y + (seq0 + first + s) * p.y_row + c0 + c, out);
    }
  }

  const ScanStepAheadPlan& cut;
  const Args& p;
  unsigned char* base;
  uint32_t ring;
  int c0, channels;  // of d_inner, the block's
  int seq0, count;   // the block's sequences
};

#endif

}  // namespace krait::cuda::scan_step
