// Unicode normalization of text that may hold bytes which are no UTF-8; those pass through
// unchanged and separate what is around them. Linear in the text, runs of combining marks of any
// length included.
#pragma once

#include <string>
#include <string_view>

namespace krait {

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

// Returns `text` itself where nothing needs changing, else a view of `storage`, which is
// overwritten.
std::string_view normalize(std::string_view text, NormalForm form, std::string& storage);

}  // namespace krait
