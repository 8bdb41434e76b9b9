#include "formats/safetensors.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "core/checked.h"
#include "core/mapped_file.h"
#include "formats/json.h"

namespace krait {
namespace {

constexpr size_t kDataAlignment = 64;
constexpr size_t kMaxMetadata = size_t{1} << 16;

struct FileType {
  const char* name;
  unsigned bits;
  std::optional<DType> dtype;  // none: known, but no Tensor can hold it
};

constexpr FileType kTypes[] = {
    {"F32", 32, DType::f32}, {"BF16", 16, DType::bf16}, {"F16", 16, DType::f16},
    {"F64", 64, DType::f64}, {"I32", 32, DType::i32},   {"I64", 64, DType::i64},
    {"U8", 8, DType::u8},    {"BOOL", 8, {}},           {"I8", 8, {}},
    {"I16", 16, {}},         {"U16", 16, {}},           {"U32", 32, {}},
    {"U64", 64, {}},         {"C64", 64, {}},           {"F8_E4M3", 8, {}},
    {"F8_E5M2", 8, {}},      {"F8_E8M0", 8, {}},        {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},  {"F6_E2M3", 6, {}},        {"F6_E3M2", 6, {}},
    {"F4", 4, {}},
};

const char* file_name_of(DType dtype) {
  for (const FileType& t : kTypes)
    if (t.dtype == dtype) return t.name;
  return "?";
}

struct Described {
  std::string name;
  const FileType* type = nullptr;
  FileShape shape;
  uint64_t begin = 0, end = 0;  // in the data section
};

// Gathers the header's entries. Nothing is kept but them.
class Header : public JsonEvents {
 public:
  using JsonEvents::JsonEvents;

  std::vector<Described> tensors;
  std::map<std::string, std::string> metadata;

  bool start_object(size_t) override {
    if (state_ == State::start) {
      state_ = State::header;
    } else if (state_ == State::header && name_ == "__metadata__") {
      if (has_metadata_) throw Error("key given twice", at_field());
      has_metadata_ = true;
      state_ = State::metadata;
    } else if (state_ == State::header) {
      if (tensors.size() >= kMaxTensors)
        throw Error("too many tensors", where(), "at most " + std::to_string(kMaxTensors));
      tensors.emplace_back().name = name_;
      seen_type_ = seen_shape_ = seen_offsets_ = false;
      field_.clear();
      state_ = State::tensor;
    } else {
      unexpected("an object");
    }
    return true;
  }

  bool key(std::string& key) override {
    if (state_ == State::header) {
      name_ = key;
    } else if (state_ == State::metadata) {
      field_ = key;
    } else {
      field_ = key;
      bool* seen = key == "dtype"          ? &seen_type_
                   : key == "shape"        ? &seen_shape_
                   : key == "data_offsets" ? &seen_offsets_
                                           : nullptr;
      if (!seen) throw Error("unknown field", at_field(), "dtype, shape or data_offsets");
      if (*seen) throw Error("key given twice", at_field());
      *seen = true;
    }
    return true;
  }

  bool string(std::string& value) override {
    if (state_ == State::metadata) {
      if (metadata.size() >= kMaxMetadata)
        throw Error("too many entries", at_field(), "at most " + std::to_string(kMaxMetadata));
      if (!metadata.emplace(field_, value).second) throw Error("key given twice", at_field());
    } else if (state_ == State::tensor && field_ == "dtype") {
      for (const FileType& t : kTypes)
        if (value == t.name) tensors.back().type = &t;
      if (!tensors.back().type)
        throw Error("unknown element type", at_field(), "F32, BF16, F16, ...", in_quotes(value));
    } else {
      unexpected(in_quotes(value));
    }
    return true;
  }

  bool start_array(size_t) override {
    if (state_ != State::tensor || field_ == "dtype") unexpected("an array");
    state_ = field_ == "shape" ? State::shape : State::offsets;
    num_offsets_ = 0;
    return true;
  }

  bool number_unsigned(uint64_t value) override {
    Described& t = tensors.empty() ? unexpected_tensor(value) : tensors.back();
    if (state_ == State::shape) {
      t.shape.add(value, at_field());
    } else if (state_ == State::offsets && num_offsets_ < 2) {
      (num_offsets_++ == 0 ? t.begin : t.end) = value;
    } else {
      unexpected(std::to_string(value));
    }
    return true;
  }

  bool end_array() override {
    if (state_ == State::offsets && num_offsets_ != 2)
      throw Error("wrong count", at_field(), "two numbers", std::to_string(num_offsets_));
    state_ = State::tensor;
    return true;
  }

  bool end_object() override {
    if (state_ == State::tensor && !(seen_type_ && seen_shape_ && seen_offsets_)) {
      field_ = !seen_type_ ? "dtype" : !seen_shape_ ? "shape" : "data_offsets";
      throw Error("field missing", at_field());
    }
    state_ = state_ == State::header ? State::done : State::header;
    return true;
  }

 protected:
  std::string field() const override {
    switch (state_) {
      case State::start:
      case State::done:
        return "header";
      case State::header:
        return name_.empty() ? "header" : "header: " + in_quotes(name_);
      case State::metadata:
        return "__metadata__: " + in_quotes(field_);
      default:
        return "tensor " + in_quotes(tensors.back().name) + ": " + in_quotes(field_);
    }
  }

  std::string expected() const override {
    switch (state_) {
      case State::metadata:
        return "a string";
      case State::tensor:
        return field_ == "dtype" ? "a string" : "an array of whole numbers";
      case State::shape:
        return "whole numbers of at least 0";
      case State::offsets:
        return "two whole numbers of at least 0";
      default:
        return "an object";
    }
  }

 private:
  enum class State { start, header, metadata, tensor, shape, offsets, done };

  [[noreturn]] Described& unexpected_tensor(uint64_t value) const {
    unexpected(std::to_string(value));
  }

  State state_ = State::start;
  std::string name_, field_;
  bool has_metadata_ = false, seen_type_ = false, seen_shape_ = false, seen_offsets_ = false;
  int num_offsets_ = 0;
};

// The tensors must tile the data section: from 0, without holes or overlap, to the file's end. So
// no byte is hidden and no byte has two meanings.
void check_layout(const std::vector<Described>& tensors, uint64_t data_size,
                  const std::string& where) {
  std::vector<uint32_t> order(tensors.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return std::pair(tensors[a].begin, tensors[a].end) <
           std::pair(tensors[b].begin, tensors[b].end);
  });
  uint64_t position = 0;
  for (const uint32_t i : order) {
    const Described& t = tensors[i];
    const std::string at = where + ": tensor " + in_quotes(t.name) + ": data_offsets";
    if (t.begin != position || t.end < t.begin)
      throw Error(t.begin > position ? "hole in the data" : "data overlaps", at,
                  "begin " + std::to_string(position) + ", end not before it",
                  std::to_string(t.begin) + " to " + std::to_string(t.end));
    const uint64_t bits = checked_mul(t.shape.elements(), t.type->bits, at);
    if (bits % 8 != 0 || bits / 8 != t.end - t.begin)
      throw Error("size does not fit shape and dtype", at,
                  bits % 8 ? "whole bytes" : std::to_string(bits / 8) + " bytes",
                  std::to_string(t.end - t.begin));
    position = t.end;
  }
  if (position != data_size)
    throw Error(position > data_size ? "file truncated" : "bytes after the last tensor", where,
                std::to_string(position) + " bytes of data", std::to_string(data_size));
}

uint64_t little_endian64(const std::byte* p) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | static_cast<uint64_t>(p[i]);
  return value;
}

}  // namespace

TensorTable read_safetensors(std::span<const std::byte> bytes, const std::string& where) {
  if (bytes.size() < 8)
    throw Error("file truncated", where, "8 bytes of header length", std::to_string(bytes.size()));
  const uint64_t length = little_endian64(bytes.data());
  if (length > kMaxSafetensorsHeader)
    throw Error("header too long", where + ": header length",
                "at most " + std::to_string(kMaxSafetensorsHeader), std::to_string(length));
  if (length > bytes.size() - 8)
    throw Error("file truncated", where + ": header length",
                "at most " + std::to_string(bytes.size() - 8), std::to_string(length));
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, length);
  if (text.empty() || text[0] != '{')
    throw Error("not a safetensors file", where + ": header", "{ as its first character",
                in_quotes(text.substr(0, 1)));
  Header header(where);
  parse_json_events(text, header);
  const auto data = bytes.subspan(8 + length);
  check_layout(header.tensors, data.size(), where);

  TensorTable table;
  table.metadata = std::move(header.metadata);
  table.entries.reserve(header.tensors.size());
  for (Described& t : header.tensors) {
    TensorEntry& entry = table.entries.emplace_back();
    entry.name = std::move(t.name);
    entry.dtype = t.type->name;
    if (!t.type->dtype)
      entry.problem = "unsupported element type " + entry.dtype;
    else if (t.shape.rank() > Tensor::kMaxRank)
      entry.problem = "more than 4 dimensions";
    else
      entry.tensor = t.shape.view(data.data() + t.begin, *t.type->dtype);
  }
  sorted_by_name(table.entries, where);
  return table;
}

void write_safetensors(const std::filesystem::path& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata) {
  const std::string where = path.string();
  check_writable(tensors, where);
  std::vector<const NamedTensor*> order;
  for (const NamedTensor& t : tensors) {
    KRAIT_CHECK(t.name != "__metadata__");
    order.push_back(&t);
  }
  std::stable_sort(order.begin(), order.end(), [](const NamedTensor* a, const NamedTensor* b) {
    return size_of(a->tensor.dtype) > size_of(b->tensor.dtype);
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t position = 0;
  for (const NamedTensor* t : order) {
    const auto shape = std::span(t->tensor.shape).first(static_cast<size_t>(t->tensor.rank));
    header[t->name] = {{"dtype", file_name_of(t->tensor.dtype)},
                       {"shape", std::vector<int64_t>(shape.begin(), shape.end())},
                       {"data_offsets", {position, position + t->tensor.bytes()}}};
    position += t->tensor.bytes();
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw Error("name or metadata is not UTF-8", where);
  }
  text.resize((8 + text.size() + kDataAlignment - 1) / kDataAlignment * kDataAlignment - 8, ' ');
  if (text.size() > kMaxSafetensorsHeader) throw Error("too many tensors for one file", where);

  AtomicFile file(path);
  char length[8];
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(text.size() >> (8 * i));
  file.write(length, sizeof length);
  file.write(text);
  for (const NamedTensor* t : order) file.write(t->tensor.data, t->tensor.bytes());
  file.commit();
}

}  // namespace krait
