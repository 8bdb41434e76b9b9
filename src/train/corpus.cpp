#include "train/corpus.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <numeric>
#include <set>
#include <string_view>

#include "core/error.h"
#include "core/mapped_file.h"
#include "core/rng.h"
#include "generate/tokenizer.h"
#include "train/digest.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kManyDocuments = 20;
constexpr uint64_t kValidationStream = 3;

struct Encoder {
  std::function<void(std::string_view, std::vector<int32_t>&)> append;  // encodes a document
  int64_t vocab_size = 256;
  std::optional<int32_t> eos_id;
  std::vector<int32_t> token_bytes;
};

Encoder make_encoder(const std::string& path) {
  Encoder encoder;
  if (path == "bytes") {
    encoder.append = [](std::string_view text, std::vector<int32_t>& tokens) {
      for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    };
    return encoder;
  }
  const Tokenizer tokenizer = Tokenizer::from_file(path);
  encoder.append = [tokenizer](std::string_view text, std::vector<int32_t>& tokens) {
    const auto ids = tokenizer.encode(text, /*parse_special=*/false, /*add_special=*/false);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    if (tokenizer.eos_id()) tokens.push_back(*tokenizer.eos_id());
  };
  encoder.vocab_size = tokenizer.size();
  encoder.eos_id = tokenizer.eos_id();
  for (int32_t id = 0; id < tokenizer.size(); ++id) {
    int32_t bytes = 0;
    try {
      if (!tokenizer.is_special(id)) bytes = static_cast<int32_t>(tokenizer.token_bytes(id).size());
    } catch (const Error&) {  // a gap in the vocabulary: encode never gives it
    }
    encoder.token_bytes.push_back(bytes);
  }
  return encoder;
}

void check_text(const MappedFile& file) {
  const std::string name = file.path().string();
  if (file.size() == 0) throw Error("the file is empty", name, "text");
  const size_t zero = file.text().find('\0');
  if (zero != std::string_view::npos) {
    throw Error("not a text file", name, "text without zero bytes",
                "a zero byte at offset " + std::to_string(zero));
  }
}

void append_document(Corpus& corpus, std::string_view text, const Encoder& encoder) {
  if (text.empty()) return;
  encoder.append(text, corpus.tokens);
  if (corpus.size() > corpus.start.back()) corpus.start.push_back(corpus.size());
}

Corpus read_corpus(const std::vector<std::string>& files, const DataSettings& settings,
                   const Encoder& encoder) {
  Corpus corpus;
  for (const std::string& name : files) {
    const MappedFile file{fs::path(name)};
    check_text(file);
    std::string_view rest = file.text();
    while (!settings.separator.empty()) {
      const size_t at = rest.find(settings.separator);
      if (at == std::string_view::npos) break;
      append_document(corpus, rest.substr(0, at), encoder);
      rest.remove_prefix(at + settings.separator.size());
    }
    append_document(corpus, rest, encoder);
  }
  return corpus;
}

void copy_tokens(const Corpus& from, int64_t begin, int64_t end, Corpus& to) {
  if (begin == end) return;
  to.tokens.insert(to.tokens.end(), from.tokens.begin() + begin, from.tokens.begin() + end);
  to.start.push_back(to.size());
}

// Which documents are for validation: drawn in random order until there are enough tokens.
std::vector<bool> draw_documents(const Corpus& all, double fraction, uint64_t seed) {
  std::vector<int64_t> order(static_cast<size_t>(all.documents()));
  std::iota(order.begin(), order.end(), 0);
  Rng rng(seed, kValidationStream);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
  std::vector<bool> chosen(order.size());
  const auto wanted = static_cast<int64_t>(fraction * static_cast<double>(all.size()));
  int64_t tokens = 0;
  for (size_t i = 0; i + 1 < order.size() && tokens < wanted; ++i) {
    const int64_t d = order[i];
    chosen[d] = true;
    tokens += all.start[d + 1] - all.start[d];
  }
  return chosen;
}

void divide(const Corpus& all, const DataSettings& settings, TrainingText& text) {
  const double fraction = settings.validation_fraction;
  const bool whole = all.documents() >= kManyDocuments;
  const std::vector<bool> chosen =
      whole ? draw_documents(all, fraction, static_cast<uint64_t>(settings.seed))
            : std::vector<bool>();
  for (int64_t d = 0; d < all.documents(); ++d) {
    const int64_t begin = all.start[d], end = all.start[d + 1];
    int64_t cut = end - static_cast<int64_t>(fraction * static_cast<double>(end - begin));
    if (whole) cut = chosen[d] ? begin : end;
    copy_tokens(all, begin, cut, text.train);
    copy_tokens(all, cut, end, text.validation);
  }
}

uint32_t digest_of(const TrainingText& text) {
  Crc32c crc;
  for (const Corpus* corpus : {&text.train, &text.validation}) {
    crc.update(corpus->tokens.data(), corpus->tokens.size() * sizeof(int32_t));
    crc.update(corpus->start.data(), corpus->start.size() * sizeof(int64_t));
  }
  return crc.value();
}

bool hidden(const fs::path& path) { return path.filename().string().rfind('.', 0) == 0; }

void list_folder(const fs::path& folder, std::vector<std::string>& files) {
  std::error_code error;
  fs::recursive_directory_iterator it(folder, error);
  for (; !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    if (hidden(it->path())) {
      if (it->is_directory()) it.disable_recursion_pending();
    } else if (it->is_regular_file() && it->file_size() > 0) {
      files.push_back(it->path().string());
    }
  }
  if (error) throw Error("cannot read the folder: " + error.message(), folder.string());
}

}  // namespace

int64_t Corpus::predictions() const {
  int64_t count = 0;
  for (int64_t d = 0; d < documents(); ++d) count += start[d + 1] - start[d] - 1;
  return count;
}

int64_t TrainingText::bytes_of(const std::vector<int32_t>& targets) const {
  int64_t bytes = 0;
  for (const int32_t id : targets) {
    if (id >= 0) bytes += token_bytes.empty() ? 1 : token_bytes[static_cast<size_t>(id)];
  }
  return bytes;
}

std::vector<std::string> list_text_files(const std::vector<std::string>& paths,
                                         const std::string& where) {
  std::vector<std::string> files;
  for (const std::string& path : paths) {
    std::error_code error;
    const auto kind = fs::status(path, error).type();
    if (kind == fs::file_type::directory) {
      std::vector<std::string> found;
      list_folder(path, found);
      if (found.empty()) throw Error("no files in the folder", where + ": " + path, "text files");
      std::sort(found.begin(), found.end());
      files.insert(files.end(), found.begin(), found.end());
    } else if (kind == fs::file_type::not_found || kind == fs::file_type::none) {
      throw Error("no such file or folder", where + ": " + path);
    } else {
      files.push_back(path);
    }
  }
  return files;
}

TrainingText load_training_text(const DataSettings& settings) {
  const Encoder encoder = make_encoder(settings.tokenizer);
  TrainingText text;
  text.vocab_size = encoder.vocab_size;
  text.token_bytes = encoder.token_bytes;
  text.eos_id = encoder.eos_id;
  text.files = list_text_files(settings.train, "data.train");
  std::set<std::string> seen;
  for (const std::string& file : text.files) {
    if (!seen.insert(fs::weakly_canonical(file).string()).second)
      throw Error("the file is given twice", "data.train: " + file);
  }
  Corpus all = read_corpus(text.files, settings, encoder);
  if (settings.validation.empty()) {
    divide(all, settings, text);
  } else {
    const std::vector<std::string> files = list_text_files(settings.validation, "data.validation");
    for (const std::string& file : files) {
      if (seen.count(fs::weakly_canonical(file).string())) {
        throw Error("the file is in data.train too", "data.validation: " + file,
                    "text that is not trained on");
      }
    }
    text.train = std::move(all);
    text.validation = read_corpus(files, settings, encoder);
    if (text.validation.predictions() == 0)
      throw Error("too little text", "data.validation", "at least two tokens");
  }
  text.digest = digest_of(text);
  return text;
}

}  // namespace krait
