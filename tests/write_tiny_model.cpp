// write_tiny_model FOLDER: for tests that are scripts.
#include <cstdio>

#include "tests/tiny_model.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    krait::write_random_model(argv[1], krait::tiny_config());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
  return 0;
}
