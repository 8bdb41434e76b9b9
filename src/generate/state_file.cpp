#include "generate/state_file.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <map>

#include "core/mapped_file.h"
#include "core/xxh64.h"
#include "formats/safetensors.h"
#include "model/model_digest.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kVersion = 1;
constexpr const char *kVersionKey = "krait.state", *kModelKey = "model", *kDtypeKey = "dtype",
                     *kChecksumKey = "checksum";
constexpr const char* kDigits = "16 hexadecimal digits";
constexpr const char *kTokens = "tokens", *kRecent = "recent_tokens";
constexpr int64_t kMaxExtent = int64_t{1} << 31;  // of a tensor's dimension
constexpr int64_t kRecent64 = static_cast<int64_t>(kRecentTokens);

using Metadata = std::map<std::string, std::string>;
using Tensors = std::map<std::string, Tensor>;

std::string name_of_conv(int64_t layer) { return "conv." + std::to_string(layer); }
std::string name_of_ssm(int64_t layer) { return "ssm." + std::to_string(layer); }

// Mapped tensors need not be aligned.
template <class T>
T element(const Tensor& t, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(t.data) + static_cast<size_t>(i) * sizeof(T),
              sizeof(T));
  return value;
}

// Of the contents, whatever their order in the file: every entry of the metadata but the checksum
// itself, every tensor with its name, shape and bytes.
std::string checksum_of(const Tensors& tensors, const Metadata& metadata) {
  Xxh64 hash;
  for (const auto& [key, value] : metadata)
    if (key != kChecksumKey) hash.update(key + "=" + value + "\n");
  for (const auto& [name, tensor] : tensors) {
    hash.update(name + " " + shape_string(tensor) + "\n");
    hash.update(tensor.data, tensor.bytes());
  }
  return hex_digits(hash.value());
}

// Finite in bf16, too, as which it may be loaded.
void check_finite(const Tensor& t, const std::string& where) {
  constexpr float kLargest = 3.38953139e38f;
  dispatch_f32_bf16(t.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = 0; i < t.size(); ++i)
      if (const float x = element<T>(t, i); !(std::abs(x) <= kLargest))
        throw Error("the state is not a number", where + ": element " + std::to_string(i),
                    "finite numbers", std::to_string(x));
  });
}

// A state file whose every byte has been looked at.
class StateFile {
 public:
  explicit StateFile(const fs::path& path)
      : file_(path), table_(read_safetensors({file_.data(), file_.size()}, path.string())) {
    info_.path = path.string();
    info_.bytes = static_cast<int64_t>(file_.size());
    read_metadata();
    for (const TensorEntry& entry : table_.entries) {
      if (!entry.problem.empty()) throw Error(entry.problem, where(entry.name));
      tensors_[entry.name] = entry.tensor;
    }
    check_checksum();
    check_tokens_read();
    check_layers();
  }

  const StateFileInfo& info() const { return info_; }
  std::string_view bytes() const { return file_.text(); }

  SavedConversation conversation(const Config& config) const {
    const Tensor& recent = tensors_.at(kRecent);
    SavedConversation out;
    out.tokens = info_.tokens;
    for (int64_t i = kRecent64 - std::min(kRecent64, info_.tokens); i < kRecent64; ++i) {
      const int32_t token = element<int32_t>(recent, i);
      if (token >= config.vocab_size)
        throw Error("token outside the vocabulary", where(kRecent),
                    "0 to " + std::to_string(config.vocab_size - 1), std::to_string(token));
      out.recent.push_back(token);
    }
    out.pending = out.recent.back();
    const DecodeState state(config, 1, info_.state_dtype);
    for (int64_t layer = 0; layer < config.n_layer; ++layer) {
      const Tensor &conv = tensors_.at(name_of_conv(layer)), &ssm = tensors_.at(name_of_ssm(layer));
      KRAIT_CHECK(conv.bytes() == state.conv(layer).bytes());
      KRAIT_CHECK(ssm.bytes() == state.ssm(layer).bytes());
      std::memcpy(state.conv(layer).data, conv.data, conv.bytes());
      std::memcpy(state.ssm(layer).data, ssm.data, ssm.bytes());
    }
    out.state = state.save(0);
    return out;
  }

 private:
  std::string where(const std::string& tensor) const {
    return info_.path + ": tensor " + in_quotes(tensor);
  }

  std::string metadata(const char* key, const char* what, const char* expected) const {
    const auto it = table_.metadata.find(key);
    if (it == table_.metadata.end())
      throw Error(what, info_.path + ": __metadata__: " + key, expected, "none");
    return it->second;
  }

  void read_metadata() {
    const std::string version = metadata(kVersionKey, "not a generation state file", "a version");
    if (version != std::to_string(kVersion))
      throw Error("unknown version of generation state files",
                  info_.path + ": __metadata__: " + kVersionKey, std::to_string(kVersion),
                  in_quotes(version));
    info_.version = kVersion;
    info_.model = metadata(kModelKey, "entry missing", kDigits);
    info_.dtype = metadata(kDtypeKey, "entry missing", "an element type");
    info_.checksum = metadata(kChecksumKey, "entry missing", kDigits);
    // They are shown to people: nothing but what we write may stand there.
    for (const auto& [key, value] :
         {std::pair(kModelKey, &info_.model), {kChecksumKey, &info_.checksum}})
      if (value->size() != 16 || value->find_first_not_of("0123456789abcdef") != std::string::npos)
        throw Error("no digest", info_.path + ": __metadata__: " + key, kDigits, in_quotes(*value));
    if (info_.dtype != "f32" && info_.dtype != "bf16")
      throw Error("unknown element type", info_.path + ": __metadata__: " + kDtypeKey,
                  "f32 or bf16", in_quotes(info_.dtype));
  }

  void check_checksum() const {
    const std::string found = checksum_of(tensors_, table_.metadata);
    if (found != info_.checksum)
      throw Error("damaged file: the contents have changed",
                  info_.path + ": __metadata__: " + kChecksumKey, in_quotes(info_.checksum), found);
  }

  const Tensor& find(const std::string& name) const {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) throw Error("missing tensor", where(name));
    return it->second;
  }

  const Tensor& take(const std::string& name, DType dtype, int rank) const {
    const Tensor& t = find(name);
    if (t.dtype != dtype || t.rank != rank)
      throw Error("wrong tensor", where(name),
                  std::string(name_of(dtype)) + " of rank " + std::to_string(rank),
                  shape_string(t));
    return t;
  }

  void check_shape(const std::string& name, int64_t rows, int64_t columns) const {
    const Tensor& t = take(name, info_.state_dtype, 2);
    if (t.shape[0] != rows || t.shape[1] != columns)
      throw Error("wrong shape", where(name),
                  shape_string(Tensor(nullptr, t.dtype, {rows, columns})), shape_string(t));
    check_finite(t, where(name));
  }

  void check_tokens_read() {
    const Tensor& count = take(kTokens, DType::i64, 1);
    const Tensor& recent = take(kRecent, DType::i32, 1);
    for (const auto& [t, size] : {std::pair(&count, int64_t{1}), std::pair(&recent, kRecent64)})
      if (t->shape[0] != size)
        throw Error("wrong shape", where(t == &count ? kTokens : kRecent), std::to_string(size),
                    shape_string(*t));
    info_.tokens = element<int64_t>(count, 0);
    if (info_.tokens < 1)
      throw Error("number out of range", where(kTokens), "at least 1",
                  std::to_string(info_.tokens));
    for (int64_t i = 0; i < kRecent64; ++i) {
      const bool there = i >= kRecent64 - std::min(kRecent64, info_.tokens);
      const int32_t token = element<int32_t>(recent, i);
      if (there ? token < 0 : token != -1)
        throw Error("number out of range", where(kRecent) + ": element " + std::to_string(i),
                    there ? "a token" : "-1, before the first token", std::to_string(token));
    }
  }

  // The first layer says of what type and how large all are.
  void check_layers() {
    info_.state_dtype = find(name_of_conv(0)).dtype;
    if (info_.state_dtype != DType::f32 && info_.state_dtype != DType::bf16)
      throw Error("unknown element type of states", where(name_of_conv(0)), "f32 or bf16",
                  name_of(info_.state_dtype));
    const Tensor &conv = take(name_of_conv(0), info_.state_dtype, 2),
                 &ssm = take(name_of_ssm(0), info_.state_dtype, 2);
    for (const int64_t extent :
         {conv.shape[0] + int64_t{conv.shape[0] == 0}, ssm.shape[0], ssm.shape[1]})
      if (extent < 1 || extent > kMaxExtent)
        throw Error("size out of range", where(name_of_ssm(0)) + " and conv.0",
                    "1 to " + std::to_string(kMaxExtent), std::to_string(extent));
    info_.d_conv = conv.shape[0] + 1;
    info_.d_inner = ssm.shape[0];
    info_.d_state = ssm.shape[1];
    info_.n_layer = (static_cast<int64_t>(tensors_.size()) - 2) / 2;
    for (int64_t layer = 0; layer < info_.n_layer; ++layer) {
      check_shape(name_of_conv(layer), info_.d_conv - 1, info_.d_inner);
      check_shape(name_of_ssm(layer), info_.d_inner, info_.d_state);
    }
    if (tensors_.size() % 2 != 0)
      throw Error("unexpected tensor", info_.path,
                  "conv.N and ssm.N of each layer, " + std::string(kTokens) + ", " + kRecent,
                  std::to_string(tensors_.size()) + " tensors");
  }

  MappedFile file_;
  TensorTable table_;
  Tensors tensors_;
  StateFileInfo info_;
};

}  // namespace

StateOwner state_owner_of(const Model& model) {
  KRAIT_CHECK(model.weights.dtype == DType::f32 || model.weights.dtype == DType::bf16);
  return {model.config(), model_digest(model), model.weights.dtype};
}

void check_state_place(const fs::path& path) {
  const fs::path folder = path.has_parent_path() ? path.parent_path() : ".";
  if (fs::is_directory(path))
    throw Error("cannot write the state file", path.string(), "a file's name", "a folder");
  if (::access(folder.c_str(), W_OK | X_OK) != 0)
    throw Error(std::string("cannot write the state file: ") + std::strerror(errno), path.string());
}

void save_state_file(const fs::path& path, const SavedConversation& conversation,
                     const StateOwner& owner) {
  const std::string where = path.string();
  if (conversation.pending < 0)
    throw Error("nothing to save", where, "a state that has read at least one token", "none");
  KRAIT_CHECK(static_cast<int64_t>(conversation.recent.size()) ==
                  std::min(conversation.tokens, kRecent64) &&
              conversation.recent.back() == conversation.pending);
  DecodeState state(owner.config, 1, DecodeState::saved_dtype(conversation.state));
  state.restore(0, conversation.state);
  int64_t tokens = conversation.tokens;
  std::vector<int32_t> recent(kRecentTokens - conversation.recent.size(), -1);
  recent.insert(recent.end(), conversation.recent.begin(), conversation.recent.end());

  std::vector<NamedTensor> tensors = {{kTokens, Tensor(&tokens, DType::i64, {1})},
                                      {kRecent, Tensor(recent.data(), DType::i32, {kRecent64})}};
  for (int64_t layer = 0; layer < owner.config.n_layer; ++layer) {
    const Tensor conv = state.conv(layer), ssm = state.ssm(layer);
    tensors.push_back({name_of_conv(layer), conv.reshape({conv.shape[1], conv.shape[2]})});
    tensors.push_back({name_of_ssm(layer), ssm.reshape({ssm.shape[1], ssm.shape[2]})});
    for (const Tensor& t : {conv, ssm}) check_finite(t, where + ": layer " + std::to_string(layer));
  }
  Metadata metadata = {{kVersionKey, std::to_string(kVersion)},
                       {kModelKey, owner.digest},
                       {kDtypeKey, name_of(owner.dtype)}};
  Tensors by_name;
  for (const NamedTensor& t : tensors) by_name[t.name] = t.tensor;
  metadata[kChecksumKey] = checksum_of(by_name, metadata);
  write_safetensors(path, tensors, metadata);
}

StateFileInfo inspect_state_file(const fs::path& path) { return StateFile(path).info(); }

void check_state_owner(const StateFileInfo& info, const StateOwner& owner) {
  const auto shape = [](const auto& x) {
    return std::to_string(x.n_layer) + " layers, d_inner " + std::to_string(x.d_inner) +
           ", d_state " + std::to_string(x.d_state) + ", d_conv " + std::to_string(x.d_conv);
  };
  if (shape(info) != shape(owner.config))
    throw Error("the state belongs to a model of another shape", info.path, shape(owner.config),
                shape(info));
  if (info.model != owner.digest)
    throw Error("the state belongs to another model", info.path + ": __metadata__: " + kModelKey,
                owner.digest, in_quotes(info.model));
}

SavedConversation load_state_file(const fs::path& path, const StateOwner& owner) {
  const StateFile file(path);
  check_state_owner(file.info(), owner);
  return file.conversation(owner.config);
}

StateFileInfo copy_state_file(const fs::path& from, const fs::path& to) {
  const StateFile original(from);
  write_file_atomic(to, original.bytes());
  const StateFileInfo copy = inspect_state_file(to);
  if (copy.checksum != original.info().checksum)
    throw Error("the copy differs from the original", to.string(), original.info().checksum,
                copy.checksum);
  return copy;
}

}  // namespace krait
