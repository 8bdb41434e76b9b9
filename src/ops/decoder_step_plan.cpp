#include "ops/decoder_step_plan.h"

#include <algorithm>

namespace krait::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What the kernel's accesses rely on.
bool shape_fits(const DecoderShape& s) {
  const int64_t lanes = s.d_state / 4;  // that share a channel of the scan
  const bool state_lanes =
      s.d_state > 0 && s.d_state % 4 == 0 && lanes <= 16 && (lanes & (lanes - 1)) == 0;
  const int64_t row_multiple = s.int8 ? 16 : 8;  // 16 bytes of a row of weights, or of its part
  return state_lanes && s.d_conv == 4 && s.dt_rank > 0 && s.dt_rank % 8 == 0 &&
         s.dt_rank <= 8 * kDecoderDtPieces * lanes && s.d_inner % (8 * kDecoderParts) == 0 &&
         s.d_model % row_multiple == 0;
}

bool streams(const DecoderShape& s, int blocks) {
  const int64_t ring = int64_t{decoder_stages(1)} * kDecoderTile * kDecoderPieceBytes;
  return 3 * s.d_inner * s.d_model * (s.int8 ? 1 : 2) > ring * blocks;
}

// By the kernel for `seqs` sequences, whether it fits or not.
DecoderStepPlan plan_for(const DecoderShape& s, int multiprocessors, int seqs) {
  DecoderStepPlan p;
  p.blocks = static_cast<int>(std::min<int64_t>(multiprocessors, s.d_inner / 2));
  p.seqs = seqs;
  p.streams = streams(s, p.blocks);
  p.max_channels = 2 * ceil_div(s.d_inner / 2, p.blocks);
  p.max_out_rows = ceil_div(s.d_model, p.blocks);
  // Rows of different sequences in different banks.
  p.narrow_stride = round_up(s.d_model, 64) + 32;
  p.wide_stride = round_up(s.d_inner, 64) + 32;
  p.shared_bytes = DecoderShared::of(s, p).bytes;
  p.exchange_words = kDecoderRounds * DecoderExchange::of(s, seqs).places;
  return p;
}

}  // namespace

DecoderExchange DecoderExchange::of(const DecoderShape& s, int seqs) {
  DecoderExchange e{};
  e.residual = 0;
  e.u = e.residual + seqs * s.d_model;
  e.y = e.u + seqs * s.d_inner / 2;
  e.x_dbl = e.y + seqs * s.d_inner / 2;
  e.words = e.x_dbl + seqs * s.x_proj_rows();
  e.places = round_up(decoder_word_place(static_cast<int>(e.words)), 32);  // whole lines
  return e;
}

DecoderShared DecoderShared::of(const DecoderShape& s, const DecoderStepPlan& p) {
  const auto seqs = static_cast<size_t>(p.seqs);
  DecoderShared m{};
  size_t end = 0;
  const auto take = [&](size_t bytes) {
    const size_t begin = end;
    end += (bytes + 15) / 16 * 16;
    return begin;
  };
  const auto floats = [&](int64_t count) { return take(4 * seqs * static_cast<size_t>(count)); };
  const auto stages = static_cast<size_t>(decoder_stages(p.seqs));
  m.ring = take(stages * kDecoderStageBytes);
  m.barriers = take(2 * 8 * stages);
  m.narrow = take(2 * seqs * static_cast<size_t>(p.narrow_stride));
  m.wide = take(2 * seqs * static_cast<size_t>(p.wide_stride));
  m.scale = floats(2);
  m.partial = floats(2 * kDecoderWarps);
  m.sums = floats(kDecoderWarps * decoder_group_rows(p.seqs));
  m.x_dbl = floats(s.x_proj_rows());
  m.gate = floats(p.max_channels);
  m.u = floats(p.max_channels);
  m.residual = floats(p.max_out_rows);
  m.shapes = take(size_t{kDecoderProducts} * kDecoderProductBytes);
  m.slots = take(4 * seqs);
  m.layers = take(size_t{kDecoderLayerBytes} *
                  static_cast<size_t>(std::min<int64_t>(s.n_layer, kDecoderMaxLayers)));
  m.bytes = end;
  return m;
}

DecoderStepPlan plan_decoder_step(const DecoderShape& s, int multiprocessors, size_t shared_bytes) {
  if (!shape_fits(s) || s.num_seqs < 1) return {};
  // Either kernel serves any number, with the same bits: whether there is a plan does not depend on
  // it.
  const bool one = s.num_seqs == 1;
  for (const int seqs : {one ? 1 : kDecoderMaxSeqs, one ? kDecoderMaxSeqs : 1}) {
    DecoderStepPlan p = plan_for(s, multiprocessors, seqs);
    // A sequence's residual is taken over by 1 / seqs of the threads.
    const int64_t fours = int64_t{decoder_residual_fours(seqs)} * (kDecoderThreads / seqs);
    p.usable = p.shared_bytes <= shared_bytes && s.d_model / 4 <= fours;
    if (p.usable) return p;
  }
  return {};
}

}  // namespace krait::cuda
