#include "generate/tokenizer_json.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <unordered_set>

#include "core/error.h"
#include "formats/json.h"
#include "generate/utf8.h"

namespace krait {
namespace {

using nlohmann::json;

// GPT-2's printable alphabet: a byte is written as the character of that number where it is
// printable Latin-1, else as one from U+0100 on.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    byte_of_.fill(-1);
    int32_t next = 0x100;
    for (int32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
      byte_of_[static_cast<size_t>(printable ? byte : next++)] = byte;
    }
  }
  // The bytes that `name` writes; nothing when a character is not of the alphabet.
  std::optional<std::string> bytes(std::string_view name) const {
    std::string out;
    while (!name.empty()) {
      const Utf8Char c = first_utf8(name);
      if (!c.valid() || c.code_point >= static_cast<int32_t>(byte_of_.size())) return std::nullopt;
      const int32_t byte = byte_of_[static_cast<size_t>(c.code_point)];
      if (byte < 0) return std::nullopt;
      out += static_cast<char>(byte);
      name.remove_prefix(c.size);
    }
    return out;
  }

 private:
  std::array<int32_t, 0x100 + 68> byte_of_;  // 68 bytes are not printable
};

std::string member(const std::string& where, const std::string& key) { return where + ": " + key; }
std::string item(const std::string& where, size_t index) {
  return where + "[" + std::to_string(index) + "]";
}

void allow_only(const json& object, const std::string& where,
                std::initializer_list<std::string_view> keys) {
  if (!object.is_object()) throw Error("wrong type", where, "an object", object.type_name());
  for (const auto& [key, value] : object.items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      throw Error("field " + in_quotes(key) + " is not supported", where);
    }
  }
}

[[noreturn]] void refuse_type(const std::string& where, const char* expected,
                              const std::string& type) {
  throw Error("not supported", member(where, "type"), expected, in_quotes(type));
}

bool flag(const json& object, const std::string& key, const std::string& where, bool otherwise) {
  return has_field(object, key, where) ? get_bool(object, key, where) : otherwise;
}

// ---- normalizer

void read_normalizer(const json& node, const std::string& where, std::vector<NormalForm>& out) {
  const std::string type = get_string(node, "type", where);
  if (type == "Sequence") {
    allow_only(node, where, {"type", "normalizers"});
    const json& parts = get_array(node, "normalizers", where);
    for (size_t i = 0; i < parts.size(); ++i) {
      read_normalizer(parts[i], item(member(where, "normalizers"), i), out);
    }
    return;
  }
  if (type == "NFC") {
    out.push_back(NormalForm::kNfc);
  } else if (type == "NFD") {
    out.push_back(NormalForm::kNfd);
  } else if (type == "NFKC") {
    out.push_back(NormalForm::kNfkc);
  } else if (type == "NFKD") {
    out.push_back(NormalForm::kNfkd);
  } else {
    refuse_type(where, "NFC, NFD, NFKC, NFKD or Sequence", type);
  }
  allow_only(node, where, {"type"});
}

// ---- pre_tokenizer

constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

SplitBehavior read_behavior(const json& node, const std::string& where) {
  const std::string name = get_string(node, "behavior", where);
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  throw Error("not supported", member(where, "behavior"),
              "Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous",
              in_quotes(name));
}

PreTokenizerStep read_split(const json& node, const std::string& where) {
  allow_only(node, where, {"type", "pattern", "behavior", "invert"});
  PreTokenizerStep step;
  const json& pattern = get_object(node, "pattern", where);
  const std::string place = member(where, "pattern");
  allow_only(pattern, place, {"Regex", "String"});
  if (pattern.size() != 1) throw Error("wrong members", place, "one of Regex, String");
  const bool literal = pattern.contains("String");
  const std::string key = literal ? "String" : "Regex";
  step.pattern.emplace(get_string(pattern, key, place), literal, member(place, key));
  step.behavior = read_behavior(node, where);
  step.invert = flag(node, "invert", where, false);
  return step;
}

PreTokenizerStep read_digits(const json& node, const std::string& where) {
  allow_only(node, where, {"type", "individual_digits"});
  PreTokenizerStep step;
  step.pattern.emplace(R"(\p{N})", false, where);
  step.behavior = flag(node, "individual_digits", where, false) ? SplitBehavior::kIsolated
                                                                : SplitBehavior::kContiguous;
  return step;
}

PreTokenizerStep read_byte_level(const json& node, const std::string& where) {
  allow_only(node, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
  PreTokenizerStep step;
  step.add_prefix_space = flag(node, "add_prefix_space", where, true);
  if (flag(node, "use_regex", where, true)) step.pattern.emplace(kGpt2Pattern, false, where);
  return step;
}

// Every step's type is appended to `types`, its place in the file to `places`.
void read_pre_tokenizer(const json& node, const std::string& where,
                        std::vector<PreTokenizerStep>& steps, std::vector<std::string>& types) {
  const std::string type = get_string(node, "type", where);
  if (type == "Sequence") {
    allow_only(node, where, {"type", "pretokenizers"});
    const json& parts = get_array(node, "pretokenizers", where);
    for (size_t i = 0; i < parts.size(); ++i) {
      read_pre_tokenizer(parts[i], item(member(where, "pretokenizers"), i), steps, types);
    }
    return;
  }
  if (type == "ByteLevel") {
    steps.push_back(read_byte_level(node, where));
  } else if (type == "Split") {
    steps.push_back(read_split(node, where));
  } else if (type == "Digits") {
    steps.push_back(read_digits(node, where));
  } else {
    refuse_type(where, "ByteLevel, Split, Digits or Sequence", type);
  }
  types.push_back(type);
}

void read_pre_tokenizer(const json& root, const std::string& where,
                        std::vector<PreTokenizerStep>& steps) {
  const std::string place = member(where, "pre_tokenizer");
  std::vector<std::string> types;
  if (has_field(root, "pre_tokenizer", where)) {
    read_pre_tokenizer(root["pre_tokenizer"], place, steps, types);
  }
  // ByteLevel turns text into bytes, which the steps before it do not know of.
  if (types.empty() || types.back() != "ByteLevel" ||
      std::count(types.begin(), types.end(), "ByteLevel") != 1) {
    throw Error("not a byte-level tokenizer", place, "one step of type ByteLevel, the last");
  }
}

// ---- post_processor, decoder

void read_template(const json& node, const std::string& where, TokenizerSpec& spec) {
  allow_only(node, where, {"type", "single", "pair", "special_tokens"});
  const json& pieces = get_array(node, "single", where);
  bool seen_text = false;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const std::string place = item(member(where, "single"), i);
    if (has_field(pieces[i], "Sequence", place)) {
      if (seen_text) throw Error("the text occurs twice", place);
      seen_text = true;
      continue;
    }
    const std::string name = get_string(get_object(pieces[i], "SpecialToken", place), "id",
                                        member(place, "SpecialToken"));
    const json& specials = get_object(node, "special_tokens", where);
    const std::string table = member(where, "special_tokens");
    const json& special = get_object(specials, name, table);
    const json& ids = get_array(special, "ids", member(table, name));
    for (size_t k = 0; k < ids.size(); ++k) {
      const std::string at = item(member(member(table, name), "ids"), k);
      if (!ids[k].is_number_integer()) throw Error("wrong type", at, "a whole number");
      const int64_t id = ids[k].get<int64_t>();
      if (id < 0 || id >= static_cast<int64_t>(spec.tokens.size()) ||
          !spec.tokens[static_cast<size_t>(id)].exists) {
        throw Error("no such token", at, "an id of the vocabulary", std::to_string(id));
      }
      (seen_text ? spec.after : spec.before).push_back(static_cast<int32_t>(id));
    }
  }
  if (!seen_text) throw Error("the text does not occur", member(where, "single"), "a Sequence");
}

void read_post_processor(const json& node, const std::string& where, TokenizerSpec& spec) {
  const std::string type = get_string(node, "type", where);
  if (type == "Sequence") {
    allow_only(node, where, {"type", "processors"});
    const json& parts = get_array(node, "processors", where);
    for (size_t i = 0; i < parts.size(); ++i) {
      read_post_processor(parts[i], item(member(where, "processors"), i), spec);
    }
  } else if (type == "TemplateProcessing") {
    if (!spec.before.empty() || !spec.after.empty()) throw Error("a second template", where);
    read_template(node, where, spec);
  } else if (type == "ByteLevel") {  // changes offsets only, which nothing here has
    allow_only(node, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
  } else {
    refuse_type(where, "ByteLevel, TemplateProcessing or Sequence", type);
  }
}

void check_decoder(const json& node, const std::string& where) {
  const std::string type = get_string(node, "type", where);
  if (type == "Sequence") {
    allow_only(node, where, {"type", "decoders"});
    const json& parts = get_array(node, "decoders", where);
    if (parts.size() != 1) throw Error("not supported", member(where, "decoders"), "one decoder");
    return check_decoder(parts[0], item(member(where, "decoders"), 0));
  }
  if (type != "ByteLevel") refuse_type(where, "ByteLevel or Sequence", type);
  allow_only(node, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
}

// ---- model

void read_vocabulary(const json& vocabulary, const std::string& where, const ByteAlphabet& alphabet,
                     TokenizerSpec& spec) {
  if (vocabulary.empty()) throw Error("no tokens", where);
  // A few reserved ids may be missing; more would let a small file ask for much memory.
  const auto limit = static_cast<int64_t>(8 * vocabulary.size() + 1024);
  for (const auto& [name, value] : vocabulary.items()) {
    const std::string place = where + " " + in_quotes(name);
    if (!value.is_number_integer())
      throw Error("wrong type", place, "a whole number", value.type_name());
    const bool huge = value.is_number_unsigned() && value.get<uint64_t>() > INT32_MAX;
    const int64_t id = huge ? INT64_MAX : value.get<int64_t>();
    if (id < 0 || id >= limit) {
      throw Error("token id out of range", place,
                  "0 to " + std::to_string(limit - 1) + " for " +
                      std::to_string(vocabulary.size()) + " tokens",
                  value.dump());
    }
    if (id >= static_cast<int64_t>(spec.tokens.size()))
      spec.tokens.resize(static_cast<size_t>(id) + 1);
    auto& token = spec.tokens[static_cast<size_t>(id)];
    if (token.exists) throw Error("token id given twice", place, "", value.dump());
    // A name with other characters is text as it stands (added tokens that are listed in the
    // vocabulary too).
    token = {alphabet.bytes(name).value_or(name), true, false};
    spec.ids.emplace(name, static_cast<int32_t>(id));
  }
}

int32_t merge_part(const json& value, const std::string& name, const std::string& where,
                   const std::unordered_map<std::string, int32_t>& ids) {
  const auto found = ids.find(name);
  if (found == ids.end()) {
    throw Error("merge of a token that is not in the vocabulary", where, "",
                in_quotes(value.dump()));
  }
  return found->second;
}

Bpe::Merge read_merge(const json& value, const std::string& where,
                      const std::unordered_map<std::string, int32_t>& ids) {
  std::string left, right;
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
      left = text.substr(0, space);
      right = text.substr(space + 1);
    }
  } else if (value.is_array() && value.size() == 2 && value[0].is_string() &&
             value[1].is_string()) {
    left = value[0].get<std::string>();
    right = value[1].get<std::string>();
  }
  if (left.empty() || right.empty()) {
    throw Error("bad merge", where, "\"left right\" or [\"left\", \"right\"]",
                in_quotes(value.dump()));
  }
  return {merge_part(value, left, where, ids), merge_part(value, right, where, ids),
          merge_part(value, left + right, where, ids)};
}

void check_model_fields(const json& model, const std::string& where) {
  allow_only(model, where,
             {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
              "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  if (has_field(model, "type", where)) {
    const std::string type = get_string(model, "type", where);
    if (type != "BPE") refuse_type(where, "BPE", type);
  }
  if (has_field(model, "dropout", where) && get_number(model, "dropout", where) != 0) {
    throw Error("dropout is not supported", member(where, "dropout"), "null",
                model["dropout"].dump());
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (has_field(model, key, where) && !get_string(model, key, where).empty()) {
      throw Error("not supported", member(where, key), "null",
                  in_quotes(get_string(model, key, where)));
    }
  }
  if (flag(model, "byte_fallback", where, false)) {
    throw Error("not supported", member(where, "byte_fallback"), "false", "true");
  }
}

void read_model(const json& model, const std::string& where, TokenizerSpec& spec) {
  check_model_fields(model, where);
  const ByteAlphabet alphabet;
  read_vocabulary(get_object(model, "vocab", where), member(where, "vocab"), alphabet, spec);
  spec.bpe.byte_ids.fill(-1);
  const bool ignore_merges = flag(model, "ignore_merges", where, false);
  if (ignore_merges) spec.bpe.whole_words.emplace();
  for (const auto& [name, id] : spec.ids) {
    const auto bytes = alphabet.bytes(name);
    if (!bytes || bytes->empty()) continue;
    if (bytes->size() == 1) spec.bpe.byte_ids[static_cast<uint8_t>((*bytes)[0])] = id;
    if (ignore_merges) spec.bpe.whole_words->emplace(*bytes, id);
  }
  const json& merges = get_array(model, "merges", where);
  spec.bpe.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    spec.bpe.merges.push_back(read_merge(merges[i], item(member(where, "merges"), i), spec.ids));
  }
  if (has_field(model, "unk_token", where)) {
    const std::string name = get_string(model, "unk_token", where);
    const auto found = spec.ids.find(name);
    if (found == spec.ids.end()) {
      throw Error("not in the vocabulary", member(where, "unk_token"), "", in_quotes(name));
    }
    spec.bpe.unk_id = found->second;
  }
  spec.bpe.fuse_unk = flag(model, "fuse_unk", where, false);
}

// ---- added_tokens

AddedToken read_added_token(const json& node, const std::string& where) {
  allow_only(node, where,
             {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
  AddedToken token;
  token.id = static_cast<int32_t>(get_int(node, "id", where, 0, INT32_MAX - 1));
  token.content = get_string(node, "content", where);
  token.special = flag(node, "special", where, false);
  token.normalized = flag(node, "normalized", where, !token.special);
  token.single_word = flag(node, "single_word", where, false);
  token.lstrip = flag(node, "lstrip", where, false);
  token.rstrip = flag(node, "rstrip", where, false);
  if (token.content.empty() || token.content.size() > kMaxAddedToken) {
    throw Error("bad added token", member(where, "content"),
                "1 to " + std::to_string(kMaxAddedToken) + " bytes",
                std::to_string(token.content.size()));
  }
  return token;
}

// The tokenizers library gives an added token the id that the vocabulary has for it, else the next
// free one, whatever the file says; so a file that says otherwise has no one meaning.
void read_added_tokens(const json& list, const std::string& where, TokenizerSpec& spec) {
  auto next = static_cast<int32_t>(spec.ids.size());
  std::unordered_set<int32_t> listed;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string place = item(where, i);
    AddedToken token = read_added_token(list[i], place);
    const auto known = spec.ids.find(token.content);
    const int32_t expected = known != spec.ids.end() ? known->second : next;
    if (token.id != expected) {
      throw Error("id of the added token " + in_quotes(token.content), member(place, "id"),
                  std::to_string(expected), std::to_string(token.id));
    }
    if (!listed.insert(token.id).second) {
      throw Error("added token given twice", place, "", in_quotes(token.content));
    }
    next = std::max(next, token.id + 1);
    const auto id = static_cast<size_t>(token.id);
    if (id >= spec.tokens.size()) spec.tokens.resize(id + 1);
    spec.tokens[id] = {token.content, true, token.special};
    spec.ids.emplace(token.content, token.id);
    spec.added.push_back(std::move(token));
  }
}

}  // namespace

TokenizerSpec read_tokenizer_json(const std::filesystem::path& path) {
  const json root = parse_json_file(path);
  const std::string where = path.string();
  allow_only(root, where,
             {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
              "post_processor", "decoder", "model"});
  if (has_field(root, "version", where) && get_string(root, "version", where) != "1.0") {
    throw Error("unknown version", member(where, "version"), "\"1.0\"", root["version"].dump());
  }
  TokenizerSpec spec;
  if (has_field(root, "normalizer", where)) {
    read_normalizer(root["normalizer"], member(where, "normalizer"), spec.normal_forms);
  }
  read_pre_tokenizer(root, where, spec.pre_tokenizer);
  read_model(get_object(root, "model", where), member(where, "model"), spec);
  if (has_field(root, "added_tokens", where)) {
    read_added_tokens(get_array(root, "added_tokens", where), member(where, "added_tokens"), spec);
  }
  if (has_field(root, "post_processor", where)) {
    read_post_processor(root["post_processor"], member(where, "post_processor"), spec);
  }
  if (has_field(root, "decoder", where)) check_decoder(root["decoder"], member(where, "decoder"));
  return spec;
}

}  // namespace krait
