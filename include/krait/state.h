#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace krait {

// Where a model stands in a text: all that it remembers of it, in a size that does not depend on
// the text's length. A State is a value. A copy is a fork of the conversation; assigning an earlier
// one takes it back. LanguageModel::save_state keeps it in a file.
class State {
 public:
  State() = default;  // before any text

  bool empty() const { return pending_ < 0; }
  int64_t tokens() const { return tokens_; }  // read and written so far

  // For the same machine and release: unlike a file, they do not tell damage or another model.
  std::vector<std::byte> to_bytes() const;
  static State from_bytes(std::span<const std::byte> bytes);  // throws Error

  bool operator==(const State&) const = default;

 private:
  friend class LanguageModel;

  std::vector<std::byte> memory_;  // of the model: convolution inputs and scan states of each layer
  int32_t pending_ = -1;           // the last token, which the model reads next; -1: none
  int64_t tokens_ = 0;             // so far
  std::vector<int32_t> recent_;    // the tokens that the repetition penalty may look back at
};

}  // namespace krait
