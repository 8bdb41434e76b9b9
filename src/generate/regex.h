// Regular expressions of tokenizer.json on PCRE2. The files are written for Oniguruma (Ruby's
// syntax): patterns are rewritten where the two read the same text differently, and refused where
// no rewriting is exact.
//
// Patterns come from outside and PCRE2 backtracks. So each search has limits on steps and memory,
// and all searches of one RegexScratch share a time budget; past either, Error.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_match_context_8;
struct pcre2_real_jit_stack_8;

namespace krait {

// What searching needs beside the pattern. One per thread and text.
class RegexScratch {
 public:
  // text_bytes: size of the text about to be searched; the time budget is 5 s and 10 us per byte.
  explicit RegexScratch(size_t text_bytes);

 private:
  friend class Regex;
  bool expired() const;

  template <class T>
  using Owned = std::unique_ptr<T, void (*)(T*)>;

  int64_t deadline_ns_;
  Owned<pcre2_real_match_data_8> match_data_;
  Owned<pcre2_real_jit_stack_8> jit_stack_;
  Owned<pcre2_real_match_context_8> context_;
};

class Regex {
 public:
  // where: file and field, for messages. literal: `pattern` is plain text. Throws Error.
  Regex(std::string_view pattern, bool literal, const std::string& where);

  struct Match {
    size_t begin, end;
  };
  // Finds the first match that starts at `from` or later. `text` must be well-formed UTF-8, `from`
  // a boundary in it.
  bool find(std::string_view text, size_t from, RegexScratch& scratch, Match& match) const;

 private:
  std::shared_ptr<const pcre2_real_code_8> code_;
  std::string where_;
};

}  // namespace krait
