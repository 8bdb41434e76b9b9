// Cuts text into the words that BPE works on: tokenizer.json's "pre_tokenizer" of types ByteLevel,
// Split, Digits and Sequence of those. Each step cuts every piece of the step before it, as if it
// were a text of its own.
#pragma once

#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "generate/regex.h"

namespace krait {

// What becomes of the parts that the pattern matches, and of the parts between them.
enum class SplitBehavior {
  kRemoved,             // matches are dropped
  kIsolated,            // every match is a piece
  kMergedWithPrevious,  // a match ends the piece before it
  kMergedWithNext,      // a match begins the piece after it
  kContiguous,          // a run of matches is one piece
};

struct PreTokenizerStep {
  std::optional<Regex> pattern;  // none: the step does not cut
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // what the pattern does not match counts as match, and the reverse
  bool add_prefix_space = false;  // before cutting, a piece that starts with no space gets one
};

class PreTokenizer {
 public:
  explicit PreTokenizer(std::vector<PreTokenizerStep> steps) : steps_(std::move(steps)) {}

  struct Scratch {
    explicit Scratch(size_t text_bytes) : regex(text_bytes) {}
    RegexScratch regex;
    // Text that was changed; views of it stay good as long as this lives.
    std::deque<std::string> storage;
  };
  using Emit = std::function<void(std::string_view)>;

  // text: well-formed UTF-8. Words are handed over in order; they are views of `text` or of
  // scratch.storage.
  // may_prefix: false where the text continues what stands before it.
  void split(std::string_view text, bool may_prefix, Scratch& scratch, const Emit& emit) const {
    run(0, text, may_prefix, scratch, emit);
  }

 private:
  void run(size_t step, std::string_view text, bool may_prefix, Scratch& scratch,
           const Emit& emit) const;

  std::vector<PreTokenizerStep> steps_;
};

}  // namespace krait
