// Times single ops on one model's shapes and holds each against its floor: what its bytes,
// multiplications or exponentials take at the rates measured on this machine in the same run.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "ops/context.h"

namespace krait {

struct OpShape {
  int64_t tokens = 512, num_seqs = 1;  // num_seqs sequences of equal length
  int64_t d_model = 768, d_inner = 1536, d_state = 16, d_conv = 4, dt_rank = 48, vocab_size = 50280;
  DType dtype = DType::f32;
};

struct OpTime {
  std::string op, pass, shape, dtype;  // pass: fwd, bwd or step
  double ms, floor_ms;                 // of several runs the best, on a GPU the median
  double gb_per_s, tflop_per_s;  // bytes and operations that the op's cost() counts, by its time
  std::string bound;             // what the floor is made of: "bytes", "flops" or "exps"
  std::optional<double> error;   // relative, to another engine (op_parity.h), where it was compared
};

// Names of the ops that can be timed.
const std::vector<std::string>& bench_op_names();

// Times one op, or every op for "all", on one shape after the other, all of one type; `row` gets
// each result as it comes. check: the scan's and the convolution's passes are first compared with
// another engine's, with the same inputs on the same shape. Throws Error for a name it does not
// know, and where a pass does not agree.
void bench_op(Context& ctx, const std::string& name, const std::vector<OpShape>& shapes, bool check,
              const std::function<void(const OpTime&)>& row);

}  // namespace krait
