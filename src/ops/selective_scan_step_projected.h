// A step of the scan that does dt_proj's product itself. Used by selective_scan_step_cuda.cu only.
#pragma once

#include "ops/selective_scan.h"

namespace krait::cuda {

// Where scan_step_projects says so.
void launch_selective_scan_step_projected(Context&, const SelectiveScan&);

}  // namespace krait::cuda
