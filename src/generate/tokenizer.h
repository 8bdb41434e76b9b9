// Text to token ids and back.
//
//   const Tokenizer tokenizer = Tokenizer::from_file("model/tokenizer.json");
//   const std::vector<int32_t> ids = tokenizer.encode("Hello world");
//   const std::string text = tokenizer.decode(ids);
//
// A Tokenizer is a handle to something immutable: copies are cheap and may be used from several
// threads.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

class Tokenizer {
 public:
  // tokenizer.json of the BPE / ByteLevel family. Throws Error for what it does not understand
  // (tokenizer_json.h).
  static Tokenizer from_file(const std::filesystem::path& path);
  // 256 tokens, ids are bytes: for models without a tokenizer.json. No special tokens.
  static Tokenizer bytes();

  // The ids that the tokenizers library gives. Bytes that are no UTF-8, which that library cannot
  // be given, become byte tokens, and what stands around them is tokenized as texts of their own;
  // decode() gives them back. (Where the vocabulary has no token for such a byte, as GPT-NeoX's has
  // none for 0xC0, 0xC1 and 0xF5 to 0xFF, U+FFFD stands in for it.)
  // parse_special: special tokens written in the text ("<|endoftext|>") become their ids; false:
  // they are plain text.
  // add_special: adds what the file's template puts around a text (a beginning-of-sequence token,
  // say).
  std::vector<int32_t> encode(std::string_view text, bool parse_special = true,
                              bool add_special = true) const;

  // The bytes of the tokens, one after the other; they need not be UTF-8 (utf8_stream.h).
  // decode(encode(text)) is `text` up to what the file's normalizer and add_prefix_space do to it
  // and white space that added tokens swallow. Throws Error for an id that is no token.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;
  // The bytes that one token adds; the view is good as long as a copy of this tokenizer lives.
  std::string_view token_bytes(int32_t id) const;

  int32_t size() const;  // all ids are below it; a model's vocabulary may be padded beyond
  bool is_special(int32_t id) const;
  // By the token's name in the file, where a space is written as U+0120. Of bytes(): strings of one
  // byte.
  std::optional<int32_t> id_of(std::string_view name) const;
  // The id of "<|endoftext|>", where that is an added token. A model's config may name another.
  std::optional<int32_t> eos_id() const;

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

  std::shared_ptr<const Impl> impl_;
};

}  // namespace krait
