// Counts what a test program takes from the heap: link count_allocations.cpp.
#pragma once

#include <cstdint>

namespace krait {

int64_t allocation_count();  // calls of operator new so far, by anybody in the program

}  // namespace krait
