#define PCRE2_CODE_UNIT_WIDTH 8
#include "generate/regex.h"

#include <pcre2.h>
#include <time.h>

#include <new>

#include "core/error.h"

namespace krait {
namespace {

constexpr size_t kMaxPattern = size_t{1} << 16;
constexpr uint32_t kMaxSteps = 2'000'000;   // of one attempt at one position
constexpr uint32_t kMaxHeapKiB = 64 << 10;  // interpreter, where there is no JIT
constexpr size_t kMaxJitStack = size_t{4} << 20;
constexpr size_t kStartsPerSearch = 256;  // positions tried between two looks at the clock
constexpr int64_t kBudgetNs = 5'000'000'000, kBudgetPerByteNs = 10'000;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

struct CompileContext {
  CompileContext() : value(pcre2_compile_context_create(nullptr)) {
    if (value == nullptr) throw std::bad_alloc();
    pcre2_set_max_pattern_length(value, kMaxPattern);
    pcre2_set_newline(value, PCRE2_NEWLINE_LF);
  }
  CompileContext(const CompileContext&) = delete;
  CompileContext& operator=(const CompileContext&) = delete;
  ~CompileContext() { pcre2_compile_context_free(value); }
  pcre2_compile_context* value;
};

pcre2_code* compile(std::string_view pattern, uint32_t options, int& error, size_t& offset) {
  const CompileContext context;
  return pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options,
                       &error, &offset, context.value);
}

bool compiles(const std::string& pattern) {
  int error;
  size_t offset;
  pcre2_code* code = compile(pattern, PCRE2_UTF | PCRE2_UCP, error, offset);
  pcre2_code_free(code);
  return code != nullptr;
}

// Rewrites Oniguruma's syntax into PCRE2's:
//   \s   Oniguruma: White_Space; PCRE2 adds U+180E
//   \w   Oniguruma: Alphabetic, marks, numbers, connectors; PCRE2 10.42: letters, numbers,
//   underscore \p{Han}   Oniguruma: the script; PCRE2: the script extensions, which PCRE2 calls by
//   sc: otherwise \uHHHH    a code point
class Rewriter {
 public:
  Rewriter(std::string_view pattern, const std::string& where) : in_(pattern), where_(where) {}

  std::string run() {
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == '\\') {
        escape();
      } else if (in_class_) {
        class_character(c);
      } else {
        if (c == '[') open_class();
        if (c == '(') check_group();
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(const std::string& construct) const {
    throw Error(construct + " in a pattern is not supported", where_, "", in_quotes(in_));
  }
  void copy(size_t count) {
    out_.append(in_.substr(at_, count));
    at_ += count;
  }
  void open_class() {
    in_class_ = true;
    class_first_ = at_ + (in_.substr(at_).starts_with("[^") ? 2 : 1);
  }
  void class_character(char c) {
    if (c == ']' && at_ != class_first_) in_class_ = false;
    if (c == '[' && !in_.substr(at_).starts_with("[:")) refuse("a class inside a class");
    if (c == '[') {  // [:name:]
      const size_t end = in_.find(":]", at_);
      if (end == std::string_view::npos) refuse("an open [:");
      copy(end + 2 - at_);
      return;
    }
    if (in_.substr(at_).starts_with("&&")) refuse("an intersection of classes");
    copy(1);
  }
  // In Ruby's syntax (?m) lets the dot match newlines, in PCRE2 it changes ^ and $.
  void check_group() const {
    if (!in_.substr(at_).starts_with("(?")) return;
    for (size_t i = at_ + 2; i < in_.size(); ++i) {
      const char c = in_[i];
      if (c == 'm') refuse("the option (?m)");
      if (c != '-' && (c < 'a' || c > 'z')) return;
    }
  }
  void property() {
    const size_t open = at_ + 2, close = in_.find('}', at_);
    if (open >= in_.size() || in_[open] != '{' || close == std::string_view::npos) return copy(2);
    std::string name(in_.substr(open + 1, close - open - 1));
    const bool negated = !name.empty() && name[0] == '^';
    if (negated) name.erase(0, 1);
    const bool is_script = compiles("\\p{sc:" + name + "}");
    out_ += std::string(in_.substr(at_, 2)) + (negated ? "{^" : "{") + (is_script ? "sc:" : "") +
            name + "}";
    at_ = close + 1;
  }
  void replace(const std::string& by) {
    out_ += by;
    at_ += 2;
  }
  void escape() {
    if (at_ + 1 == in_.size()) return copy(1);  // PCRE2 reports it
    static constexpr const char* kWord = "\\p{Alphabetic}\\p{M}\\p{N}\\p{Pc}";
    const char c = in_[at_ + 1];
    switch (c) {
      case 's':
        return replace("\\p{White_Space}");
      case 'S':
        return replace("\\P{White_Space}");
      case 'w':
        return replace(in_class_ ? kWord : std::string("[") + kWord + "]");
      case 'W':
        if (in_class_) refuse("\\W inside a class");
        return replace(std::string("[^") + kWord + "]");
      case 'p':
      case 'P':
        return property();
      case 'u':
        if (at_ + 6 > in_.size()) refuse("\\u without four digits");
        out_ += "\\x{" + std::string(in_.substr(at_ + 2, 4)) + "}";
        at_ += 6;
        return;
      case 'h':
      case 'H':
      case 'K':
      case 'C':
      case 'Q':
      case 'E':
      case 'G':
      case 'R':
      case 'X':
      case 'N':
      case 'O':
      case 'g':
      case 'k':
      case 'y':
      case 'Y':
      case 'U':
      case 'L':
        refuse(std::string("\\") + c);
      default:
        return copy(2);
    }
  }

  std::string_view in_;
  const std::string& where_;
  size_t at_ = 0, class_first_ = 0;
  bool in_class_ = false;
  std::string out_;
};

}  // namespace

RegexScratch::RegexScratch(size_t text_bytes)
    : deadline_ns_(now_ns() + kBudgetNs + kBudgetPerByteNs * static_cast<int64_t>(text_bytes)),
      match_data_(pcre2_match_data_create(1, nullptr), pcre2_match_data_free),
      jit_stack_(pcre2_jit_stack_create(size_t{32} << 10, kMaxJitStack, nullptr),
                 pcre2_jit_stack_free),
      context_(pcre2_match_context_create(nullptr), pcre2_match_context_free) {
  if (match_data_ == nullptr || context_ == nullptr) throw std::bad_alloc();
  pcre2_set_match_limit(context_.get(), kMaxSteps);
  pcre2_set_depth_limit(context_.get(), kMaxSteps);
  pcre2_set_heap_limit(context_.get(), kMaxHeapKiB);
  if (jit_stack_ != nullptr) pcre2_jit_stack_assign(context_.get(), nullptr, jit_stack_.get());
}

bool RegexScratch::expired() const { return now_ns() > deadline_ns_; }

Regex::Regex(std::string_view pattern, bool literal, const std::string& where) : where_(where) {
  if (pattern.empty()) throw Error("empty pattern", where);
  if (pattern.size() > kMaxPattern) {
    throw Error("pattern too long", where, std::to_string(kMaxPattern) + " bytes at most",
                std::to_string(pattern.size()));
  }
  const std::string text = literal ? std::string(pattern) : Rewriter(pattern, where).run();
  // Ruby's ^ and $ are those of lines.
  const uint32_t options =
      PCRE2_UTF | PCRE2_USE_OFFSET_LIMIT |
      (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C);
  int error;
  size_t offset;
  pcre2_code* code = compile(text, options, error, offset);
  if (code == nullptr) {
    PCRE2_UCHAR message[160] = {};
    pcre2_get_error_message(error, message, sizeof message);
    throw Error("bad regular expression: " + std::string(reinterpret_cast<char*>(message)), where,
                "", in_quotes(pattern));
  }
  code_.reset(code, [](const pcre2_code* c) { pcre2_code_free(const_cast<pcre2_code*>(c)); });
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where it fails, pcre2_match interprets
}

bool Regex::find(std::string_view text, size_t from, RegexScratch& scratch, Match& match) const {
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const size_t* ovector = pcre2_get_ovector_pointer(scratch.match_data_.get());
  while (from <= text.size()) {
    if (scratch.expired()) throw Error("the pattern takes too long on this text", where_);
    pcre2_set_offset_limit(scratch.context_.get(), from + kStartsPerSearch);
    const int rc = pcre2_match(code_.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK,
                               scratch.match_data_.get(), scratch.context_.get());
    if (rc >= 0) {
      match = {ovector[0], ovector[1]};
      return true;
    }
    if (rc != PCRE2_ERROR_NOMATCH) {
      PCRE2_UCHAR message[160] = {};
      pcre2_get_error_message(rc, message, sizeof message);
      throw Error("the pattern takes too many steps on this text", where_, "",
                  reinterpret_cast<char*>(message));
    }
    from += kStartsPerSearch + 1;
    while (from < text.size() && (text[from] & 0xC0) == 0x80)
      ++from;  // to the start of a character
  }
  return false;
}

}  // namespace krait
