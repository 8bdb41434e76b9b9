#include "train/dataset.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "core/error.h"
#include "train/test_folder.h"

namespace krait {
namespace {

// Documents of distinct tokens, so a token tells where it comes from.
Corpus numbered(const std::vector<int64_t>& lengths) {
  Corpus corpus;
  for (const int64_t n : lengths) {
    for (int64_t i = 0; i < n; ++i)
      corpus.tokens.push_back(static_cast<int32_t>(corpus.tokens.size()));
    corpus.start.push_back(corpus.size());
  }
  return corpus;
}

DataSettings settings_of(const std::string& mode, int64_t seq_len, int64_t batch_size,
                         bool shuffle) {
  DataSettings s;
  s.mode = mode;
  s.seq_len = seq_len;
  s.batch_size = batch_size;
  s.shuffle = shuffle;
  return s;
}

bool same(const Batch& a, const Batch& b) {
  return a.tokens == b.tokens && a.targets == b.targets && a.seq_start == b.seq_start &&
         a.reset_state == b.reset_state;
}

TEST(Dataset, DocumentsCoverEveryPredictionOncePerEpoch) {
  const Corpus corpus = numbered({50, 1, 7, 133, 2, 64});
  for (const bool shuffle : {false, true}) {
    const DataSettings s = settings_of("documents", 16, 3, shuffle);
    BatchSource source(corpus, s);
    std::map<int32_t, int> seen;
    const int64_t predictions = corpus.predictions();
    EXPECT_EQ(predictions, 251);
    int64_t left = predictions * 3;  // three epochs, token by token across batch borders
    while (left > 0) {
      Batch batch;
      source.next(batch);
      ASSERT_EQ(batch.tokens.size(), 48u);
      ASSERT_EQ(batch.seq_start.front(), 0);
      ASSERT_EQ(batch.seq_start.back(), 48);
      for (size_t i = 0; i < batch.tokens.size() && left > 0; ++i, --left) {
        EXPECT_EQ(batch.targets[i], batch.tokens[i] + 1);
        ++seen[batch.tokens[i]];
      }
      for (int64_t i = 0; i < batch.num_seqs(); ++i) {
        const int32_t begin = batch.seq_start[i], end = batch.seq_start[i + 1];
        EXPECT_LE(end - begin, 16);
        for (int32_t t = begin + 1; t < end; ++t) EXPECT_EQ(batch.tokens[t], batch.targets[t - 1]);
      }
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), predictions);
    for (const auto& [token, count] : seen) EXPECT_EQ(count, 3) << token;
    for (int64_t d = 0; d < corpus.documents(); ++d)
      EXPECT_EQ(seen.count(corpus.start[d + 1] - 1), 0u);
  }
}

TEST(Dataset, OrderDependsOnSeedAndEpochOnly) {
  const Corpus corpus = numbered({500});
  DataSettings s = settings_of("documents", 10, 4, true);
  Batch a, b;
  BatchSource(corpus, s).next(a);
  BatchSource(corpus, s).next(b);
  EXPECT_TRUE(same(a, b));
  s.seed = 2;
  BatchSource(corpus, s).next(b);
  EXPECT_FALSE(same(a, b));
  s.shuffle = false;
  BatchSource plain(corpus, s);
  plain.next(a);
  for (int32_t i = 0; i < 40; ++i) EXPECT_EQ(a.tokens[i], i);
}

TEST(Dataset, SeekContinuesExactly) {
  const Corpus corpus = numbered({50, 7, 133, 2, 64});
  for (const char* mode : {"documents", "stream"}) {
    for (const bool shuffle : {false, true}) {
      const DataSettings s = settings_of(mode, 8, 4, shuffle);
      BatchSource straight(corpus, s);
      for (int i = 0; i < 60; ++i) {
        BatchSource resumed(corpus, s);
        resumed.seek(straight.cursor());
        Batch a, b;
        straight.next(a);
        resumed.next(b);
        ASSERT_TRUE(same(a, b)) << mode << " batch " << i;
        ASSERT_EQ(straight.cursor(), resumed.cursor());
      }
      EXPECT_GT(straight.cursor().epoch, 3);
      EXPECT_THROW(straight.seek({0, 1000, 0}), Error);
      EXPECT_THROW(straight.seek({-1, 0, 0}), Error);
      EXPECT_THROW(straight.seek({0, 0, 8}), Error);
    }
  }
}

TEST(Dataset, StreamRowsAreContiguous) {
  const Corpus corpus = numbered({100, 43, 60});
  const DataSettings s = settings_of("stream", 8, 3, true);
  BatchSource source(corpus, s);
  std::vector<int32_t> next(3, -1);
  std::set<int32_t> seen;
  const int segments = (203 - 1) / 24;
  for (int i = 0; i < 2 * segments; ++i) {
    Batch batch;
    source.next(batch);
    EXPECT_EQ(batch.reset_state, i % segments == 0);
    ASSERT_EQ(batch.num_seqs(), 3);
    for (int row = 0; row < 3; ++row) {
      const int32_t begin = batch.seq_start[row];
      if (!batch.reset_state) {
        EXPECT_EQ(batch.tokens[begin], next[row]);
      }
      for (int32_t t = begin; t < batch.seq_start[row + 1]; ++t) {
        EXPECT_EQ(batch.targets[t], batch.tokens[t] + 1);
        if (i < segments) {
          EXPECT_TRUE(seen.insert(batch.tokens[t]).second);
        }
      }
      next[row] = batch.targets[batch.seq_start[row + 1] - 1];
    }
  }
}

TEST(Dataset, ValidationGivesEachTokenOnce) {
  const Corpus corpus = numbered({50, 7, 33});
  for (const char* mode : {"documents", "stream"}) {
    ValidationSource source(corpus, settings_of(mode, 8, 2, true), 0);
    std::set<int32_t> seen;
    Batch batch;
    while (source.next(batch)) {
      EXPECT_LE(batch.tokens.size(), 16u);
      for (size_t i = 0; i < batch.tokens.size(); ++i) {
        EXPECT_TRUE(seen.insert(batch.tokens[i]).second);
        EXPECT_EQ(batch.targets[i], batch.tokens[i] + 1);
      }
    }
    // documents: all but the last token of each; stream: two rows of 44 of the 89 predictions
    EXPECT_EQ(seen.size(), std::string(mode) == "documents" ? 87u : 88u);
    ValidationSource few(corpus, settings_of(mode, 8, 2, true), 24);
    size_t tokens = 0;
    while (few.next(batch)) tokens += batch.tokens.size();
    EXPECT_GE(tokens, 16u);
    EXPECT_LE(tokens, 24u);
  }
}

TEST(Dataset, TooLittleTextIsAnError) {
  const Corpus corpus = numbered({20});
  EXPECT_EQ(message_of<Error>([&] { BatchSource(corpus, settings_of("documents", 10, 2, true)); }),
            "data.train: too little training text for one batch; expected at least batch_size x "
            "seq_len = 20 tokens with another behind them in their document, got 19 among 20 "
            "tokens in 1 document(s)");
  EXPECT_EQ(message_of<Error>([&] { BatchSource(corpus, settings_of("stream", 10, 2, true)); }),
            "data.train: too little training text for one batch; expected at least batch_size x "
            "seq_len = 20 tokens with another behind them, got 19 among 20 tokens");
  const Corpus single = numbered(std::vector<int64_t>(50, 1));
  EXPECT_NE(message_of<Error>([&] {
              BatchSource(single, settings_of("documents", 10, 2, true));
            }).find("got 0 among 50 tokens in 50 document(s)"),
            std::string::npos);
  EXPECT_NO_THROW(BatchSource(numbered({21}), settings_of("stream", 10, 2, true)));
}

TEST(Corpus, ReadsFoldersInOrderAndSplitsDocuments) {
  const TestFolder folder;
  folder.file("text/b.txt", "bb--cc----d");
  folder.file("text/a/x.txt", "aa");
  folder.file("text/.hidden/y.txt", "no");
  folder.file("text/.z", "no");
  folder.file("text/empty", "");
  DataSettings s;
  s.train = {(folder.path() / "text").string()};
  s.separator = "--";
  s.validation_fraction = 0;
  const TrainingText text = load_training_text(s);
  ASSERT_EQ(text.files.size(), 2u);
  EXPECT_EQ(text.train.start, (std::vector<int64_t>{0, 2, 4, 6, 7}));
  EXPECT_EQ(std::string(text.train.tokens.begin(), text.train.tokens.end()), "aabbccd");
  EXPECT_EQ(text.validation.size(), 0);
  EXPECT_EQ(text.vocab_size, 256);
  EXPECT_EQ(text.bytes_of({1, -1, 3}), 2);
}

TEST(Corpus, ValidationNeverOverlapsTraining) {
  const TestFolder folder;
  for (const int documents : {1, 5, 40}) {
    std::string all;
    for (int d = 0; d < documents; ++d)
      all += (d ? "|" : "") + std::string(200, static_cast<char>('0' + d));
    DataSettings s;
    s.train = {folder.file("t" + std::to_string(documents), all)};
    s.separator = "|";
    s.validation_fraction = 0.2;
    const TrainingText text = load_training_text(s);
    EXPECT_EQ(text.train.size() + text.validation.size(), documents * 200);
    EXPECT_NEAR(static_cast<double>(text.validation.size()), documents * 40.0, 1);
    if (documents == 40) {  // whole documents: no letter is in both
      const std::set<int32_t> train(text.train.tokens.begin(), text.train.tokens.end());
      for (const int32_t id : text.validation.tokens) ASSERT_EQ(train.count(id), 0u);
    }
    DataSettings other = s;
    other.seed = 7;
    EXPECT_EQ(load_training_text(s).digest, text.digest);
    EXPECT_EQ(load_training_text(other).digest == text.digest, documents < 20);
  }
}

TEST(Corpus, BadTextIsAClearError) {
  const TestFolder folder;
  const auto error_of = [&](std::vector<std::string> train,
                            std::vector<std::string> validation = {}) {
    DataSettings s;
    s.train = std::move(train);
    s.validation = std::move(validation);
    return message_of<Error>([&] { load_training_text(s); });
  };
  const std::string good = folder.file("good", "some text"), empty = folder.file("empty", ""),
                    binary = folder.file("binary", std::string("ab\0c", 4)),
                    one = folder.file("one", "x");
  std::filesystem::create_directory(folder.path() / "nothing");
  const std::string nothing = (folder.path() / "nothing").string();
  EXPECT_EQ(error_of({empty}), empty + ": the file is empty; expected text");
  EXPECT_EQ(
      error_of({binary}),
      binary + ": not a text file; expected text without zero bytes, got a zero byte at offset 2");
  EXPECT_EQ(error_of({nothing + "/x"}), "data.train: " + nothing + "/x: no such file or folder");
  EXPECT_EQ(error_of({nothing}),
            "data.train: " + nothing + ": no files in the folder; expected text files");
  EXPECT_NE(error_of({good, good}).find("given twice"), std::string::npos);
  EXPECT_NE(error_of({good}, {good}).find("in data.train too"), std::string::npos);
  EXPECT_NE(error_of({good}, {one}).find("too little text"), std::string::npos);
  EXPECT_NE(error_of({"/dev/null"}).find("not a regular file"), std::string::npos);
}

}  // namespace
}  // namespace krait
