#include "formats/torch_zip.h"

#include <algorithm>
#include <map>
#include <string_view>
#include <tuple>
#include <vector>

#include "core/checked.h"
#include "core/error.h"
#include "core/mapped_file.h"
#include "formats/pickle.h"
#include "formats/zip.h"

namespace krait {
namespace {

constexpr size_t kMaxPickle = size_t{256} << 20;
constexpr size_t kSpareMemory = size_t{64}
                                << 20;  // what the pickle may take beyond the file's size

std::string_view text_of(std::span<const std::byte> bytes, const ZipRecord& record) {
  return {reinterpret_cast<const char*>(bytes.data()) + record.begin, record.size};
}

// A small record that is read as a whole, so its checksum can be verified.
std::string_view checked_text(std::span<const std::byte> bytes, const ZipRecord& record,
                              const std::string& where) {
  if (crc32(bytes.subspan(record.begin, record.size)) != record.crc)
    throw Error("CRC mismatch: the file is damaged", where + ": record " + in_quotes(record.name));
  return text_of(bytes, record);
}

// The folder inside the archive that holds everything, with its slash. torch names it after the
// file.
std::string archive_folder(const std::vector<ZipRecord>& records, const std::string& where) {
  if (records.empty()) throw Error("empty archive", where, "NAME/data.pkl");
  const size_t slash = records[0].name.find('/');
  const std::string folder(
      records[0].name.substr(0, slash == std::string_view::npos ? 0 : slash + 1));
  for (const ZipRecord& r : records)
    if (folder.empty() || !r.name.starts_with(folder))
      throw Error("not a PyTorch archive", where + ": record " + in_quotes(r.name),
                  "all records in one folder");
  if (find_record(records, folder + "constants.pkl"))
    throw Error("a TorchScript archive, not a weight file", where);
  if (!find_record(records, folder + "data.pkl"))
    throw Error("not a PyTorch weight file", where, "a record " + in_quotes(folder + "data.pkl"));
  return folder;
}

// Fills in the entry's tensor, or says why it has none. A size that contradicts the archive is an
// Error.
void place(const PickledTensor& t, const ZipRecord& record, std::span<const std::byte> bytes,
           const std::string& where, TensorEntry& entry) {
  const uint64_t size = checked_mul(static_cast<uint64_t>(t.numel), t.type->bytes, where);
  if (record.size != size)
    throw Error("storage of the wrong size", where + ": record " + in_quotes(record.name),
                std::to_string(size) + " bytes", std::to_string(record.size));
  FileShape shape;
  for (const int64_t extent : t.size) shape.add(static_cast<uint64_t>(extent), where + ": size");
  bool contiguous = true;
  uint64_t step = 1, last = 0;  // stride of a row-major tensor; offset of the last element
  for (size_t i = t.size.size(); i-- > 0;) {
    const auto extent = static_cast<uint64_t>(t.size[i]),
               stride = static_cast<uint64_t>(t.stride[i]);
    if (extent <= 1) continue;
    if (stride != step) contiguous = false;
    step *= extent;
    if (shape.elements() > 0)
      last = checked_add(last, checked_mul(extent - 1, stride, where + ": stride"), where);
  }
  const uint64_t end = checked_add(static_cast<uint64_t>(t.offset),
                                   shape.elements() > 0 ? checked_add(last, 1, where) : 0, where);
  if (end > static_cast<uint64_t>(t.numel))
    throw Error("tensor reaches beyond its storage", where,
                "at most " + std::to_string(t.numel) + " elements", std::to_string(end));
  if (!t.type->dtype)
    entry.problem = "unsupported element type " + entry.dtype;
  else if (shape.rank() > Tensor::kMaxRank)
    entry.problem = "more than 4 dimensions";
  else if (shape.elements() > 0 && !contiguous)
    entry.problem = "tensor is not contiguous: call .contiguous() before saving it";
  else
    entry.tensor =
        shape.view(bytes.data() + record.begin + static_cast<uint64_t>(t.offset) * t.type->bytes,
                   *t.type->dtype);
}

void check_byte_order(std::span<const std::byte> bytes, const std::vector<ZipRecord>& records,
                      const std::string& folder, const std::string& where) {
  const ZipRecord* record = find_record(records, folder + "byteorder");
  if (!record) return;  // before torch 2.0; only little-endian machines wrote then
  const std::string_view order = record->size <= 16 ? checked_text(bytes, *record, where) : "?";
  if (order != "little")
    throw Error("unsupported byte order", where + ": byteorder", "little", in_quotes(order));
}

}  // namespace

TensorTable read_torch_zip(std::span<const std::byte> bytes, const std::string& where) {
  if (!bytes.empty() && bytes[0] == std::byte{0x80})
    throw Error("PyTorch's old format (a bare pickle, before torch 1.6)", where,
                "a zip archive: load it in torch and save it again");
  const std::vector<ZipRecord> records = read_zip(bytes, where);
  const std::string folder = archive_folder(records, where);
  check_byte_order(bytes, records, folder, where);
  const ZipRecord& pickle = *find_record(records, folder + "data.pkl");
  if (pickle.size > kMaxPickle)
    throw Error("pickle too large", where + ": data.pkl",
                "at most " + std::to_string(kMaxPickle) + " bytes", std::to_string(pickle.size));
  const std::vector<PickledEntry> pickled =
      read_state_dict(checked_text(bytes, pickle, where), where + ": data.pkl",
                      std::min(kMaxPickle, bytes.size()) + kSpareMemory);
  TensorTable table;
  table.entries.reserve(pickled.size());
  for (const PickledEntry& p : pickled) {
    TensorEntry& entry = table.entries.emplace_back();
    // Names may share bytes through the pickle's memo: a long one must not be copied over and over.
    if (p.name.size() > 1024)
      throw Error("tensor name too long", where + ": tensor " + in_quotes(p.name), "1024 bytes");
    entry.name = p.name;
    if (!p.problem.empty()) {
      entry.problem = "not a tensor but " + std::string(p.problem);
      continue;
    }
    const std::string at = where + ": tensor " + in_quotes(p.name);
    entry.dtype = std::string("torch.") + p.tensor.type->name;
    if (p.tensor.key.size() > 64) throw Error("storage key too long", at);
    const std::string key = folder + "data/" + std::string(p.tensor.key);
    const ZipRecord* record = find_record(records, key);
    if (!record) throw Error("storage missing from the archive", at, "a record " + in_quotes(key));
    place(p.tensor, *record, bytes, at, entry);
  }
  sorted_by_name(table.entries, where);
  return table;
}

}  // namespace krait
