#include "generate/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>

#include "core/error.h"
#include "generate/utf8.h"

namespace krait {
namespace {

// Unicode's White_Space.
bool is_space(int32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

// \w of UTS 18: Alphabetic, marks, decimal numbers, connectors, joiners.
bool is_word(int32_t c) {
  if (c < 0) return false;
  if (c == 0x200C || c == 0x200D) return true;
  // Circled and squared letters are symbols that are Alphabetic.
  if ((c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
      (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189)) {
    return true;
  }
  switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

// The character that ends at `end`; code point -1 at the start of the text or where the bytes are
// none.
Utf8Char character_before(std::string_view text, size_t end) {
  for (size_t size = 1; size <= 4 && size <= end; ++size) {
    const Utf8Char c = first_utf8(text.substr(end - size, size));
    if (c.valid() && c.size == size) return c;
  }
  return {-1, 0, false};
}

Utf8Char character_at(std::string_view text, size_t at) {
  return at < text.size() ? first_utf8(text.substr(at)) : Utf8Char{-1, 0, false};
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(const std::vector<AddedToken>& tokens,
                                     const std::vector<std::string>& as_text)
    : tokens_(tokens), token_of_(1, -1), starts_(256, false) {
  KRAIT_CHECK(tokens.size() == as_text.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    KRAIT_CHECK(!as_text[i].empty());
    uint32_t node = 0;
    for (const char c : as_text[i]) {
      const uint64_t key = uint64_t{node} << 8 | static_cast<uint8_t>(c);
      const auto [edge, is_new] = edges_.try_emplace(key, static_cast<uint32_t>(token_of_.size()));
      if (is_new) token_of_.push_back(-1);
      node = edge->second;
    }
    starts_[static_cast<uint8_t>(as_text[i][0])] = true;
    if (token_of_[node] < 0) token_of_[node] = static_cast<int32_t>(i);
  }
}

int32_t AddedTokenMatcher::longest_at(std::string_view text, size_t at, size_t& length) const {
  int32_t longest = -1;
  uint32_t node = 0;
  for (size_t i = at; i < text.size(); ++i) {
    const auto edge = edges_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (token_of_[node] >= 0) {
      longest = token_of_[node];
      length = i + 1 - at;
    }
  }
  return longest;
}

bool AddedTokenMatcher::next(std::string_view text, size_t from, size_t done, bool parse_special,
                             Found& found) const {
  if (tokens_.empty()) return false;
  for (size_t at = from; at < text.size(); ++at) {
    if (!starts_[static_cast<uint8_t>(text[at])]) continue;
    size_t length = 0;
    const int32_t index = longest_at(text, at, length);
    if (index < 0) continue;
    const AddedToken& token = tokens_[static_cast<size_t>(index)];
    size_t begin = at, end = at + length;
    // A match that does not count is stepped over as a whole.
    at = end - 1;
    if (token.special && !parse_special) continue;
    if (token.single_word && (is_word(character_before(text, begin).code_point) ||
                              is_word(character_at(text, end).code_point))) {
      continue;
    }
    const size_t search_on = end;
    if (token.lstrip) {
      for (;;) {
        const Utf8Char c = character_before(text, begin);
        if (!is_space(c.code_point) || begin - c.size < done) break;
        begin -= c.size;
      }
    }
    if (token.rstrip) {
      for (Utf8Char c = character_at(text, end); is_space(c.code_point);
           c = character_at(text, end)) {
        end += c.size;
      }
    }
    found = {static_cast<size_t>(index), begin, end, search_on};
    return true;
  }
  return false;
}

}  // namespace krait
