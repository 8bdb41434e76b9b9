// What this machine can do at best, measured: the floors that benchmarks print beside their times.
#pragma once

#include "core/rng.h"
#include "ops/context.h"

namespace krait {

// GB/s at which memory far larger than the caches is read by the context's threads, or copied
// (bytes read and written) by its GPU; the best of several runs, at most half a second.
double measure_read_bandwidth(Context&);

// exp2 of the scan's inner loop on data that stays on chip, in exps per second; the best of several
// runs, about 20 milliseconds.
double measure_exp_rate(Context&);

// GFLOP/s of the engine's matrix product x weight^T in f32 or bf16: the best of several runs of
// large shapes (tokens x in x out; on a CPU 1024 x 4096 x 2048, 2048 x 1536 x 768 and 2048 x 768 x
// 3072, on a GPU 8192 x 8192 x 8192), on random data.
double measure_gemm_rate(Context&, DType);

// Fills a contiguous f32 or bf16 tensor in `memory` with random values in [low, high), a pattern of
// a million repeated: for benchmarks.
void fill_random(const Tensor& t, Memory& memory, Rng& rng, double low, double high);

}  // namespace krait
