#include "generate/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "generate/utf8.h"

namespace krait {
namespace {

bool composes(NormalForm form) { return form == NormalForm::kNfc || form == NormalForm::kNfkc; }

// Below this, every character is in normal form, starts a combining sequence, and combines with
// nothing before it.
int32_t first_interesting(NormalForm form) { return form == NormalForm::kNfc ? 0x300 : 0x80; }

utf8proc_option_t options(NormalForm form) {
  const bool compatibility = form == NormalForm::kNfkc || form == NormalForm::kNfkd;
  return static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE |
                                        (compatibility ? UTF8PROC_COMPAT : 0));
}

void append_decomposition(int32_t code_point, NormalForm form, std::vector<int32_t>& out) {
  int32_t parts[32];  // the longest decomposition in Unicode has 18 (U+FDFA)
  int boundary = 0;
  const utf8proc_ssize_t count =
      utf8proc_decompose_char(code_point, parts, std::size(parts), options(form), &boundary);
  KRAIT_CHECK(count >= 0 && count <= static_cast<utf8proc_ssize_t>(std::size(parts)));
  out.insert(out.end(), parts, parts + count);
}

// Canonical ordering: marks between two starters go by combining class. (utf8proc's own ordering
// swaps neighbours, which is quadratic on a long run of marks.)
void order_marks(std::vector<int32_t>& text) {
  const auto combining_class = [](int32_t c) { return utf8proc_get_property(c)->combining_class; };
  for (size_t i = 0; i < text.size(); ++i) {
    if (combining_class(text[i]) == 0) continue;
    size_t end = i + 1;
    while (end < text.size() && combining_class(text[end]) != 0) ++end;
    std::stable_sort(text.begin() + i, text.begin() + end,
                     [&](int32_t a, int32_t b) { return combining_class(a) < combining_class(b); });
    i = end;
  }
}

void append_normalized(std::vector<int32_t>& decomposed, NormalForm form, std::string& out) {
  order_marks(decomposed);
  size_t count = decomposed.size();
  if (composes(form)) {
    const utf8proc_ssize_t length = utf8proc_normalize_utf32(
        decomposed.data(), static_cast<utf8proc_ssize_t>(count),
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    KRAIT_CHECK(length >= 0);
    count = static_cast<size_t>(length);
  }
  for (size_t i = 0; i < count; ++i) append_utf8(out, static_cast<uint32_t>(decomposed[i]));
}

}  // namespace

std::string_view normalize(std::string_view text, NormalForm form, std::string& storage) {
  const int32_t interesting = first_interesting(form);
  const size_t none = std::string_view::npos;
  storage.clear();
  size_t copied = 0;  // text[0, copied) is in storage in normal form
  size_t previous =
      none;  // start of the character just before `at`, which the next one may combine with
  std::vector<int32_t> decomposed;
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = first_utf8(text.substr(at));
    if (!c.valid() || c.code_point < interesting) {
      previous = c.valid() ? at : none;
      at += c.size;
      continue;
    }
    const size_t begin = previous == none ? at : previous;
    decomposed.clear();
    if (begin != at) {
      append_decomposition(first_utf8(text.substr(begin)).code_point, form, decomposed);
    }
    while (at < text.size()) {
      const Utf8Char next = first_utf8(text.substr(at));
      if (!next.valid() || next.code_point < interesting) break;
      append_decomposition(next.code_point, form, decomposed);
      at += next.size;
    }
    storage.append(text, copied, begin - copied);
    append_normalized(decomposed, form, storage);
    copied = at;
    previous = none;
  }
  if (copied == 0) return text;
  storage.append(text, copied);
  return storage;
}

}  // namespace krait
