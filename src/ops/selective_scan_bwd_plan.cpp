#include "ops/selective_scan_bwd_plan.h"

#include <algorithm>
#include <sstream>
#include <string>

#include "core/error.h"

namespace krait::cuda {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 2;  // 128 threads of 255 registers
constexpr size_t kReserved = 1024;  // bytes of shared memory that a block takes beyond its own
// dB and dC of single units take 8 bytes per element of u; above this many bytes units are summed
// in fours before they reach memory.
constexpr int64_t kMaxPartialBytes = int64_t{1} << 30;

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The share of the GPU's blocks that work, when `items` equal pieces are dealt out.
double utilization(int64_t items, int64_t places) {
  return static_cast<double>(items) / static_cast<double>(ceil_div(items, places) * places);
}

}  // namespace

ScanBwdPlan plan_selective_scan_bwd(const ScanBwdShape& shape, const ScanBwdDevice& device) {
  ScanBwdPlan plan{};
  plan.padded_states = static_cast<int>(ceil_div(shape.d_state, kScanBwdStates)) * kScanBwdStates;
  plan.group_units = ceil_div(shape.d_inner / shape.n_groups, kScanBwdUnit);
  // Four units a block move less; one unit a block where that fills the GPU better.
  const int64_t places = kBlocksPerMultiprocessor * device.multiprocessors;
  const int64_t units = shape.n_groups * plan.group_units;
  const int64_t quads = shape.n_groups * ceil_div(plan.group_units, kScanBwdQuad);
  // Segments side by side cost a quarter more: only where sequences leave the GPU half idle.
  plan.cut =
      shape.tokens > kScanBwdSegment * shape.num_seqs && 3 * units * shape.num_seqs < 2 * places;
  plan.pieces = shape.num_seqs + (plan.cut ? shape.tokens / kScanBwdSegment : 0);
  const int64_t partial_bytes = shape.tokens * units * shape.d_state * 8;
  const bool fits = plan.padded_states == kScanBwdStates;
  const bool small = partial_bytes <= kMaxPartialBytes;
  plan.rounds = fits && (!small || utilization(quads * plan.pieces, places) >
                                       0.9 * utilization(units * plan.pieces, places))
                    ? kScanBwdQuad
                    : 1;
  plan.group_blocks = ceil_div(plan.group_units, plan.rounds);
  plan.blocks = shape.n_groups * plan.group_blocks;

  // Two blocks on a multiprocessor first, then the next tile fetched early.
  const auto fits_times = [&](size_t blocks, int stages) {
    plan.stages = stages;
    plan.shared_bytes = static_cast<size_t>(
        scan_bwd_shared(plan.rounds, plan.padded_states, stages, shape.element_bytes).bytes);
    return blocks * (plan.shared_bytes + kReserved) <= device.shared_bytes_per_block + kReserved;
  };
  if (!fits_times(2, 2) && !fits_times(2, 1) && !fits_times(1, 2) && !fits_times(1, 1))
    throw Error("this GPU's shared memory is too small for the scan's backward pass", "d_state",
                std::to_string(device.shared_bytes_per_block) + " bytes",
                std::to_string(plan.shared_bytes) + " bytes");

  // Sums over tokens (dA, dD, ddt_bias) are kept per walker: as few as fill the GPU evenly.
  const int64_t waves = ceil_div(plan.blocks * plan.pieces, places);
  plan.walkers = std::clamp<int64_t>(ceil_div(plan.pieces, waves), 1, 65535);
  plan.chain_blocks =
      plan.cut ? ceil_div(shape.d_inner * shape.d_state, kScanBwdChainThreads) * shape.num_seqs : 0;
  KRAIT_CHECK(plan.blocks <= kMaxGrid && plan.chain_blocks <= kMaxGrid, plan.to_string());
  return plan;
}

std::string ScanBwdPlan::to_string() const {
  std::ostringstream out;
  out << rounds << " rounds, " << (cut ? "segments" : "sequences") << " " << pieces << ", "
      << blocks << " x " << walkers << " blocks of " << shared_bytes << " bytes, " << stages
      << " stages";
  return out.str();
}

}  // namespace krait::cuda
