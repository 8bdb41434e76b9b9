// Tokens that are found in the text itself, before it is cut into words: tokenizer.json's
// "added_tokens".
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace krait {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;  // control token: not printed when specials are skipped, not read from text
                         // that is foreign
  bool normalized = false;              // looked for in the normalized text
  bool single_word = false;             // only where no word character touches it
  bool lstrip = false, rstrip = false;  // takes the white space before, after it along
};

inline constexpr size_t kMaxAddedToken = 256;  // bytes; keeps the search linear in the text

// Finds tokens in a text, from left to right, at each place the longest.
class AddedTokenMatcher {
 public:
  // as_text: what to look for instead of content (the normalized content), one per token.
  AddedTokenMatcher(const std::vector<AddedToken>& tokens, const std::vector<std::string>& as_text);

  // on_text(std::string_view) and on_token(const AddedToken&) are called in the order of the text.
  // Pieces of text are not empty. parse_special false: special tokens are text.
  template <class OnText, class OnToken>
  void split(std::string_view text, bool parse_special, OnText&& on_text,
             OnToken&& on_token) const {
    Found found;
    size_t done = 0;
    for (size_t from = 0; next(text, from, done, parse_special, found); from = found.search_on) {
      if (found.begin > done) on_text(text.substr(done, found.begin - done));
      on_token(tokens_[found.token]);
      done = std::max(done, found.end);
    }
    if (done < text.size()) on_text(text.substr(done));
  }

 private:
  struct Found {
    size_t token, begin, end, search_on;  // [begin, end) with the white space it takes along
  };

  // The first token at or behind `from`; text before `done` is spoken for.
  bool next(std::string_view text, size_t from, size_t done, bool parse_special,
            Found& found) const;
  int32_t longest_at(std::string_view text, size_t at, size_t& length) const;

  std::vector<AddedToken> tokens_;
  // A trie. Edges: (node << 8 | byte) -> node. token_of_[node]: index into tokens_, -1: none ends
  // here.
  std::unordered_map<uint64_t, uint32_t> edges_;
  std::vector<int32_t> token_of_;
  std::vector<bool> starts_;  // (256) bytes that some token starts with
};

}  // namespace krait
