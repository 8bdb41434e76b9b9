// The paper's two synthetic tasks (arXiv 2312.00752, section 4.1, E.1): sequences that are made as
// they are needed, each a function of (seed, stream, number).
//   selective copying   0 0 a 0 0 0 b 0 .. 0 p 0 | m m .. m -> a b .. p      0: noise, m: marker
//     Data tokens stand at random places among `length` noise tokens; after them come as many
//     markers, and at each marker the next data token is asked for. Which inputs matter depends on
//     what they are: that takes selection.
//   induction heads     r r S a r r r .. r S -> a      S: special, r: random
//     S stands somewhere in the first max_position, and again at the end, where the token after the
//     first S is asked for. Learned on short sequences and asked for on much longer ones.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/rng.h"
#include "train/dataset.h"

namespace krait {

enum class Task { selective_copying, induction_heads };

Task task_from_name(const std::string& name);  // "selective-copying", "induction-heads"; Error
const char* name_of(Task task);

struct TaskSettings {
  Task task = Task::induction_heads;
  int64_t vocab_size = 16;    // copying: noise 0, data, marker vocab_size - 1; induction: S aside
  int64_t length = 256;       // copying: noise tokens; induction: the whole sequence
  int64_t data_tokens = 16;   // copying
  int64_t max_position = 10;  // induction

  int64_t tokens_of(int64_t at_length) const;  // of a sequence
  int64_t answers() const;                     // asked for in a sequence, at its last tokens
  // Rows of the embedding: every token's, rounded up to a multiple of 8.
  int64_t embeddings() const;
};

// What the sequences are for: they never share random numbers.
enum class Purpose : uint64_t { training = 1, validation, confirmation, test };

// One sequence, written from its beginning in pieces of any size.
class TaskSequence {
 public:
  // stream, number: below 2^40 and 2^20.
  TaskSequence(const TaskSettings& settings, int64_t length, uint64_t seed, Purpose purpose,
               int64_t stream, int64_t number);

  void write(std::span<int32_t> tokens);  // the next ones
  const std::vector<int32_t>& answers() const { return answers_; }

 private:
  void write_copying(std::span<int32_t> tokens);
  void write_induction(std::span<int32_t> tokens);
  int32_t draw(int64_t count);  // of {0, .., count - 1}

  Task task_;
  int64_t vocab_size_, end_ = 0, position_ = 0;
  Rng rng_;
  std::vector<int64_t> places_;  // of the data tokens, ascending; of the first S
  std::vector<int32_t> answers_;
};

// `count` whole sequences; targets at the answers only.
void make_batch(const TaskSettings& settings, int64_t length, int64_t count, uint64_t seed,
                Purpose purpose, int64_t stream, Batch& batch);

}  // namespace krait
