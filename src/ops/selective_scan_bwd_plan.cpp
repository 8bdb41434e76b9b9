#include "ops/selective_scan_bwd_plan.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <sstream>
#include <string>

#include "core/error.h"

namespace krait::cuda {
namespace {

constexpr size_t kReserved = 1024;  // bytes of shared memory that a block takes beyond its own
// dB and dC of single units take 8 bytes per element of u; above this many bytes units are summed
// in pairs before they reach memory.
constexpr int64_t kMaxPartialBytes = int64_t{1} << 30;
// Segments side by side cost a pass for what flows back; sums of single units, memory traffic.
constexpr double kCutCost = 1.3, kUnitCost = 1.05;

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1, kMaxGridY = 65535;

int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// What `items` equal pieces of work cost together, in units of what full multiprocessors need for
// one. A block runs faster the fewer share a multiprocessor.
double relative_time(int64_t items, int multiprocessors) {
  constexpr double kWave[] = {0, 0.7, 1};  // by blocks on a multiprocessor
  static_assert(std::size(kWave) == kScanBwdBlocksPerMultiprocessor + 1);
  const int64_t places = int64_t{kScanBwdBlocksPerMultiprocessor} * multiprocessors;
  const double waves =
      static_cast<double>(items / places) + kWave[ceil_div(items % places, multiprocessors)];
  return waves * static_cast<double>(places) / static_cast<double>(items);
}

// As many blocks on a multiprocessor as there can be, then the next tile fetched early. False: not
// even one fits.
bool fit_shared_memory(ScanBwdPlan& plan, const ScanBwdShape& shape, const ScanBwdDevice& device) {
  for (size_t blocks = kScanBwdBlocksPerMultiprocessor; blocks > 0; --blocks)
    for (plan.stages = 2; plan.stages > 0; --plan.stages) {
      plan.shared_bytes = static_cast<size_t>(
          scan_bwd_shared(plan.rounds, plan.padded_states, plan.stages, shape.element_bytes).bytes);
      if (blocks * (plan.shared_bytes + kReserved) <= device.shared_bytes_per_block + kReserved)
        return true;
    }
  return false;
}

}  // namespace

ScanBwdPlan plan_selective_scan_bwd(const ScanBwdShape& shape, const ScanBwdDevice& device) {
  ScanBwdPlan plan{};
  plan.padded_states = static_cast<int>(ceil_div(shape.d_state, kScanBwdStates)) * kScanBwdStates;
  plan.group_units = ceil_div(shape.d_inner / shape.n_groups, kScanBwdUnit);
  const int64_t places = int64_t{kScanBwdBlocksPerMultiprocessor} * device.multiprocessors;
  const int64_t units = shape.n_groups * plan.group_units;
  const bool small_sums = shape.tokens * units * shape.d_state * 8 <= kMaxPartialBytes;
  const bool one_block_of_states = plan.padded_states == kScanBwdStates;
  double best = std::numeric_limits<double>::infinity();
  for (const bool cut : {false, true})
    for (const int rounds : {kScanBwdPair, 1}) {
      if (cut && shape.tokens <= kScanBwdSegment * shape.num_seqs) continue;
      if (rounds == 1 && !small_sums && one_block_of_states) continue;
      if (rounds > 1 && !one_block_of_states) continue;
      const int64_t blocks = shape.n_groups * ceil_div(plan.group_units, rounds);
      const int64_t items =
          blocks * (cut ? ceil_div(shape.tokens, kScanBwdSegment) : shape.num_seqs);
      const double time = relative_time(items, device.multiprocessors) * (cut ? kCutCost : 1.0) *
                          (rounds == 1 ? kUnitCost : 1.0);
      if (time >= best) continue;
      best = time;
      plan.cut = cut;
      plan.rounds = rounds;
    }
  plan.pieces = shape.num_seqs + (plan.cut ? shape.tokens / kScanBwdSegment : 0);

  if (!fit_shared_memory(plan, shape, device) && plan.rounds > 1) {
    plan.rounds = 1;
    fit_shared_memory(plan, shape, device);
  }
  if (plan.shared_bytes > device.shared_bytes_per_block)
    throw Error("this GPU's shared memory is too small for the scan's backward pass", "d_state",
                std::to_string(device.shared_bytes_per_block) + " bytes",
                std::to_string(plan.shared_bytes) + " bytes");

  plan.group_blocks = ceil_div(plan.group_units, plan.rounds);
  plan.blocks = shape.n_groups * plan.group_blocks;
  // Sums over tokens (dA, dD, ddt_bias) are kept per walker: one for each piece, but no more than
  // deal out the work evenly.
  constexpr int64_t kWaves = 32;
  plan.walkers = std::clamp<int64_t>(kWaves * places / plan.blocks, 1,
                                     std::min<int64_t>(plan.pieces, kMaxGridY));
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
