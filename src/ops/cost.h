// What an op must do at the least: the floor that measured times are held against.
#pragma once

#include <cstdint>

namespace krait {

struct Cost {
  double flops = 0;  // multiplications and additions
  double bytes = 0;  // memory that must be read or written once
  double exps = 0;   // exponentials, where they are what limits
};

}  // namespace krait
