// Whether an engine's pass gives what another one gives for the same inputs, on shapes on which a
// reference for all channels would take hours: scan and convolution mix no channels, so some of
// them tell. For benchmarks, before anything is timed.
#pragma once

#include <vector>

#include "ops/causal_conv1d.h"
#include "ops/selective_scan.h"

namespace krait {

// sqrt(sum (a - b)^2 / sum b^2); NaN anywhere gives NaN; b all zero: the absolute RMS of a.
double relative_rms(const std::vector<double>& actual, const std::vector<double>& expected);

// Each runs the pass on ctx's engine, then for the first and the last channels on the CPU engine
// (an engine whose memory the host can read: on the reference), and returns the largest relative
// RMS error of any output: of a forward pass y and the final state, of a backward pass all
// gradients but the scan's dB and dC, which sum over all channels. NaN where a result is no number.
// Sums that the pass adds to must be zero before; op.state is the initial state.
double selective_scan_fwd_error(Context& ctx, const SelectiveScan& op);
double selective_scan_bwd_error(Context& ctx, const SelectiveScan& op,
                                const SelectiveScanGrad& grad);
double causal_conv1d_fwd_error(Context& ctx, const CausalConv1d& op);
double causal_conv1d_bwd_error(Context& ctx, const CausalConv1d& op, const CausalConv1dGrad& grad);

}  // namespace krait
