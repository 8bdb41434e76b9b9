// Text out of a stream of bytes: what tokens give when they are printed one by one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "generate/utf8.h"

namespace krait {

// Hands on whole characters: the start of one is held back until the rest comes. The output is
// always UTF-8: bytes that are none become U+FFFD, one for each maximal subpart (as browsers,
// Python's errors="replace" and Rust's from_utf8_lossy do).
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  std::string flush();  // the end: what is held back is not going to be a character

 private:
  std::string held_;  // at most 3 bytes
};

// Looks for stop strings in a stream of text. Text that may be the beginning of one is held back.
// Linear in the text times the number of stop strings.
class StopMatcher {
 public:
  // Throws Error for an empty stop string.
  explicit StopMatcher(std::vector<std::string> stops = {});

  // Returns the text that can be handed on. Once a stop string is complete that is all before it,
  // and nothing from then on. The string that is complete first counts; of several that end with
  // the same byte, the longest.
  std::string push(std::string_view text);
  std::string flush();  // the end: what is held back after all is text

  // Index of the stop string that was found.
  std::optional<size_t> found() const { return found_; }

 private:
  struct Pattern {
    std::string text;
    std::vector<uint32_t> failure;  // Knuth, Morris, Pratt: of each prefix, its longest proper
                                    // suffix that is a prefix
    uint32_t matched = 0;           // bytes of `text` that the stream ends with
  };

  std::vector<Pattern> patterns_;
  std::string held_;
  std::optional<size_t> found_;
};

}  // namespace krait
