// What a ParameterStore holds, where the host can work on it: the store itself where its memory is
// the host's, else a copy.
#pragma once

#include <optional>

#include "model/parameters.h"

namespace krait {

class HostCopy {
 public:
  HostCopy(const Config& config, const ParameterStore& store) : parameters_(store.parameters()) {
    if (store.buffer().memory().on_host()) return;
    copy_.emplace(config);
    store.buffer().download(copy_->flat().data);
    parameters_ = copy_->parameters();
  }

  const Parameters& parameters() const { return parameters_; }
  // Changes, to the store that this was made from.
  void write_back(ParameterStore& store) const {
    if (copy_) store.buffer().upload(copy_->flat().data);
  }

 private:
  std::optional<ParameterStore> copy_;
  Parameters parameters_;
};

}  // namespace krait
