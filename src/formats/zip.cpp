#include "formats/zip.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/checked.h"
#include "core/error.h"
#include "formats/tensor_table.h"

namespace krait {
namespace {

// Signatures and sizes of zip's structures (PKWARE's APPNOTE 6.3, sections 4.3.7 to 4.3.16).
constexpr uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50,
                   kEnd64 = 0x06064b50, kLocator64 = 0x07064b50, kDescriptor = 0x08074b50;
constexpr uint64_t kLocalSize = 30, kCentralSize = 46, kEndSize = 22, kEnd64Size = 56,
                   kLocator64Size = 20;
constexpr unsigned kHasDescriptor = 0x0008, kUtf8 = 0x0800;  // the only flags that may be set
constexpr uint64_t kFull16 = 0xffff, kFull32 = 0xffffffff;   // "see the zip64 field"

class Reader {
 public:
  Reader(std::span<const std::byte> bytes, const std::string& where)
      : bytes_(bytes), where_(where) {}

  std::vector<ZipRecord> read();

 private:
  struct Directory {
    uint64_t offset = 0, size = 0, count = 0;
  };
  // What a central entry says beyond the record itself.
  struct Entry {
    ZipRecord record;
    unsigned flags = 0;
    uint64_t packed = 0;
  };

  [[noreturn]] void fail(const std::string& what, const std::string& field,
                         const std::string& expected = {}, const std::string& got = {}) const {
    throw Error(what, where_ + ": " + field, expected, got);
  }
  std::span<const std::byte> part(uint64_t offset, uint64_t size, const char* what) const {
    if (offset > bytes_.size() || size > bytes_.size() - offset) fail("file truncated", what);
    return bytes_.subspan(offset, size);
  }
  uint64_t number(uint64_t offset, int width, const char* what) const {
    const auto p = part(offset, static_cast<uint64_t>(width), what);
    uint64_t value = 0;
    for (int i = width; i-- > 0;)
      value = value << 8 | static_cast<uint64_t>(p[static_cast<size_t>(i)]);
    return value;
  }
  std::string_view text(uint64_t offset, uint64_t size, const char* what) const {
    const auto p = part(offset, size, what);
    return {reinterpret_cast<const char*>(p.data()), p.size()};
  }

  Directory find_directory() const;
  Directory read_end64(uint64_t locator, const Directory& small) const;
  Entry read_entry(uint64_t& position, uint64_t end) const;
  void read_zip64(uint64_t extra, uint64_t size, Entry& entry) const;
  void read_local(Entry& entry, uint64_t end) const;
  void check_descriptor(const Entry& entry, uint64_t end, const std::string& field) const;

  std::span<const std::byte> bytes_;
  std::string where_;
};

Reader::Directory Reader::find_directory() const {
  const char* const what = "end of central directory";
  if (bytes_.size() < kEndSize || number(bytes_.size() - kEndSize, 4, what) != kEnd)
    fail("no zip directory at the end of the file: truncated, or not a zip archive", what);
  const uint64_t end = bytes_.size() - kEndSize;
  if (number(end + 4, 2, what) != 0 || number(end + 6, 2, what) != 0)
    fail("archive of several disks", what);
  if (number(end + 20, 2, what) != 0) fail("archive with a comment", what);
  Directory d{number(end + 16, 4, what), number(end + 12, 4, what), number(end + 10, 2, what)};
  if (number(end + 8, 2, what) != d.count) fail("archive of several disks", what);
  uint64_t directory_end = end;
  if (end >= kLocator64Size && number(end - kLocator64Size, 4, what) == kLocator64) {
    const uint64_t locator = end - kLocator64Size;
    d = read_end64(locator, d);
    directory_end = locator - kEnd64Size;
  } else if (d.offset == kFull32 || d.size == kFull32 || d.count == kFull16) {
    fail("zip64 record missing", what);
  }
  if (d.offset > directory_end || d.size != directory_end - d.offset)
    fail("central directory does not end where the end record begins", what,
         "offset + size = " + std::to_string(directory_end),
         std::to_string(d.offset) + " + " + std::to_string(d.size));
  if (d.count > d.size / kCentralSize || d.count > kMaxTensors + 64)
    fail("too many records", what, "", std::to_string(d.count));
  return d;
}

Reader::Directory Reader::read_end64(uint64_t locator, const Directory& small) const {
  const char* const what = "zip64 end of central directory";
  if (locator < kEnd64Size) fail("file truncated", what);
  const uint64_t end = locator - kEnd64Size;
  if (number(locator + 4, 4, what) != 0 || number(locator + 16, 4, what) > 1)
    fail("archive of several disks", what);
  if (number(locator + 8, 8, what) != end || number(end, 4, what) != kEnd64 ||
      number(end + 4, 8, what) != kEnd64Size - 12)
    fail("zip64 locator does not point at the zip64 record before it", what, std::to_string(end),
         std::to_string(number(locator + 8, 8, what)));
  if (number(end + 16, 4, what) != 0 || number(end + 20, 4, what) != 0)
    fail("archive of several disks", what);
  const Directory d{number(end + 48, 8, what), number(end + 40, 8, what),
                    number(end + 32, 8, what)};
  if (number(end + 24, 8, what) != d.count) fail("archive of several disks", what);
  if ((small.offset != d.offset && small.offset != kFull32) ||
      (small.size != d.size && small.size != kFull32) ||
      (small.count != d.count && small.count != kFull16))
    fail("zip64 record and end record disagree", what);
  return d;
}

Reader::Entry Reader::read_entry(uint64_t& position, uint64_t end) const {
  const char* const what = "central directory";
  if (end - position < kCentralSize || number(position, 4, what) != kCentral)
    fail("entry damaged", what, "an entry at byte " + std::to_string(position));
  const uint64_t at = position, name = number(at + 28, 2, what), extra = number(at + 30, 2, what),
                 comment = number(at + 32, 2, what);
  const uint64_t size = kCentralSize + name + extra + comment;
  if (size > end - position) fail("entry longer than the directory", what);
  position += size;
  Entry entry;
  ZipRecord& record = entry.record;
  record.name = text(at + kCentralSize, name, what);
  const std::string field = "record " + in_quotes(record.name);
  if (record.name.empty() || record.name.find('\0') != std::string_view::npos)
    fail("record without a proper name", field);
  entry.flags = static_cast<unsigned>(number(at + 8, 2, what));
  if (entry.flags & 1) fail("encrypted record", field);
  if (entry.flags & ~(kHasDescriptor | kUtf8))
    fail("unsupported zip flags", field, "", std::to_string(entry.flags));
  if (number(at + 10, 2, what) != 0)
    fail("compressed record", field, "method 0 (stored)", std::to_string(number(at + 10, 2, what)));
  record.crc = static_cast<uint32_t>(number(at + 16, 4, what));
  entry.packed = number(at + 20, 4, what);
  record.size = number(at + 24, 4, what);
  if (number(at + 34, 2, what) != 0) fail("archive of several disks", field);
  record.header = number(at + 42, 4, what);
  read_zip64(at + kCentralSize + name, extra, entry);
  if (entry.packed != record.size)
    fail("stored record with two sizes", field, std::to_string(record.size),
         std::to_string(entry.packed));
  return entry;
}

// The extra fields of an entry: 64-bit values for those of its numbers that are "full", in this
// order.
void Reader::read_zip64(uint64_t extra, uint64_t size, Entry& entry) const {
  const std::string field = "record " + in_quotes(entry.record.name) + ": extra field";
  const char* const what = "extra field";
  uint64_t* const values[] = {&entry.record.size, &entry.packed, &entry.record.header};
  bool seen = false;
  for (const uint64_t end = extra + size; extra < end;) {
    if (end - extra < 4) fail("extra field truncated", field);
    const uint64_t id = number(extra, 2, what), length = number(extra + 2, 2, what);
    if (length > end - extra - 4) fail("extra field truncated", field);
    if (id == 1) {
      if (seen) fail("two zip64 fields", field);
      seen = true;
      uint64_t position = extra + 4;
      for (uint64_t* value : values) {
        if (*value != kFull32) continue;
        if (position + 8 > extra + 4 + length) fail("zip64 field too short", field);
        *value = number(position, 8, what);
        position += 8;
      }
    }
    extra += 4 + length;
  }
  if (!seen && (*values[0] == kFull32 || *values[1] == kFull32 || *values[2] == kFull32))
    fail("zip64 field missing", field);
}

// The local header of a record whose space ends at `end`, where the next one or the directory
// begins.
void Reader::read_local(Entry& entry, uint64_t end) const {
  ZipRecord& record = entry.record;
  const std::string field = "record " + in_quotes(record.name) + ": local header";
  const char* const what = "local header";
  const uint64_t at = record.header;
  if (end > bytes_.size() || at > end || end - at < kLocalSize || number(at, 4, what) != kLocal)
    fail("no local header where the directory says", field, "", "byte " + std::to_string(at));
  const uint64_t name = number(at + 26, 2, what), extra = number(at + 28, 2, what);
  record.begin = at + kLocalSize + name + extra;
  if (record.begin > end || record.size > end - record.begin)
    fail("record reaches beyond its space", field, "at most " + std::to_string(end - at) + " bytes",
         std::to_string(record.size));
  if (text(at + kLocalSize, name, what) != record.name)
    fail("local header and central directory disagree: name", field, in_quotes(record.name),
         in_quotes(text(at + kLocalSize, name, what)));
  const uint64_t flags = number(at + 6, 2, what), method = number(at + 8, 2, what);
  if (flags != entry.flags || method != 0)
    fail("local header and central directory disagree: flags or method", field);
  const uint64_t crc = number(at + 14, 4, what), packed = number(at + 18, 4, what),
                 size = number(at + 22, 4, what);
  // With a descriptor the header may leave all three zero; a zip64 record gives its sizes in a
  // field of its own.
  const bool deferred = (flags & kHasDescriptor) && crc == 0 && packed == 0 && size == 0;
  Entry local;
  local.record.name = record.name;
  local.record.size = size;
  local.packed = packed;
  read_zip64(at + kLocalSize + name, extra, local);
  if (!deferred &&
      (crc != record.crc || local.packed != record.size || local.record.size != record.size))
    fail("local header and central directory disagree: size or CRC", field);
  if (flags & kHasDescriptor)
    check_descriptor(entry, end, field);
  else if (record.begin + record.size != end)
    fail("bytes between records", field,
         "the next at " + std::to_string(record.begin + record.size), std::to_string(end));
}

void Reader::check_descriptor(const Entry& entry, uint64_t end, const std::string& field) const {
  const ZipRecord& record = entry.record;
  const char* const what = "data descriptor";
  const uint64_t at = record.begin + record.size, left = end - at;
  if (left != 16 && left != 24) fail("bytes between records", field, "a data descriptor");
  const int width = left == 16 ? 4 : 8;
  if (number(at, 4, what) != kDescriptor || number(at + 4, 4, what) != record.crc ||
      number(at + 8, width, what) != record.size ||
      number(at + 8 + static_cast<uint64_t>(width), width, what) != record.size)
    fail("data descriptor and central directory disagree", field);
}

std::vector<ZipRecord> Reader::read() {
  const Directory directory = find_directory();
  std::vector<Entry> entries;
  entries.reserve(directory.count);
  uint64_t position = directory.offset;
  const uint64_t end = directory.offset + directory.size;
  for (uint64_t i = 0; i < directory.count; ++i) entries.push_back(read_entry(position, end));
  if (position != end) fail("bytes after the last entry", "central directory");

  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.record.header < b.record.header; });
  if ((entries.empty() ? directory.offset : entries[0].record.header) != 0)
    fail("bytes before the first record", "start of file");
  for (size_t i = 0; i < entries.size(); ++i)
    read_local(entries[i],
               i + 1 < entries.size() ? entries[i + 1].record.header : directory.offset);

  std::vector<ZipRecord> records;
  records.reserve(entries.size());
  for (const Entry& e : entries) records.push_back(e.record);
  std::sort(records.begin(), records.end(),
            [](const ZipRecord& a, const ZipRecord& b) { return a.name < b.name; });
  for (size_t i = 1; i < records.size(); ++i)
    if (records[i - 1].name == records[i].name)
      fail("record given twice", "record " + in_quotes(records[i].name));
  return records;
}

// Tables for eight bytes at a time: row k is the effect of a byte that k more bytes follow.
constexpr std::array<std::array<uint32_t, 256>, 8> make_crc_tables() {
  std::array<std::array<uint32_t, 256>, 8> t{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ (c & 1 ? 0xedb88320u : 0u);
    t[0][i] = c;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t i = 0; i < 256; ++i) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 255];
  return t;
}

constexpr auto kCrcTables = make_crc_tables();

}  // namespace

std::vector<ZipRecord> read_zip(std::span<const std::byte> bytes, const std::string& where) {
  return Reader(bytes, where).read();
}

const ZipRecord* find_record(const std::vector<ZipRecord>& records, std::string_view name) {
  const auto found =
      std::lower_bound(records.begin(), records.end(), name,
                       [](const ZipRecord& r, std::string_view n) { return r.name < n; });
  return found != records.end() && found->name == name ? &*found : nullptr;
}

uint32_t crc32(std::span<const std::byte> bytes, uint32_t crc) {
  const auto& t = kCrcTables;
  const std::byte* p = bytes.data();
  size_t n = bytes.size();
  crc = ~crc;
  for (; n >= 8; n -= 8, p += 8) {
    uint32_t a, b;
    std::memcpy(&a, p, 4);
    std::memcpy(&b, p + 4, 4);
    a ^= crc;
    crc = t[7][a & 255] ^ t[6][a >> 8 & 255] ^ t[5][a >> 16 & 255] ^ t[4][a >> 24] ^ t[3][b & 255] ^
          t[2][b >> 8 & 255] ^ t[1][b >> 16 & 255] ^ t[0][b >> 24];
  }
  for (; n > 0; --n, ++p) crc = (crc >> 8) ^ t[0][(crc ^ static_cast<uint32_t>(*p)) & 255];
  return ~crc;
}

}  // namespace krait
