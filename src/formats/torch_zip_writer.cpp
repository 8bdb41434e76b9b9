#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "core/mapped_file.h"
#include "formats/pickle.h"
#include "formats/torch_zip.h"
#include "formats/zip.h"

namespace krait {
namespace {

constexpr size_t kAlignment = 64;  // of every record's bytes, as torch has it
constexpr uint64_t kFull16 = 0xffff, kFull32 = 0xffffffff;
constexpr unsigned kVersion = 20, kVersion64 = 45;  // of zip, needed to read the archive

std::string little_endian(uint64_t value, size_t bytes) {
  std::string out;
  for (size_t i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i));
  return out;
}

// Opcodes as in pickle.cpp; protocol 2, no memo.
std::string pickled(int64_t x) {
  const bool small = x >= INT32_MIN && x <= INT32_MAX;
  return std::string(small ? "J" : "\x8a\x08") +
         little_endian(static_cast<uint64_t>(x), small ? 4 : 8);
}
std::string pickled(const std::string& text) {
  std::string out = "X";
  out += little_endian(text.size(), 4);
  out += text;
  return out;
}
std::string pickled(std::span<const int64_t> numbers) {
  std::string out = "(";
  for (const int64_t x : numbers) out += pickled(x);
  return out + "t";
}

// The call that rebuilds the tensor from the storage with this key, as torch.save writes it.
std::string pickled(const Tensor& t, const std::string& key) {
  const auto rank = static_cast<size_t>(t.rank);
  std::array<int64_t, Tensor::kMaxRank> stride{};  // of an extent of 1 the view's may be anything
  int64_t step = 1;
  for (size_t i = rank; i-- > 0; step *= t.shape[i]) stride[i] = step;
  const std::string storage_id = std::string("(") + pickled(std::string("storage")) + "ctorch\n" +
                                 storage_type_of(t.dtype).name + "\n" + pickled(key) +
                                 pickled(std::string("cpu")) + pickled(t.size()) + "tQ";
  return "ctorch._utils\n_rebuild_tensor_v2\n(" + storage_id + pickled(int64_t{0}) +
         pickled(std::span(t.shape).first(rank)) + pickled(std::span(stride).first(rank)) +
         "\x89"
         "ccollections\nOrderedDict\n)RtR";  // requires_grad = False, no hooks
}

class Writer {
 public:
  explicit Writer(const std::filesystem::path& path) : file_(path) {}

  void add(const std::string& name, std::span<const std::byte> bytes) {
    Record r{"archive/" + name, file_.position(), bytes.size(), crc32(bytes)};
    const bool large = r.size >= kFull32;
    std::string extra;
    if (large)
      extra = little_endian(1, 2) + little_endian(16, 2) + little_endian(r.size, 8) +
              little_endian(r.size, 8);
    const uint64_t begin = r.header + 30 + r.name.size() + extra.size() + 4;
    const size_t padding = (kAlignment - begin % kAlignment) % kAlignment;
    extra += "FB" + little_endian(padding, 2) + std::string(padding, 'Z');
    file_.write(little_endian(0x04034b50, 4) + common(r, large) + little_endian(r.name.size(), 2) +
                little_endian(extra.size(), 2) + r.name + extra);
    file_.write(bytes.data(), bytes.size());
    records_.push_back(std::move(r));
  }

  void finish() {
    const uint64_t offset = file_.position();
    for (const Record& r : records_) {
      std::string extra;
      if (r.size >= kFull32) extra = little_endian(r.size, 8) + little_endian(r.size, 8);
      if (r.header >= kFull32) extra += little_endian(r.header, 8);
      if (!extra.empty()) extra = little_endian(1, 2) + little_endian(extra.size(), 2) + extra;
      // after the lengths: no comment, disk 0, no attributes (12 bytes)
      file_.write(little_endian(0x02014b50, 4) + little_endian(0, 2) + common(r, !extra.empty()) +
                  little_endian(r.name.size(), 2) + little_endian(extra.size(), 2) +
                  std::string(10, '\0') + little_endian(std::min(r.header, kFull32), 4) + r.name +
                  extra);
    }
    const uint64_t end = file_.position(), size = end - offset, count = records_.size();
    if (offset >= kFull32 || size >= kFull32 || count >= kFull16)
      file_.write(little_endian(0x06064b50, 4) + little_endian(44, 8) +
                  little_endian(kVersion64, 2) + little_endian(kVersion64, 2) +
                  little_endian(0, 8) + little_endian(count, 8) + little_endian(count, 8) +
                  little_endian(size, 8) + little_endian(offset, 8) + little_endian(0x07064b50, 4) +
                  little_endian(0, 4) + little_endian(end, 8) + little_endian(1, 4));
    const std::string short_count = little_endian(std::min(count, kFull16), 2);
    file_.write(little_endian(0x06054b50, 4) + little_endian(0, 4) + short_count + short_count +
                little_endian(std::min(size, kFull32), 4) +
                little_endian(std::min(offset, kFull32), 4) + little_endian(0, 2));
    file_.commit();
  }

 private:
  struct Record {
    std::string name;
    uint64_t header, size;
    uint32_t crc;
  };

  // What local and central headers share: version, no flags, stored, no time, CRC, both sizes.
  static std::string common(const Record& r, bool zip64) {
    const std::string size = little_endian(std::min(r.size, kFull32), 4);
    return little_endian(zip64 ? kVersion64 : kVersion, 2) + std::string(8, '\0') +
           little_endian(r.crc, 4) + size + size;
  }

  AtomicFile file_;
  std::vector<Record> records_;
};

}  // namespace

void write_torch_zip(const std::filesystem::path& path, std::span<const NamedTensor> tensors) {
  check_writable(tensors, path.string());
  std::map<std::tuple<const void*, size_t, DType>, std::string>
      keys;  // of the storages, by what they hold
  std::vector<const Tensor*> storages;
  std::string pickle =
      "\x80\x02"
      "ccollections\nOrderedDict\n)R(";
  for (const NamedTensor& t : tensors) {
    // Every empty tensor gets a storage of its own: their pointers mean nothing.
    const std::string next = std::to_string(storages.size());
    const size_t bytes = t.tensor.bytes();
    const auto [found, is_new] =
        keys.try_emplace({bytes ? t.tensor.data : &t, bytes, t.tensor.dtype}, next);
    if (is_new) storages.push_back(&t.tensor);
    pickle += pickled(t.name) + pickled(t.tensor, found->second);
  }
  pickle += "u.";
  const auto bytes_of = [](const std::string& text) { return std::as_bytes(std::span(text)); };
  Writer archive(path);
  archive.add("data.pkl", bytes_of(pickle));
  archive.add("byteorder", bytes_of("little"));
  for (size_t i = 0; i < storages.size(); ++i)
    archive.add("data/" + std::to_string(i),
                {static_cast<const std::byte*>(storages[i]->data), storages[i]->bytes()});
  archive.add("version", bytes_of("3\n"));
  archive.finish();
}

}  // namespace krait
