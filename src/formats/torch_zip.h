// PyTorch's weight file (pytorch_model.bin, .pt): a zip archive of stored records. "NAME/data.pkl"
// is a pickle of a dict of tensors, "NAME/data/KEY" holds the bytes of one storage,
// "NAME/byteorder" says "little".
//
// The archive is read so that no two readers can disagree about it: the central directory decides,
// local headers and data descriptors must agree with it, and records tile the file from byte 0 to
// the directory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

#include "formats/tensor_table.h"

namespace krait {

// Tensors as views into `bytes`, which must outlive them; tied tensors share them. where: the
// file's name. Throws Error.
TensorTable read_torch_zip(std::span<const std::byte> bytes, const std::string& where);

// Writes what torch.load(weights_only=True) reads: an OrderedDict of contiguous tensors, every
// record at a multiple of 64 bytes. Tensors that are the same memory stay tied. The file is
// complete under its name or what was there stays. Throws Error.
void write_torch_zip(const std::filesystem::path& path, std::span<const NamedTensor> tensors);

}  // namespace krait
