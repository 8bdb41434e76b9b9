// A step of the scan that does dt_proj's product itself. Used by selective_scan_step*_cuda.cu only.
#pragma once

#include "ops/selective_scan.h"
#include "ops/selective_scan_plan.h"
#include "ops/selective_scan_step_ahead_plan.h"

namespace krait::cuda {

struct State;

// Of either step.
ScanShape step_shape_of(const SelectiveScan&);

// Where scan_step_projects says so.
void launch_selective_scan_step_projected(Context&, const SelectiveScan&);
// Of the same, where plan_selective_scan_step_ahead says so; from compute capability 9.0 on.
void launch_selective_scan_step_ahead(const State&, const ScanStepAheadPlan&, const SelectiveScan&);

}  // namespace krait::cuda
