// Reads tokenizer.json of the tokenizers library, as far as it is of the BPE / ByteLevel family
// (GPT-2, GPT-NeoX, Llama 3). What the file says is either understood or refused, by name: nothing
// is skipped. The two members that do not change what a text's tokens are, "truncation" and
// "padding", are ignored, as transformers ignores them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <unordered_map>
#include <vector>

#include "generate/added_tokens.h"
#include "generate/bpe.h"
#include "generate/normalizer.h"
#include "generate/pre_tokenizer.h"

namespace krait {

struct TokenizerSpec {
  struct Token {
    std::string bytes;  // what it stands for in text
    bool exists = false, special = false;
  };
  std::vector<Token> tokens;  // by id
  std::unordered_map<std::string, int32_t>
      ids;  // by the token's name in the file ("\u0120the" for " the")
  Bpe::Options bpe;
  std::vector<NormalForm> normal_forms;  // applied in order
  std::vector<PreTokenizerStep> pre_tokenizer;
  std::vector<AddedToken> added;
  std::vector<int32_t> before, after;  // what the template puts around a text
};

// Throws Error, naming file and field.
TokenizerSpec read_tokenizer_json(const std::filesystem::path& path);

}  // namespace krait
