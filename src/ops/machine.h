// What this machine can do at best, measured: the floors that benchmarks print beside their times.
#pragma once

#include "ops/context.h"

namespace krait {

// GB/s at which the context's threads read memory far larger than the caches; the best of several
// runs, about half a second. Takes 512 MiB while it runs.
double measure_read_bandwidth(Context&);

// GFLOP/s of the engine's matrix product x weight^T in f32 or bf16: the best of several runs of
// three large shapes (tokens x in x out: 1024 x 4096 x 2048, 2048 x 1536 x 768, 2048 x 768 x 3072).
double measure_gemm_rate(Context&, DType);

}  // namespace krait
