#pragma once

#define KRAIT_VERSION_MAJOR 0
#define KRAIT_VERSION_MINOR 1
#define KRAIT_VERSION_PATCH 0

namespace krait {

// Of the library that the program runs with, e.g. "0.1.0"; the macros are of the headers it was
// compiled with.
const char* version();

}  // namespace krait
