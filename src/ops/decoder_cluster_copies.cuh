// The warps of a decoder step by clusters that do not compute: one copies weights and states from
// memory into the ring, others send what the blocks of a cluster await of each other.
#pragma once

#include "ops/decoder_cluster.cuh"

namespace krait::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// One thread of a block: everything that the layers need, in the order in which it is computed
// with, as far ahead as the ring has room.
template <int kSeqs, class S>
class ClusterStream {
 public:
  __device__ explicit ClusterStream(const ClusterBlock<kSeqs>& block)
      : b_(block), cut_(block.cut), channel0_(block.rank * block.cut.channels) {}

  __device__ void run() {
    for (int l = 0; l < b_.a.n_layer; ++l) {
      const DecoderClusterLayer& layer = b_.a.layer[l];
      copy_in_proj(layer, 0);
      for (const CUtensorMap* map : {&layer.x_proj, &layer.dt_proj, &layer.out_proj})
        prefetch_map(*map);
      if (l + 1 < b_.a.n_layer) prefetch_map(b_.a.layer[l + 1].in_proj);
      copy_x_proj(layer);
      copy_in_proj(layer, cut_.d_inner);
      copy_scan(layer);
      copy_states(layer);
      copy_out_proj(layer);
    }
  }

 private:
  // The next stage is free, and so many bytes will arrive in it.
  __device__ uint32_t take(int bytes) {
    const int s = at_.s;
    if (at_.turn > 0) wait_for_phase(b_.empty(s), at_.turn - 1);
    filled_ = b_.full(s);
    arrive_and_expect(filled_, bytes);
    at_.next(cut_.stages);
    return b_.stage(s);
  }
  // Tiles of `rows` rows, from the next kClusterTile columns on each.
  __device__ void copy_tiles(uint32_t to, const CUtensorMap& map, int rows, int row, int column,
                             int count) const {
    for (int i = 0; i < count; ++i)
      copy_tile(to + static_cast<uint32_t>(i * rows * kTileBytes), map, row,
                column + i * kClusterTile, filled_);
  }

  // Its rows of x, or of z behind them.
  __device__ void copy_in_proj(const DecoderClusterLayer& layer, int first) {
    for (int k = 0; k < cut_.d_model; k += 2 * kClusterTile)
      copy_tiles(take(2 * cut_.channels * kTileBytes), layer.in_proj, cut_.channels,
                 first + channel0_, k, 2);
  }
  __device__ void copy_x_proj(const DecoderClusterLayer& layer) {
    const int tiles = cut_.u_width / kClusterTile;
    const uint32_t to = take(tiles * cut_.x_proj_rows * kTileBytes);
    copy_tiles(to, layer.x_proj, cut_.x_proj_rows, 0, channel0_, tiles);
  }
  __device__ void copy_scan(const DecoderClusterLayer& layer) {
    const int tiles = cut_.dt_steps();
    const int tile_bytes = tiles * cut_.channels * kTileBytes;
    const int A_bytes = cut_.channels * kClusterStates * 4;
    const uint32_t to = take(tile_bytes + A_bytes + cut_.channels * 4);
    copy_tiles(to, layer.dt_proj, cut_.channels, channel0_, 0, tiles);
    const uint32_t A = to + static_cast<uint32_t>(tile_bytes);
    copy_bulk(A, layer.A + channel0_ * kClusterStates, A_bytes, filled_);
    copy_bulk(A + static_cast<uint32_t>(A_bytes), layer.D + channel0_, cut_.channels * 4, filled_);
  }
  __device__ void copy_states(const DecoderClusterLayer& layer) {
    const int bytes = cut_.channels * kClusterStates * static_cast<int>(sizeof(S));
    for (int first = 0; first < b_.seqs; first += cut_.state_seqs) {
      const int count = min(cut_.state_seqs, b_.seqs - first);
      const uint32_t to = take(count * bytes);
      for (int i = 0; i < count; ++i)
        copy_bulk(to + static_cast<uint32_t>(i * bytes),
                  b_.ssm_of(b_.template ssm<const S>(layer), first + i), bytes, filled_);
    }
  }
  __device__ void copy_out_proj(const DecoderClusterLayer& layer) {
    for (int k = 0; k < cut_.d_inner; k += kClusterOutSteps * kClusterTile)
      copy_tiles(take(kClusterOutSteps * cut_.outputs * kTileBytes), layer.out_proj, cut_.outputs,
                 b_.rank * cut_.outputs, k, kClusterOutSteps);
  }

  const ClusterBlock<kSeqs>& b_;
  const DecoderClusterPlan& cut_;
  const int channel0_;
  ClusterStage at_;
  uint32_t filled_ = 0;
};

// One warp of a block for each octet of sequences.
template <int kSeqs>
class ClusterSender {
 public:
  __device__ ClusterSender(const ClusterBlock<kSeqs>& block, int octet)
      : b_(block),
        cut_(block.cut),
        lane_(ClusterBlock<kSeqs>::lane()),
        octet_(octet),
        own_runs_(runs_of(block.rank)) {}

  __device__ void run() const {
    if (octet_ >= b_.octets) return;
    for (uint32_t layer = 0; layer < static_cast<uint32_t>(b_.a.n_layer); ++layer) {
      send_x(layer);
      take_scales(layer);
      if (octet_ == 0) {
        send_parts(layer);
        send_x_dbl(layer);
        send_place(layer);
      }
      send_y(layer);
    }
  }

 private:
  static constexpr int kOthers = kClusterBlocks - 1;

  // Of x_dbl, that a block brings together.
  __device__ int runs_of(int block) const {
    return max(0, min(cut_.own_runs(), cut_.x_dbl_runs() - block * cut_.own_runs()));
  }
  // copy(block) for each other one, by one lane: several lanes' copies leave one by one, too, each
  // behind a turn of a loop that elects its lane.
  template <class Copy>
  __device__ void to_others(const Copy& copy) const {
    if (elect_one()) {
#pragma unroll 5
      for (int i = 0; i < kOthers; ++i) copy(i < b_.rank ? i : i + 1);
    }
    __syncwarp();
  }
  __device__ void send(int to, int from, int bytes, uint32_t barrier) const {
    to_others(
        [&](int block) { copy_to_block(block, b_.address(to), b_.address(from), bytes, barrier); });
  }
  // What this warp wrote is there for its copies, and for all who hear of the barrier.
  __device__ void announce(uint32_t barrier, int bytes) const {
    publish_to_copies();
    __syncwarp();
    if (lane_ == 0) arrive_and_expect(barrier, bytes);
    __syncwarp();
  }
  // Of the octet's vectors, this block's elements.
  __device__ int own_place(int vectors, int width, int own) const {
    return vectors + (octet_ * width + b_.rank * own) * kClusterOctet * 2;
  }

  // With the sum of squares of each sequence's outputs of this block.
  __device__ void send_x(uint32_t layer) const {
    wait_for_phase(b_.x_ready(), layer);
    publish_to_copies();
    const int bytes = cut_.outputs * kClusterOctet * 2;
    send(own_place(cut_.shared.x, cut_.d_model, cut_.outputs), cut_.shared.x_sent + octet_ * bytes,
         bytes, b_.x_full());
    const int squares = cut_.shared.squares + (b_.rank * kSeqs + octet_ * kClusterOctet) * 4;
    constexpr int kSquareBytes = kClusterOctet * 4;
    sum_squares(b_.template at<float>(squares));
    announce(b_.x_full(), kOthers * (bytes + kSquareBytes));
    send(squares, squares, kSquareBytes, b_.x_full());
  }
  __device__ void sum_squares(float* to) const {
    constexpr int kLanes = 32 / kClusterOctet;  // of a sequence
    const int fours = cut_.outputs / 4, seq = lane_ / kLanes;
    const float* const from =
        b_.template at<float>(cut_.shared.row_squares) + (octet_ * kClusterOctet + seq) * fours;
    float sum = 0;
#pragma unroll 4
    for (int i = lane_ % kLanes; i < fours; i += kLanes) sum += from[i];
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane_ % kLanes == 0) to[seq] = sum;
  }

  // 1 / sqrt(mean(r^2) + eps) of each sequence.
  __device__ void take_scales(uint32_t layer) const {
    wait_for_phase(b_.x_full(), layer);
    if (lane_ < kClusterOctet) {
      const int seq = octet_ * kClusterOctet + lane_;
      const float* const squares = b_.template at<float>(cut_.shared.squares) + seq;
      float sum = 0;
#pragma unroll
      for (int block = 0; block < kClusterBlocks; ++block) sum += squares[block * kSeqs];
      b_.template at<float>(cut_.shared.scale)[seq] = rsqrtf(fmaf(sum, b_.a.per_d_model, b_.a.eps));
    }
    __syncwarp();
    if (lane_ == 0) arrive(b_.scales_ready());
  }

  // To each other block the part of the sums that it brings together.
  __device__ void send_parts(uint32_t layer) const {
    wait_for_phase(b_.parts_ready(), layer);
    const int place = cut_.own_runs() * 32;  // of a part of its runs of eight sums
    announce(b_.received_full(), kOthers * own_runs_ * 32);
    to_others([&](int block) {
      if (const int runs = runs_of(block); runs > 0)
        copy_to_block(block, b_.address(cut_.shared.received + b_.rank * place),
                      b_.address(cut_.shared.parts + block * place), runs * 32, b_.received_full());
    });
  }

  // The parts in the blocks' order, rounded.
  __device__ void send_x_dbl(uint32_t layer) const {
    wait_for_phase(b_.received_full(), layer);
    const int first = b_.rank * cut_.own_runs(), fours = 2 * own_runs_;
    for (int four = lane_; four < fours; four += 32) {
      const float* const parts = b_.template at<float>(cut_.shared.received) + four * 4;
      const float* const own = b_.template at<float>(cut_.shared.parts) + first * 8 + four * 4;
      Floats<4> part[kClusterBlocks];
#pragma unroll
      for (int block = 0; block < kClusterBlocks; ++block)
        part[block] = load_vector<4>(block == b_.rank ? own : parts + block * cut_.own_runs() * 8);
#pragma unroll
      for (int block = 1; block < kClusterBlocks; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) part[0][i] += part[block][i];
      store_vector(b_.template at<bf16>(cut_.shared.x_dbl) + first * 8 + four * 4, part[0]);
    }
    announce(b_.x_dbl_full(), (cut_.x_dbl_runs() - own_runs_) * 16);
    if (own_runs_ > 0)
      send(cut_.shared.x_dbl + first * 16, cut_.shared.x_dbl + first * 16, own_runs_ * 16,
           b_.x_dbl_full());
  }

  // That y may come here.
  __device__ void send_place(uint32_t layer) const {
    wait_for_phase(b_.place_left(), layer);
    if (lane_ < kClusterBlocks) arrive_at_block(lane_, b_.place_free());
    __syncwarp();
  }
  __device__ void send_y(uint32_t layer) const {
    wait_for_phase(b_.y_ready(octet_), layer);
    wait_for_phase(b_.place_free(), layer);
    const int bytes = cut_.channels * kClusterOctet * 2;
    announce(b_.y_full(), kOthers * bytes);
    send(own_place(cut_.shared.y, cut_.d_inner, cut_.channels), cut_.shared.y_sent + octet_ * bytes,
         bytes, b_.y_full());
  }

  const ClusterBlock<kSeqs>& b_;
  const DecoderClusterPlan& cut_;
  const int lane_, octet_, own_runs_;
};

#endif

}  // namespace krait::cuda
