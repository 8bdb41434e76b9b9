// Which model it is, as 16 hexadecimal digits: equal for the same weights in either dialect and in
// any number of shards, different as soon as one weight is.
#pragma once

#include <string>

#include "model/weights.h"

namespace krait {

// XXH64 over what bears on the computation in `config` and over all weights' bytes as they lie in
// the files, whatever they are computed in. Reads all weights once, on all cores. The model comes
// from load_model. Two models that differ have the same digest with probability 2^-64.
std::string model_digest(const Model& model);

}  // namespace krait
