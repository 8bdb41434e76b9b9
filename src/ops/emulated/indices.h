// The running thread's place, under the names that kernels use.
#pragma once

struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
extern EmulatedIndex threadIdx, blockIdx;
