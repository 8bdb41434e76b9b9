// Byte-pair encoding of one word, as tokenizer.json's "BPE" model defines it: the word starts as
// one symbol per byte; of all neighbouring pairs that have a merge, the one of lowest rank
// (leftmost among equals) is merged, until none is left.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace krait {

class Bpe {
 public:
  struct Merge {
    int32_t left, right, result;  // ids
  };
  struct Options {
    std::array<int32_t, 256> byte_ids;  // id of each byte's token; -1: none
    std::vector<Merge> merges;          // by rank; of a pair given twice the last one counts
    int32_t unk_id = -1;                // stands for bytes without a token; -1: they are dropped
    bool fuse_unk = false;              // one unk for a run of such bytes
    std::optional<std::unordered_map<std::string, int32_t>>
        whole_words;  // ignore_merges: words taken as they are
  };
  explicit Bpe(Options options);

  // Memory that encode() reuses from word to word. One per thread.
  struct Scratch {
    struct Symbol {
      int32_t id, previous,
          next;  // neighbours by index, -1: none; an absorbed symbol has id kAbsorbed
    };
    struct Candidate {
      int32_t rank, at, result;
    };
    std::vector<int32_t> ids, ranks, results;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  bool has_byte(uint8_t byte) const { return byte_ids_[byte] >= 0 || unk_id_ >= 0; }

  // Appends the ids of `word` to `out`. O(n log n). At most 2^31 - 1 bytes.
  void encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& out) const;

 private:
  struct Slot {
    uint64_t pair;
    int32_t rank, result;
  };

  const Slot* find(int32_t left, int32_t right) const;
  size_t first_slot(uint64_t pair) const;
  void insert(const Merge& merge, int32_t rank);
  void initial_ids(std::string_view word, std::vector<int32_t>& ids) const;
  void merge_short(Scratch& scratch) const;
  void merge_long(Scratch& scratch) const;
  void push_candidate(Scratch& scratch, int32_t left) const;

  std::array<int32_t, 256> byte_ids_;
  int32_t unk_id_;
  bool fuse_unk_;
  std::optional<std::unordered_map<std::string, int32_t>> whole_words_;
  std::vector<Slot> slots_;  // open addressing, a power of two, at most half full
  uint64_t seed_;            // of the hash, drawn per object: a file cannot aim at collisions
};

}  // namespace krait
