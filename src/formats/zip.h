// The stored records of a zip archive, and the checksum that zip uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

struct ZipRecord {
  std::string_view name;         // in the archive's bytes
  uint64_t header = 0;           // where its local header begins
  uint64_t begin = 0, size = 0;  // its bytes in the archive
  uint32_t crc = 0;
};

// All records in the order of their names, which differ. Throws Error unless the archive is
// exactly: stored records one after another from byte 0, the central directory, the end records; no
// comment, no encryption, no second disk.
std::vector<ZipRecord> read_zip(std::span<const std::byte> bytes, const std::string& where);

// The record with this name, or null. records: as read_zip gives them.
const ZipRecord* find_record(const std::vector<ZipRecord>& records, std::string_view name);

// CRC-32 (IEEE 802.3, reflected), of `bytes` appended to what gave `crc`.
uint32_t crc32(std::span<const std::byte> bytes, uint32_t crc = 0);

}  // namespace krait
