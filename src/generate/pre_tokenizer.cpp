#include "generate/pre_tokenizer.h"

#include "generate/utf8.h"

namespace krait {
namespace {

// Puts matches and the gaps between them together to pieces, as the behavior says. Ranges come in
// order and without gaps (a match may be empty).
class PieceBuilder {
 public:
  PieceBuilder(std::string_view text, SplitBehavior behavior, const PreTokenizer::Emit& emit)
      : text_(text), behavior_(behavior), emit_(emit) {}

  void add(size_t begin, size_t end, bool is_match) {
    if (behavior_ == SplitBehavior::kRemoved) {
      if (!is_match) emit_piece(begin, end);
      return;
    }
    if (behavior_ == SplitBehavior::kIsolated) return emit_piece(begin, end);
    if (pending_ && joins(is_match)) {
      end_ = end;
    } else {
      finish();
      begin_ = begin;
      end_ = end;
      pending_ = true;
    }
    last_is_match_ = is_match;
  }
  void finish() {
    if (pending_) emit_piece(begin_, end_);
    pending_ = false;
  }

 private:
  // Whether a range continues the pending piece, which ends in a range of kind last_is_match_.
  bool joins(bool is_match) const {
    switch (behavior_) {
      case SplitBehavior::kContiguous:
        return is_match == last_is_match_;
      case SplitBehavior::kMergedWithPrevious:
        return is_match && !last_is_match_;
      default:
        return !is_match && last_is_match_;  // kMergedWithNext
    }
  }
  void emit_piece(size_t begin, size_t end) const {
    if (begin != end) emit_(text_.substr(begin, end - begin));
  }

  std::string_view text_;
  SplitBehavior behavior_;
  const PreTokenizer::Emit& emit_;
  size_t begin_ = 0, end_ = 0;
  bool pending_ = false, last_is_match_ = false;
};

void cut(std::string_view text, const PreTokenizerStep& step, RegexScratch& scratch,
         const PreTokenizer::Emit& emit) {
  PieceBuilder pieces(text, step.behavior, emit);
  size_t done = 0, from = 0;
  bool any = false;
  Regex::Match match;
  while (step.pattern->find(text, from, scratch, match)) {
    // An empty match right behind the last match does not count.
    if (match.begin == match.end && any && match.end == done) {
      if (match.end == text.size()) break;
      from = match.end + first_utf8(text.substr(match.end)).size;
      continue;
    }
    if (done != match.begin) pieces.add(done, match.begin, step.invert);
    pieces.add(match.begin, match.end, !step.invert);
    done = from = match.end;
    any = true;
  }
  if (done != text.size()) pieces.add(done, text.size(), step.invert);
  pieces.finish();
}

}  // namespace

void PreTokenizer::run(size_t index, std::string_view text, bool may_prefix, Scratch& scratch,
                       const Emit& emit) const {
  if (index == steps_.size()) return emit(text);
  const PreTokenizerStep& step = steps_[index];
  if (step.add_prefix_space && may_prefix && !text.starts_with(' ')) {
    std::string& prefixed = scratch.storage.emplace_back(1, ' ');
    text = prefixed.append(text);
  }
  if (!step.pattern) return run(index + 1, text, may_prefix, scratch, emit);
  bool first = true;
  cut(text, step, scratch.regex, [&](std::string_view piece) {
    run(index + 1, piece, may_prefix || !first, scratch, emit);
    first = false;
  });
}

}  // namespace krait
