#include "train/tensorboard.h"

#include <bit>
#include <chrono>

#include "train/digest.h"

namespace krait {
namespace {

template <class T>
void put(std::string& out, T value) {  // little endian
  for (size_t i = 0; i < sizeof(T); ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
}

uint32_t masked_crc(const std::string& data) {
  const uint32_t crc = crc32c(data);
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

// Protobuf wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7f) | 0x80);
  out += static_cast<char>(value);
}

void put_bytes(std::string& out, int field, const std::string& bytes) {
  put_varint(out, static_cast<uint64_t>(field) << 3 | 2);
  put_varint(out, bytes.size());
  out += bytes;
}

// Event: double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5;
// SessionLog session_log = 7.
std::string event_header(double wall_time, int64_t step) {
  std::string event = "\x09";
  put(event, std::bit_cast<uint64_t>(wall_time));
  event += '\x10';
  put_varint(event, static_cast<uint64_t>(step));
  return event;
}

std::filesystem::path new_file(const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const std::string base =
      "events.out.tfevents." +
      std::to_string(std::chrono::duration_cast<std::chrono::seconds>(now).count());
  auto path = folder / (base + ".krait");
  for (int i = 1; std::filesystem::exists(path); ++i)
    path = folder / (base + "." + std::to_string(i) + ".krait");
  return path;
}

}  // namespace

std::string tensorboard_record(const std::string& data) {
  std::string record;
  put(record, static_cast<uint64_t>(data.size()));
  put(record, masked_crc(record));
  record += data;
  put(record, masked_crc(data));
  return record;
}

TensorBoardWriter::TensorBoardWriter(const std::filesystem::path& folder, int64_t first_step)
    : file_(new_file(folder)) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  std::string event = event_header(std::chrono::duration<double>(now).count(), 0);
  put_bytes(event, 3, "brain.Event:2");
  file_.append(tensorboard_record(event));
  if (first_step > 0) {
    std::string session = event_header(std::chrono::duration<double>(now).count(), first_step);
    put_bytes(session, 7, std::string("\x08\x01", 2));  // SessionLog: status = START
    file_.append(tensorboard_record(session));
  }
}

void TensorBoardWriter::write(double wall_time, int64_t step,
                              std::span<const std::pair<std::string, double>> scalars) {
  std::string summary;
  for (const auto& [tag, number] :
       scalars) {  // Summary.Value: string tag = 1; float simple_value = 2
    std::string value;
    put_bytes(value, 1, tag);
    value += '\x15';
    put(value, std::bit_cast<uint32_t>(static_cast<float>(number)));
    put_bytes(summary, 1, value);
  }
  std::string event = event_header(wall_time, step);
  put_bytes(event, 5, summary);
  file_.append(tensorboard_record(event));
}

}  // namespace krait
