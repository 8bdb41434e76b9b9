// Event files that TensorBoard reads: records of (u64 length, masked CRC-32C of the length, data,
// masked CRC-32C of the data), the data being a protobuf `Event` with scalar summaries, written by
// hand.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>

#include "train/append_file.h"

namespace krait {

class TensorBoardWriter {
 public:
  // Makes folder/events.out.tfevents.<seconds>.krait. TensorBoard joins the files of a folder, so a
  // resumed run starts another; first_step (0: a new run) tells it to forget what earlier files say
  // of that step and later ones. Throws Error.
  explicit TensorBoardWriter(const std::filesystem::path& folder, int64_t first_step = 0);

  // One event with several scalars. wall_time: seconds since 1970.
  void write(double wall_time, int64_t step,
             std::span<const std::pair<std::string, double>> scalars);

 private:
  AppendFile file_;
};

// The bytes of one record.
std::string tensorboard_record(const std::string& data);

}  // namespace krait
