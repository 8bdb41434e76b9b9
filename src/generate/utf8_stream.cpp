#include "generate/utf8_stream.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace krait {

std::string Utf8Stream::push(std::string_view bytes) {
  held_ += bytes;
  std::string out;
  std::string_view rest = held_;
  while (!rest.empty()) {
    const size_t valid = valid_utf8_prefix(rest);
    out += rest.substr(0, valid);
    rest.remove_prefix(valid);
    if (rest.empty()) break;
    const Utf8Char c = first_utf8(rest);
    if (c.incomplete) break;
    out += kReplacementCharacter;
    rest.remove_prefix(c.size);
  }
  held_.erase(0, held_.size() - rest.size());
  return out;
}

std::string Utf8Stream::flush() {
  // What is held is the start of one character, so one maximal subpart.
  const bool any = !held_.empty();
  held_.clear();
  return std::string(any ? kReplacementCharacter : "");
}

StopMatcher::StopMatcher(std::vector<std::string> stops) {
  for (std::string& stop : stops) {
    if (stop.empty()) throw Error("empty stop string", "stop");
    Pattern pattern;
    pattern.failure.assign(stop.size() + 1, 0);
    for (size_t i = 1; i < stop.size(); ++i) {
      uint32_t k = pattern.failure[i];
      while (k != 0 && stop[k] != stop[i]) k = pattern.failure[k];
      pattern.failure[i + 1] = stop[k] == stop[i] ? k + 1 : 0;
    }
    pattern.text = std::move(stop);
    patterns_.push_back(std::move(pattern));
  }
}

std::string StopMatcher::push(std::string_view text) {
  if (found_) return {};
  if (patterns_.empty()) return std::string(text);
  size_t longest_found = 0;
  for (const char c : text) {
    held_ += c;
    for (size_t i = 0; i < patterns_.size(); ++i) {
      Pattern& p = patterns_[i];
      while (p.matched != 0 && p.text[p.matched] != c) p.matched = p.failure[p.matched];
      if (p.text[p.matched] == c) ++p.matched;
      if (p.matched == p.text.size() && p.matched > longest_found) {
        found_ = i;
        longest_found = p.matched;
      }
    }
    if (found_) {
      std::string out = held_.substr(0, held_.size() - longest_found);
      held_.clear();
      return out;
    }
  }
  size_t keep = 0;
  for (const Pattern& p : patterns_) keep = std::max<size_t>(keep, p.matched);
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::flush() {
  for (Pattern& p : patterns_) p.matched = 0;
  return std::exchange(held_, {});
}

}  // namespace krait
