#include "generate/tokenizer.h"

#include <algorithm>
#include <bit>
#include <functional>

#include "core/error.h"
#include "generate/tokenizer_json.h"
#include "generate/utf8.h"

namespace krait {
namespace {

// Words that this text had before, with where their ids stand in the output. Direct-mapped: a new
// word takes the place of an old one.
class WordCache {
 public:
  explicit WordCache(size_t text_bytes)
      : slots_(std::bit_ceil(std::clamp<size_t>(text_bytes / 8, 1, size_t{1} << 15))) {}

  struct Slot {
    std::string_view word;
    size_t begin = 0, count = 0;  // in the output
  };
  Slot& slot(std::string_view word) {
    return slots_[std::hash<std::string_view>{}(word) & (slots_.size() - 1)];
  }

 private:
  std::vector<Slot> slots_;
};

AddedTokenMatcher make_matcher(const TokenizerSpec& spec, bool normalized) {
  std::vector<AddedToken> tokens;
  std::vector<std::string> as_text;
  for (const AddedToken& token : spec.added) {
    if (token.normalized != normalized) continue;
    std::string text = token.content, storage;
    for (const NormalForm form : spec.normal_forms) {
      if (normalized) text = std::string(normalize(text, form, storage));
    }
    tokens.push_back(token);
    as_text.push_back(std::move(text));
  }
  return {tokens, as_text};
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerSpec&& spec)
      : tokens(std::move(spec.tokens)),
        ids(std::move(spec.ids)),
        normal_forms(spec.normal_forms),
        before(spec.before),
        after(spec.after),
        raw_added(make_matcher(spec, false)),
        normalized_added(make_matcher(spec, true)),
        pre_tokenizer(std::move(spec.pre_tokenizer)),
        bpe(std::move(spec.bpe)) {
    for (const AddedToken& token : spec.added) {
      if (token.content == "<|endoftext|>") eos = token.id;
    }
  }

  const TokenizerSpec::Token& token(int32_t id) const {
    if (id < 0 || id >= static_cast<int32_t>(tokens.size()) ||
        !tokens[static_cast<size_t>(id)].exists) {
      throw Error("no such token", "token id", "0 to " + std::to_string(tokens.size() - 1),
                  std::to_string(id));
    }
    return tokens[static_cast<size_t>(id)];
  }

  std::vector<TokenizerSpec::Token> tokens;
  std::unordered_map<std::string, int32_t> ids;
  std::vector<NormalForm> normal_forms;
  std::vector<int32_t> before, after;
  AddedTokenMatcher raw_added, normalized_added;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  std::optional<int32_t> eos;
  bool words_are_bytes = false;  // no pattern, no merges: ids are bytes

  class Encoder;
};

// One call of encode().
class Tokenizer::Impl::Encoder {
 public:
  Encoder(const Impl& impl, size_t text_bytes, bool parse_special)
      : impl_(impl),
        parse_special_(parse_special),
        scratch_(text_bytes),
        cache_(text_bytes),
        on_word_([this](std::string_view word) { add_word(word); }) {}

  std::vector<int32_t> ids;

  void add_text(std::string_view text) {
    const auto on_token = [&](const AddedToken& token) { ids.push_back(token.id); };
    impl_.raw_added.split(
        text, parse_special_,
        [&](std::string_view piece) {
          impl_.normalized_added.split(
              normalized(piece), parse_special_, [&](std::string_view part) { add_plain(part); },
              on_token);
        },
        on_token);
  }

 private:
  // The view stays good as long as the encoder: the cache holds words of it.
  std::string_view normalized(std::string_view text) {
    for (const NormalForm form : impl_.normal_forms) {
      std::string storage;
      const std::string_view result = normalize(text, form, storage);
      if (result.data() != text.data()) text = scratch_.storage.emplace_back(std::move(storage));
    }
    return text;
  }

  void add_plain(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
      const size_t valid = valid_utf8_prefix(text.substr(at));
      if (valid != 0)
        impl_.pre_tokenizer.split(text.substr(at, valid), at == 0, scratch_, on_word_);
      at += valid;
      const size_t begin = at;
      while (at < text.size() && !first_utf8(text.substr(at)).valid()) {
        at += first_utf8(text.substr(at)).size;
      }
      if (at != begin) add_invalid(text.substr(begin, at - begin));
    }
  }

  void add_invalid(std::string_view bytes) {
    const auto known = [&](char c) { return impl_.bpe.has_byte(static_cast<uint8_t>(c)); };
    if (std::all_of(bytes.begin(), bytes.end(), known)) return add_word(bytes);
    std::string& word = scratch_.storage.emplace_back();
    for (const char c : bytes) word += known(c) ? std::string_view(&c, 1) : kReplacementCharacter;
    add_word(word);
  }

  void add_word(std::string_view word) {
    WordCache::Slot& slot = cache_.slot(word);
    const size_t begin = ids.size();
    if (slot.word == word && slot.count != 0) {
      ids.resize(begin + slot.count);
      std::copy_n(ids.begin() + static_cast<ptrdiff_t>(slot.begin), slot.count,
                  ids.begin() + static_cast<ptrdiff_t>(begin));
      return;
    }
    impl_.bpe.encode(word, bpe_scratch_, ids);
    slot = {word, begin, ids.size() - begin};
  }

  const Impl& impl_;
  bool parse_special_;
  PreTokenizer::Scratch scratch_;
  WordCache cache_;
  Bpe::Scratch bpe_scratch_;
  PreTokenizer::Emit on_word_;
};

Tokenizer Tokenizer::from_file(const std::filesystem::path& path) {
  return Tokenizer(std::make_shared<Impl>(read_tokenizer_json(path)));
}

Tokenizer Tokenizer::bytes() {
  TokenizerSpec spec;
  for (int32_t id = 0; id < 256; ++id) {
    std::string byte(1, static_cast<char>(id));
    spec.ids.emplace(byte, id);
    spec.tokens.push_back({std::move(byte), true, false});
    spec.bpe.byte_ids[static_cast<size_t>(id)] = id;
  }
  auto impl = std::make_shared<Impl>(std::move(spec));
  impl->words_are_bytes = true;
  return Tokenizer(std::move(impl));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool parse_special,
                                       bool add_special) const {
  if (impl_->words_are_bytes) {
    std::vector<int32_t> ids(text.size());
    std::transform(text.begin(), text.end(), ids.begin(),
                   [](char c) { return static_cast<uint8_t>(c); });
    return ids;
  }
  Impl::Encoder encoder(*impl_, text.size(), parse_special);
  if (add_special) encoder.ids = impl_->before;
  encoder.add_text(text);
  if (add_special) {
    encoder.ids.insert(encoder.ids.end(), impl_->after.begin(), impl_->after.end());
  }
  return std::move(encoder.ids);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  for (const int32_t id : ids) {
    const TokenizerSpec::Token& token = impl_->token(id);
    if (!(skip_special && token.special)) text += token.bytes;
  }
  return text;
}

std::string_view Tokenizer::token_bytes(int32_t id) const { return impl_->token(id).bytes; }

int32_t Tokenizer::size() const { return static_cast<int32_t>(impl_->tokens.size()); }

bool Tokenizer::is_special(int32_t id) const { return impl_->token(id).special; }

std::optional<int32_t> Tokenizer::id_of(std::string_view name) const {
  const auto found = impl_->ids.find(std::string(name));
  if (found == impl_->ids.end()) return std::nullopt;
  return found->second;
}

std::optional<int32_t> Tokenizer::eos_id() const { return impl_->eos; }

}  // namespace krait
