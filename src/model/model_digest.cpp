#include "model/model_digest.h"

#include <charconv>

#include "core/threads.h"
#include "core/xxh64.h"

namespace krait {
namespace {

std::string shortest(float x) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof text, x).ptr);
}

}  // namespace

std::string model_digest(const Model& model) {
  KRAIT_CHECK(!model.in_file.empty(), "the model comes from no file");
  std::vector<uint64_t> hashes(model.in_file.size());
  parallel_for(available_cores(), static_cast<int64_t>(hashes.size()), [&](int64_t i) {
    const Tensor& t = model.in_file[static_cast<size_t>(i)].tensor;
    Xxh64 hash;
    hash.update(t.data, t.bytes());
    hashes[static_cast<size_t>(i)] = hash.value();
  });
  // All sizes are those of the tensors.
  const Config& c = model.config();
  Xxh64 hash;
  hash.update("norm_eps " + shortest(c.norm_eps) + "\nresidual_in_fp32 " +
              std::to_string(c.residual_in_fp32) + "\nselective " +
              std::to_string(c.selective_delta) + std::to_string(c.selective_B) +
              std::to_string(c.selective_C) + "\n");
  for (size_t i = 0; i < hashes.size(); ++i)
    hash.update(model.in_file[i].name + " " + shape_string(model.in_file[i].tensor) + " " +
                hex_digits(hashes[i]) + "\n");
  return hex_digits(hash.value());
}

}  // namespace krait
