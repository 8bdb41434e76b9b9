// A step of the scan that does dt_proj's product itself. Used by selective_scan_step_cuda.cu only.
#pragma once

#include "ops/selective_scan.h"
#include "ops/selective_scan_plan.h"

namespace krait::cuda {

// Of either step.
ScanShape step_shape_of(const SelectiveScan&);

// Where scan_step_projects says so.
void launch_selective_scan_step_projected(Context&, const SelectiveScan&);

}  // namespace krait::cuda
