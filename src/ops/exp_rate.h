// How many exponentials this CPU gives: the floor of the selective scan.
#pragma once

#include "ops/context.h"

namespace krait {

// exp2 of the scan's inner loop over 16 KiB that stay in the first cache, all threads of ctx; best
// of several runs, in exps per second. Takes about 20 milliseconds.
double measure_exp_rate(Context& ctx);

}  // namespace krait
