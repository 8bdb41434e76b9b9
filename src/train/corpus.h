// Training text in memory: documents as token ids, laid end to end, divided into training and
// validation.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/run_config.h"

namespace krait {

struct Corpus {
  std::vector<int32_t> tokens;
  std::vector<int64_t> start = {0};  // document i is tokens[start[i]] .. tokens[start[i + 1] - 1]

  int64_t documents() const { return static_cast<int64_t>(start.size()) - 1; }
  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  int64_t predictions() const;  // tokens that have a token of their document before them
};

struct TrainingText {
  Corpus train, validation;          // share no token
  std::optional<int32_t> eos_id;     // at each document's end; none: no such token
  int64_t vocab_size = 0;            // ids are below it
  std::vector<int32_t> token_bytes;  // by id: bytes of text; empty: one byte each
  std::vector<std::string> files;    // those read, in order
  uint32_t digest = 0;               // of all tokens and the division

  // Bytes of text that the targets (negative: none) stand for.
  int64_t bytes_of(const std::vector<int32_t>& targets) const;
};

// Reads the files and folders (folders recursively, hidden files left out, in the order of their
// paths), splits them into documents, encodes each once; a tokenizer with an end-of-text token has
// it appended to each document. Division, when no validation files are given: from 20 documents on,
// whole documents drawn by data.seed until validation_fraction of the tokens is reached; with
// fewer, the end of each document. Throws Error: missing, unreadable, empty or binary (zero bytes)
// files, a file that is in both lists, too little text for one batch.
TrainingText load_training_text(const DataSettings& settings);

// The files that a list of files and folders stands for.
std::vector<std::string> list_text_files(const std::vector<std::string>& paths,
                                         const std::string& where);

}  // namespace krait
