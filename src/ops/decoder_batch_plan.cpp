#include "ops/decoder_batch_plan.h"

#include <algorithm>

namespace krait::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What another part in a cluster takes, in rows of a step.
constexpr int64_t kPartCost = 50;
// Of in_proj, whose parts exchange the sums of two boxes.
constexpr int kMaxInSplit = 2;
// With states in f32 wider models are faster by the ops: all blocks would read all of x, as much as
// the weights (6.9B, 128 sequences: 13.8 K tokens/s against 14.3 K on an H200).
constexpr int64_t kMaxWidth = 3072;

// The rows of the matrix and the inputs cut so that all blocks run at once and a block reads least:
// its rows' part of the weights, and the same part of all vectors, which come from the L2 cache.
DecoderBatchProduct plan_product(int64_t rows, int boxes, int64_t inputs, int64_t num_seqs,
                                 int state_bytes, int max_split,
                                 const DecoderBatchMachine& machine) {
  DecoderBatchProduct best;
  int64_t least = 0;
  int seqs = 8;
  while (seqs < num_seqs) seqs *= 2;
  for (int split = 1; split <= max_split; ++split) {
    const int64_t clusters = machine.clusters[static_cast<size_t>(split)];
    if (clusters == 0) continue;
    DecoderBatchProduct p;
    p.num_seqs = static_cast<int>(num_seqs);
    p.rows = static_cast<int>(rows);
    p.seqs = seqs;
    p.boxes = boxes;
    p.box_rows = static_cast<int>(8 * ceil_div(ceil_div(rows, clusters), 8));
    p.groups = static_cast<int>(ceil_div(int64_t{boxes} * p.box_rows, kDecoderBatchGroup));
    p.split = split;
    p.steps = static_cast<int>(ceil_div(inputs, kDecoderBatchStep));
    p.tiles = ceil_div(rows, p.box_rows);
    if (p.groups > kDecoderBatchMaxGroups || p.steps < 2 * split) continue;
    const int64_t rows_read = boxes * p.box_rows + kDecoderBatchMaxSeqs;
    const int64_t cost = rows_read * ceil_div(p.steps, split) + kPartCost * (split - 1);
    if (best.split > 0 && cost >= least) continue;
    best = p, least = cost;
  }
  if (best.split == 0) return best;
  best.state_bytes = state_bytes;
  const auto stages = [&](int on_way, int stage) {
    return std::clamp<int>(
        on_way / stage, 2,
        static_cast<int>(std::min<int64_t>(kDecoderBatchMaxStages, best.steps / best.split)));
  };
  best.weight_stages = stages(kDecoderBatchWeightsOnWay, best.weight_bytes());
  best.vector_stages = stages(kDecoderBatchVectorsOnWay, best.vector_bytes());
  while (best.shared_bytes() > kDecoderBatchSharedBytes && best.weight_stages > 2)
    --(best.vector_stages > best.weight_stages ? best.vector_stages : best.weight_stages);
  return best;
}

}  // namespace

int DecoderBatchProduct::shared_bytes() const {
  // The tensor cores read whole groups of rows.
  const int rings = std::max(
      weight_stages * weight_bytes() + vector_stages * vector_bytes(),
      (weight_stages - 1) * weight_bytes() + groups * kDecoderBatchGroup * kDecoderBatchStep * 2);
  const int sums = seqs * pitch() * 4 + sent_bytes();
  // Barriers: each stage full and empty, sums that are sent; a float and an int for each sequence.
  const int barriers = (4 * kDecoderBatchMaxStages + 2) * 8;
  return kDecoderBatchAlignment + std::max(rings, sums) + own_seqs() * box_rows * state_bytes +
         barriers + own_seqs() * 8;
}

DecoderBatchPlan plan_decoder_batch(const DecoderBatchShape& s,
                                    const DecoderBatchMachine& machine) {
  DecoderBatchPlan plan;
  if (s.num_seqs < 1 || s.num_seqs > kDecoderBatchMaxSeqs || s.d_model % 8 != 0 ||
      s.d_inner % 8 != 0 || s.d_model >= int64_t{1} << 24 || s.d_inner >= int64_t{1} << 24 ||
      (s.d_model > kMaxWidth && s.state_bytes == 4 && !s.any_width))
    return plan;
  plan.in =
      plan_product(s.d_inner, 2, s.d_model, s.num_seqs, 3 * s.state_bytes, kMaxInSplit, machine);
  plan.out = plan_product(s.d_model, 1, s.d_inner, s.num_seqs, 0, kDecoderBatchMaxSplit, machine);
  for (const DecoderBatchProduct* p : {&plan.in, &plan.out})
    if (p->split == 0 || p->shared_bytes() > kDecoderBatchSharedBytes) return plan;
  plan.usable = true;
  return plan;
}

}  // namespace krait::cuda
