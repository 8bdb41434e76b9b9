// Generation state files: what a model remembers of a text, kept for later. A safetensors file of
// constant size, whatever the length of the text; its tensors, metadata and checksum are described
// in docs/formats.md. A state belongs to the weights that made it, not to the engine or the element
// types that it was computed with.
#pragma once

#include <filesystem>
#include <string>

#include "generate/generator.h"

namespace krait {

// Whom states belong to.
struct StateOwner {
  Config config;
  std::string digest;  // model_digest
  DType dtype;         // that it computes in: for information
};
StateOwner state_owner_of(const Model& model);  // reads all weights once

struct StateFileInfo {
  std::string path;
  int64_t version = 0;
  std::string model, dtype, checksum;  // the owner's digest; what it computed in; 16 hex digits
  DType state_dtype = DType::f32;      // of the states: f32 or bf16
  int64_t tokens = 0;                  // read so far
  int64_t n_layer = 0, d_inner = 0, d_state = 0, d_conv = 0;
  int64_t bytes = 0;  // of the file
};

// Throws Error where no file can be written: to be asked before the work whose result it will hold.
void check_state_place(const std::filesystem::path& path);

// Writes the file, in the state's own element type, or leaves what was there. Throws Error: no
// token read yet, a state that is not a number, a full disk.
void save_state_file(const std::filesystem::path& path, const SavedConversation& conversation,
                     const StateOwner& owner);

// Verifies all of the file but whose it is. Throws Error, which names the file and the field: not
// a state file, another version, truncated, damaged, not finite.
StateFileInfo inspect_state_file(const std::filesystem::path& path);
// Throws Error when it is another's.
void check_state_owner(const StateFileInfo& info, const StateOwner& owner);

// Both of the above, then what Generator::restore takes.
SavedConversation load_state_file(const std::filesystem::path& path, const StateOwner& owner);

// A copy, byte for byte; original and copy are verified.
StateFileInfo copy_state_file(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace krait
