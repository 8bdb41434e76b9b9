#include "generate/bpe.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <random>

#include "core/error.h"

namespace krait {
namespace {

constexpr uint64_t kEmpty = UINT64_MAX;  // no pair: ids are not negative
constexpr int32_t kAbsorbed = -2;
constexpr int32_t kNoMerge = std::numeric_limits<int32_t>::max();
constexpr size_t kShortWord = 48;  // up to here scanning all ranks for the lowest beats a heap

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// std heaps put the largest on top: the lowest rank, then the leftmost.
bool comes_later(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
}

}  // namespace

Bpe::Bpe(Options options)
    : byte_ids_(options.byte_ids),
      unk_id_(options.unk_id),
      fuse_unk_(options.fuse_unk),
      whole_words_(std::move(options.whole_words)),
      slots_(std::bit_ceil(2 * options.merges.size() + 2), Slot{kEmpty, 0, 0}),
      seed_(uint64_t{std::random_device{}()} << 32 | std::random_device{}()) {
  KRAIT_CHECK(options.merges.size() < static_cast<size_t>(kNoMerge));
  for (size_t i = 0; i < options.merges.size(); ++i) {
    insert(options.merges[i], static_cast<int32_t>(i));
  }
}

size_t Bpe::first_slot(uint64_t pair) const {
  uint64_t h = (pair ^ seed_) * 0x9E3779B97F4A7C15u;
  h ^= h >> 32;
  h *= 0xD6E8FEB86659FD93u;
  return (h ^ h >> 32) & (slots_.size() - 1);
}

void Bpe::insert(const Merge& merge, int32_t rank) {
  const uint64_t pair = pair_key(merge.left, merge.right);
  size_t i = first_slot(pair);
  while (slots_[i].pair != kEmpty && slots_[i].pair != pair) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = {pair, rank, merge.result};
}

const Bpe::Slot* Bpe::find(int32_t left, int32_t right) const {
  const uint64_t pair = pair_key(left, right);
  for (size_t i = first_slot(pair);; i = (i + 1) & (slots_.size() - 1)) {
    if (slots_[i].pair == pair) return &slots_[i];
    if (slots_[i].pair == kEmpty) return nullptr;
  }
}

void Bpe::initial_ids(std::string_view word, std::vector<int32_t>& ids) const {
  ids.clear();
  bool after_unk = false;
  for (const char c : word) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(c)];
    if (id >= 0) {
      ids.push_back(id);
    } else if (unk_id_ >= 0 && !(fuse_unk_ && after_unk)) {
      ids.push_back(unk_id_);
    }
    after_unk = id < 0;
  }
}

void Bpe::encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& out) const {
  if (word.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw Error("text too long", "word", "2147483647 bytes at most", std::to_string(word.size()));
  }
  if (whole_words_) {
    const auto found = whole_words_->find(std::string(word));
    if (found != whole_words_->end()) {
      out.push_back(found->second);
      return;
    }
  }
  initial_ids(word, scratch.ids);
  if (scratch.ids.size() <= kShortWord) {
    merge_short(scratch);
  } else {
    merge_long(scratch);
  }
  out.insert(out.end(), scratch.ids.begin(), scratch.ids.end());
}

void Bpe::merge_short(Scratch& scratch) const {
  std::vector<int32_t>&ids = scratch.ids, &ranks = scratch.ranks, &results = scratch.results;
  size_t n = ids.size();
  if (n < 2) return;
  ranks.resize(n);  // ranks[i], results[i]: the merge of ids[i] with ids[i + 1]
  results.resize(n);
  const auto look_up = [&](size_t i) {
    const Slot* slot = find(ids[i], ids[i + 1]);
    ranks[i] = slot ? slot->rank : kNoMerge;
    results[i] = slot ? slot->result : -1;
  };
  for (size_t i = 0; i + 1 < n; ++i) look_up(i);
  while (n > 1) {
    const auto end = ranks.begin() + static_cast<ptrdiff_t>(n - 1);
    const auto lowest = std::min_element(ranks.begin(), end);
    if (*lowest == kNoMerge) break;
    const size_t at = static_cast<size_t>(lowest - ranks.begin());
    ids[at] = results[at];
    --n;
    for (size_t i = at + 1; i < n; ++i) ids[i] = ids[i + 1];
    for (size_t i = at + 1; i + 1 < n; ++i) {
      ranks[i] = ranks[i + 1];
      results[i] = results[i + 1];
    }
    if (at > 0) look_up(at - 1);
    if (at + 1 < n) look_up(at);
  }
  ids.resize(n);
}

void Bpe::push_candidate(Scratch& scratch, int32_t left) const {
  const auto& symbol = scratch.symbols[static_cast<size_t>(left)];
  if (symbol.next < 0) return;
  const Slot* slot = find(symbol.id, scratch.symbols[static_cast<size_t>(symbol.next)].id);
  if (slot == nullptr) return;
  scratch.heap.push_back({slot->rank, left, slot->result});
  std::push_heap(scratch.heap.begin(), scratch.heap.end(), comes_later);
}

void Bpe::merge_long(Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  const auto n = static_cast<int32_t>(scratch.ids.size());
  symbols.clear();
  heap.clear();
  for (int32_t i = 0; i < n; ++i) {
    symbols.push_back({scratch.ids[static_cast<size_t>(i)], i - 1, i + 1 < n ? i + 1 : -1});
  }
  for (int32_t i = 0; i + 1 < n; ++i) push_candidate(scratch, i);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), comes_later);
    const auto [rank, at, result] = heap.back();
    heap.pop_back();
    auto& left = symbols[static_cast<size_t>(at)];
    if (left.id == kAbsorbed || left.next < 0) continue;
    auto& right = symbols[static_cast<size_t>(left.next)];
    const Slot* slot = find(left.id, right.id);
    if (slot == nullptr || slot->rank != rank) continue;  // one of the two has changed since
    left.id = result;
    left.next = right.next;
    right.id = kAbsorbed;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = at;
    if (left.previous >= 0) push_candidate(scratch, left.previous);
    push_candidate(scratch, at);
  }
  scratch.ids.clear();
  for (int32_t i = 0; i >= 0 && i < n; i = symbols[static_cast<size_t>(i)].next) {
    scratch.ids.push_back(symbols[static_cast<size_t>(i)].id);
  }
}

}  // namespace krait
