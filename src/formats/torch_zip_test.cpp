#include "formats/torch_zip.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <vector>

#include "core/mapped_file.h"
#include "formats/test_files.h"
#include "formats/zip.h"

namespace krait {
namespace {

using test::bytes_of;
using test::error_of;
using test::little_endian;

// A record as it shall be written; what lies is set apart from what is true.
struct Record {
  std::string name, data;
  std::string local_name = name;
  uint32_t crc = crc32(bytes_of(data)), local_crc = crc;
  uint64_t size = data.size(), packed = size, local_size = size;
  unsigned flags = 0, local_flags = flags, method = 0, local_method = method, disk = 0;
  int64_t offset_lie = 0;
  std::string extra{}, local_extra{}, comment{}, descriptor{},
      gap{};  // gap: bytes after the record
};
struct Archive {
  std::vector<Record> records;
  std::string prefix, comment, before_directory, end64;
  int64_t count_lie = 0, size_lie = 0, offset_lie = 0;
  unsigned disk = 0;
};

std::string build(const Archive& a) {
  std::string out = a.prefix, directory;
  for (const Record& r : a.records) {
    const uint64_t offset = out.size() + static_cast<uint64_t>(r.offset_lie);
    out += "PK\3\4" + little_endian(20, 2) + little_endian(r.local_flags, 2) +
           little_endian(r.local_method, 2) + little_endian(0, 4) + little_endian(r.local_crc, 4) +
           little_endian(r.local_size, 4) + little_endian(r.local_size, 4) +
           little_endian(r.local_name.size(), 2) + little_endian(r.local_extra.size(), 2) +
           r.local_name + r.local_extra + r.data + r.descriptor + r.gap;
    directory += "PK\1\2" + little_endian(20, 2) + little_endian(20, 2) +
                 little_endian(r.flags, 2) + little_endian(r.method, 2) + little_endian(0, 4) +
                 little_endian(r.crc, 4) + little_endian(r.packed, 4) + little_endian(r.size, 4) +
                 little_endian(r.name.size(), 2) + little_endian(r.extra.size(), 2) +
                 little_endian(r.comment.size(), 2) + little_endian(r.disk, 2) +
                 little_endian(0, 6) + little_endian(offset, 4) + r.name + r.extra + r.comment;
  }
  out += a.before_directory;
  const uint64_t offset = out.size(), count = a.records.size() + static_cast<uint64_t>(a.count_lie);
  return out + directory + a.end64 + "PK\5\6" + little_endian(a.disk, 2) +
         little_endian(a.disk, 2) + little_endian(count, 2) + little_endian(count, 2) +
         little_endian(directory.size() + static_cast<uint64_t>(a.size_lie), 4) +
         little_endian(offset + static_cast<uint64_t>(a.offset_lie), 4) +
         little_endian(a.comment.size(), 2) + a.comment;
}

std::string text(const std::string& s) { return "X" + little_endian(s.size(), 4) + s; }

// A dict {"w": tensor} over storage "0".
std::string pickle(const std::string& numel = "K\x06",
                   const std::string& offset = std::string("K\0", 2),
                   const std::string& size = "K\x02K\x03\x86",
                   const std::string& stride = "K\x03K\x01\x86",
                   const std::string& type = "FloatStorage", const std::string& key = "0") {
  return "\x80\x02}" + text("w") + "ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") +
         "ctorch\n" + type + "\n" + text(key) + text("cpu") + numel + "tQ" + offset + size +
         stride + "\x89}tRs.";
}
std::string long_of(uint64_t x) { return "\x8a\x08" + little_endian(x, 8); }

Archive good(const std::string& data_pkl = pickle()) {
  Archive a;
  a.records = {{"m/data.pkl", data_pkl},
               {"m/byteorder", "little"},
               {"m/data/0", std::string(24, '\1')},
               {"m/version", "3\n"}};
  return a;
}
std::string error_in(const std::string& file) {
  return error_of([&] { read_torch_zip(bytes_of(file), "m.bin"); });
}
std::string error_with(const std::function<void(Archive&)>& change) {
  Archive a = good();
  change(a);
  return error_in(build(a));
}

TEST(TorchZip, ReadsViews) {
  const std::string file = build(good());
  const TensorTable table = read_torch_zip(bytes_of(file), "m.bin");
  ASSERT_EQ(table.entries.size(), 1u);
  EXPECT_EQ(shape_string(table.entries[0].tensor), "(2, 3) f32");
  EXPECT_EQ(static_cast<const char*>(table.entries[0].tensor.data) - file.data(),
            static_cast<std::ptrdiff_t>(file.find(std::string(24, '\1'))));
}

TEST(TorchZip, Crc32IsTheStandardOne) {
  EXPECT_EQ(crc32(bytes_of("123456789")), 0xcbf43926u);  // the check value of CRC catalogues
  EXPECT_EQ(crc32(bytes_of("")), 0u);
  const std::string nine = "123456789";
  for (size_t n = 0; n <= 9; ++n)
    EXPECT_EQ(crc32(bytes_of(nine.substr(n)), crc32(bytes_of(nine.substr(0, n)))), 0xcbf43926u);
}

std::string descriptor(const Record& r, size_t width) {
  return "PK\x07\x08" + little_endian(r.crc, 4) + little_endian(r.size, width) +
         little_endian(r.size, width);
}
void defer(Record& r, size_t width = 4) {
  r.flags = r.local_flags = 8;
  r.local_crc = 0;
  r.local_size = 0;
  r.descriptor = descriptor(r, width);
}
// The directory's entry says "see the zip64 field" for sizes and offset.
void make_zip64(Record& r, uint64_t size, uint64_t packed, uint64_t offset) {
  r.extra = little_endian(1, 2) + little_endian(24, 2) + little_endian(size, 8) +
            little_endian(packed, 8) + little_endian(offset, 8);
  r.size = r.packed = 0xffffffff;
}
std::string end64(uint64_t count, uint64_t size, uint64_t offset, uint64_t at,
                  uint64_t record_size = 44) {
  return "PK\6\6" + little_endian(record_size, 8) + little_endian(0, 12) + little_endian(count, 8) +
         little_endian(count, 8) + little_endian(size, 8) + little_endian(offset, 8) + "PK\6\7" +
         little_endian(0, 4) + little_endian(at, 8) + little_endian(1, 4);
}

TEST(TorchZip, AcceptsWhatTorchsWriterDoes) {
  const std::string plain = build(good());
  const uint64_t offset = plain.find("PK\1\2"), end = plain.find("PK\5\6");
  for (const size_t width : {4u, 8u})
    EXPECT_EQ(error_with([&](Archive& a) { defer(a.records[2], width); }), "(no error)");
  EXPECT_EQ(error_with([&](Archive& a) { a.end64 = end64(4, end - offset, offset, end); }),
            "(no error)");
  EXPECT_EQ(error_with([](Archive& a) {
              a.records[1].local_extra = "FB\2" + std::string(1, '\0') + "ZZ";
            }),
            "(no error)");
  EXPECT_EQ(error_with([](Archive& a) {
              make_zip64(a.records[0], a.records[0].data.size(), a.records[0].data.size(), 0);
              a.records[0].offset_lie = 0xffffffff;
            }),
            "(no error)");
  EXPECT_EQ(error_with([](Archive& a) { a.records.erase(a.records.begin() + 1); }), "(no error)");
}

TEST(TorchZip, HostileArchivesAreErrors) {
  const std::string plain = build(good());
  const uint64_t offset = plain.find("PK\1\2"), end = plain.find("PK\5\6"), size = end - offset;
  using Change = std::function<void(Archive&)>;
  const std::pair<Change, const char*> cases[] = {
      {[](Archive& a) { a.records.clear(); }, "empty archive"},
      {[](Archive& a) { a.prefix = "MZ"; }, "bytes before the first record"},
      {[](Archive& a) { a.comment = "x"; }, "no zip directory at the end"},
      {[](Archive& a) { a.comment = std::string("PK\5\6") + std::string(18, '\0'); },
       "does not end where"},
      {[](Archive& a) { a.before_directory = "x"; }, "bytes between records"},
      {[](Archive& a) { a.records[1].gap = "x"; }, "bytes between records"},
      {[](Archive& a) { a.disk = 1; }, "several disks"},
      {[](Archive& a) { a.records[0].disk = 1; }, "several disks"},
      {[](Archive& a) { a.count_lie = 1; }, "too many records; got 5"},
      {[](Archive& a) { a.count_lie = -1; }, "bytes after the last entry"},
      {[](Archive& a) { a.count_lie = 1000; }, "too many records"},
      {[](Archive& a) { a.size_lie = 1; }, "does not end where"},
      {[](Archive& a) { a.offset_lie = -1; }, "does not end where"},
      {[](Archive& a) { a.offset_lie = 1 << 30; }, "does not end where"},
      {[](Archive& a) { a.offset_lie = 1, a.size_lie = -1; }, "entry damaged"},
      {[](Archive& a) { a.records[1].flags = a.records[1].local_flags = 1; }, "encrypted record"},
      {[](Archive& a) { a.records[1].local_flags = 1; }, "disagree: flags"},
      {[](Archive& a) { a.records[1].flags = a.records[1].local_flags = 0x40; },
       "unsupported zip flags"},
      {[](Archive& a) { a.records[1].flags = a.records[1].local_flags = 0x2000; },
       "unsupported zip flags"},
      {[](Archive& a) { a.records[2].method = 8; },
       "compressed record; expected method 0 (stored), got 8"},
      {[](Archive& a) { a.records[2].local_method = 8; }, "disagree: flags or method"},
      {[](Archive& a) { a.records[0].local_name = "m/data.pk_"; }, "disagree: name"},
      {[](Archive& a) { a.records[0].local_name = "m/data.pklx"; },
       "record reaches beyond|disagree: name|bytes between"},
      {[](Archive& a) { a.records[2].local_size = 23; }, "disagree: size or CRC"},
      {[](Archive& a) { a.records[2].local_crc ^= 1; }, "disagree: size or CRC"},
      {[](Archive& a) { a.records[2].local_size = 0, a.records[2].local_crc = 0; },
       "disagree: size or CRC"},
      {[](Archive& a) { a.records[2].size = a.records[2].packed = 25; },
       "record reaches beyond its space"},
      {[](Archive& a) { a.records[2].size = a.records[2].packed = 23; }, "disagree: size or CRC"},
      {[](Archive& a) { a.records[2].packed = 23; }, "stored record with two sizes"},
      {[](Archive& a) { a.records[3].size = a.records[3].packed = 0xfffffffe; },
       "record reaches beyond its space"},
      {[](Archive& a) { a.records[0].crc ^= 1, a.records[0].local_crc ^= 1; },
       "data.pkl\": CRC mismatch"},
      {[](Archive& a) { a.records[1].crc ^= 1, a.records[1].local_crc ^= 1; },
       "byteorder\": CRC mismatch"},
      {[](Archive& a) { a.records[1].offset_lie = 1; }, "no local header|bytes between"},
      {[](Archive& a) { a.records[0].offset_lie = 1; }, "bytes before the first record"},
      {[](Archive& a) { a.records[3].offset_lie = 1 << 30; }, "no local header|reaches beyond"},
      {[](Archive& a) { a.records[1] = a.records[0]; }, "record given twice"},
      {[](Archive& a) {
         a.records.push_back({"m/data/0", "x"});
       },
       "record given twice"},
      {[](Archive& a) { a.records[1].name = a.records[1].local_name = std::string("m/by\0", 5); },
       "without a proper name"},
      {[](Archive& a) { a.records[1].name = a.records[1].local_name = ""; },
       "without a proper name"},
      {[](Archive& a) { a.records[1].extra = "x"; }, "extra field truncated"},
      {[](Archive& a) { a.records[1].extra = little_endian(7, 2) + little_endian(9, 2); },
       "extra field truncated"},
      {[](Archive& a) { a.records[1].size = 0xffffffff; }, "zip64 field missing"},
      {[](Archive& a) { a.records[1].local_size = 0xffffffff; }, "zip64 field missing"},
      {[](Archive& a) { make_zip64(a.records[2], ~uint64_t{0}, ~uint64_t{0}, 0); },
       "reaches beyond|disagree"},
      {[](Archive& a) { make_zip64(a.records[2], 24, 25, 0); }, "two sizes"},
      {[](Archive& a) {
         make_zip64(a.records[2], 24, 24, 0), a.records[2].extra.resize(12),
             a.records[2].extra[2] = 8;
       },
       "zip64 field too short"},
      {[](Archive& a) {
         make_zip64(a.records[2], 24, 24, 0), a.records[2].extra += a.records[2].extra;
       },
       "two zip64 fields"},
      {[](Archive& a) {
         make_zip64(a.records[0], a.records[0].data.size(), a.records[0].data.size(),
                    uint64_t{1} << 61),
             a.records[0].offset_lie = 0xffffffff;
       },
       "bytes before the first record"},
      {[](Archive& a) {
         a.records[2].local_extra = little_endian(1, 2) + little_endian(16, 2) +
                                    little_endian(99, 8) + little_endian(99, 8),
         a.records[2].local_size = 0xffffffff;
       },
       "disagree: size or CRC"},
      {[](Archive& a) { defer(a.records[2]), a.records[2].descriptor = ""; },
       "expected a data descriptor"},
      {[](Archive& a) { defer(a.records[2]), a.records[2].descriptor[4] ^= 1; },
       "data descriptor and central directory disagree"},
      {[](Archive& a) { defer(a.records[2]), a.records[2].descriptor[8] ^= 1; },
       "data descriptor and central directory disagree"},
      {[](Archive& a) { defer(a.records[2]), a.records[2].descriptor[0] = 'X'; },
       "data descriptor and central directory disagree"},
      {[&](Archive& a) { a.end64 = end64(5, size, offset, end); },
       "zip64 record and end record disagree"},
      {[&](Archive& a) { a.end64 = end64(4, size, offset, end - 1); },
       "zip64 locator does not point"},
      {[&](Archive& a) { a.end64 = end64(4, size, offset, ~uint64_t{0}); },
       "zip64 locator does not point"},
      {[&](Archive& a) { a.end64 = end64(4, size, offset, end, 45); },
       "zip64 locator does not point"},
      {[&](Archive& a) {
         a.end64 = end64(4, ~uint64_t{0}, offset, end),
         a.size_lie = 0xffffffff - static_cast<int64_t>(size);
       },
       "does not end where"},
      {[&](Archive& a) {
         a.end64 = end64(uint64_t{1} << 61, size, offset, end), a.count_lie = 0xffff - 4;
       },
       "too many records"},
      {[](Archive& a) { a.count_lie = 0xffff - 4; }, "zip64 record missing"},
      {[](Archive& a) {
         a.records[1].data = a.records[1].data = "big";
         a.records[1] = {"m/byteorder", "big"};
       },
       "byteorder: unsupported byte order; expected little, got \"big\""},
      {[](Archive& a) {
         a.records[1] = {"m/byteorder", std::string(99, 'x')};
       },
       "unsupported byte order"},
      {[](Archive& a) {
         a.records[1] = {"n/byteorder", "little"};
       },
       "all records in one folder"},
      {[](Archive& a) {
         a.records = {{"data.pkl", pickle()}};
       },
       "not a PyTorch archive"},
      {[](Archive& a) {
         a.records[0] = {"m/model.json", "{}"};
       },
       "expected a record \"m/data.pkl\""},
      {[](Archive& a) {
         a.records.push_back({"m/constants.pkl", "x"});
       },
       "TorchScript"},
      {[](Archive& a) {
         a.records[0] = {"m/data.pkl", "cos\nsystem\n."};
       },
       "data.pkl: byte 0: global not allowed"},
      {[](Archive& a) { a.records.erase(a.records.begin() + 2); },
       "storage missing from the archive; expected a record \"m/data/0\""},
      {[](Archive& a) {
         a.records[2] = {"m/data/0", std::string(23, '\1')};
       },
       "storage of the wrong size; expected 24 bytes, got 23"},
  };
  EXPECT_GE(std::size(cases), 60u);
  size_t number = 0;
  for (const auto& [change, expected] : cases) {
    const std::string error = error_with(change);
    bool found = false;  // of the alternatives
    for (std::string rest = expected; !rest.empty() && !found;) {
      const size_t bar = rest.find('|');
      found = error.find(rest.substr(0, bar)) != std::string::npos;
      rest = bar == std::string::npos ? "" : rest.substr(bar + 1);
    }
    EXPECT_TRUE(found) << "case " << number << ": " << expected << "\n" << error;
    EXPECT_TRUE(error.starts_with("m.bin")) << error;
    ++number;
  }
}

TEST(TorchZip, HostileTensorsAreErrors) {
  const uint64_t big = uint64_t{1} << 62;
  const std::pair<std::string, const char*> cases[] = {
      {pickle("K\x07"), "storage of the wrong size"},
      {pickle(long_of(big)), "number too large"},
      {pickle(long_of(big / 2 + 6)), "storage of the wrong size"},
      {pickle("K\x06", "K\x01"),
       "tensor reaches beyond its storage; expected at most 6 elements, got 7"},
      {pickle("K\x06", long_of(~uint64_t{0} >> 1)), "tensor reaches beyond its storage"},
      {pickle("K\x06", "K\x07", std::string("K\0K\x03\x86", 5)),
       "tensor reaches beyond its storage"},
      {pickle("K\x06", std::string("K\0", 2), "K\x03K\x03\x86"),
       "tensor reaches beyond its storage"},
      {pickle("K\x06", std::string("K\0", 2), long_of(big) + "K\x04\x86"), "number too large"},
      {pickle("K\x06", std::string("K\0", 2),
              long_of(big) + long_of(big) + std::string("K\0\x87", 3), "K\x01K\x01K\x01\x87"),
       "number too large"},
      {pickle("K\x06", std::string("K\0", 2), "K\x02K\x03\x86", long_of(big) + "K\x01\x86"),
       "tensor reaches beyond its storage"},
      {pickle("K\x06", std::string("K\0", 2), "K\x03K\x03\x86",
              long_of(big) + long_of(big) + "\x86"),
       "tensor reaches beyond its storage|number too large"},
      {pickle("K\x06", std::string("K\0", 2), "K\x02K\x03\x86", "K\x03K\x01\x86", "DoubleStorage"),
       "storage of the wrong size; expected 48 bytes, got 24"},
      {pickle("K\x06", std::string("K\0", 2), "K\x02K\x03\x86", "K\x03K\x01\x86", "FloatStorage",
              "../0"),
       "storage missing"},
      {pickle("K\x06", std::string("K\0", 2), "K\x02K\x03\x86", "K\x03K\x01\x86", "FloatStorage",
              std::string(65, '0')),
       "storage key too long"},
  };
  for (const auto& [data_pkl, expected] : cases) {
    const std::string error = error_in(build(good(data_pkl)));
    const std::string wanted = expected;
    const size_t bar = wanted.find('|');
    EXPECT_TRUE(
        error.find(wanted.substr(0, bar)) != std::string::npos ||
        (bar != std::string::npos && error.find(wanted.substr(bar + 1)) != std::string::npos))
        << expected << "\n"
        << error;
  }
  const auto problem_of = [](const std::string& data_pkl) {
    const std::string file = build(good(data_pkl));
    return read_torch_zip(bytes_of(file), "m.bin").entries.at(0).problem;
  };
  EXPECT_EQ(problem_of(pickle("K\x06", std::string("K\0", 2), "K\x03K\x02\x86", "K\x01K\x03\x86")),
            "tensor is not contiguous: call .contiguous() before saving it");
  EXPECT_EQ(problem_of(pickle("K\x06", std::string("K\0", 2), "K\x03K\x02\x86",
                              std::string("K\0K\0\x86", 5))),
            "tensor is not contiguous: call .contiguous() before saving it");
  EXPECT_EQ(problem_of(pickle("K\x18", std::string("K\0", 2), "K\x02K\x03\x86", "K\x03K\x01\x86",
                              "BoolStorage")),
            "unsupported element type torch.BoolStorage");
  EXPECT_EQ(problem_of(pickle("K\x06", std::string("K\0", 2), "K\x01K\x06\x86", "K\x09K\x01\x86")),
            "");  // stride of 1 extent
}

TEST(TorchZip, NamesGivenTwiceAreErrors) {
  std::string twice = pickle();
  twice.insert(twice.size() - 1, twice.substr(3, twice.size() - 4));
  EXPECT_NE(error_in(build(good(twice))).find("tensor \"w\": tensor given twice"),
            std::string::npos);
}

TEST(TorchZip, OtherFilesAreNamedAsSuch) {
  EXPECT_NE(error_in("\x80\x02" + std::string(100, 'x')).find("old format"), std::string::npos);
  EXPECT_NE(error_in("").find("not a zip archive"), std::string::npos);
  EXPECT_NE(error_in(std::string(100, 'x')).find("not a zip archive"), std::string::npos);
}

TEST(TorchZip, EveryTruncationIsAnError) {
  const std::string file = build(good());
  for (size_t n = 0; n < file.size(); ++n)
    EXPECT_NE(error_in(file.substr(0, n)), "(no error)") << n;
}

TEST(TorchZip, MutatedFilesLoadOrAreErrors) {
  Archive a = good();
  defer(a.records[2], 8);
  const std::string file = build(a);
  ASSERT_EQ(error_in(file), "(no error)");
  test::Random random{17};
  int loaded = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bad = file;
    bad[random() % bad.size()] = static_cast<char>(random());
    if (error_in(bad) == "(no error)") ++loaded;
  }
  EXPECT_GT(loaded, 0);
  EXPECT_LT(loaded, 20000);
}

TEST(TorchZip, WritesWhatItReads) {
  test::TemporaryFolder folder;
  test::Random random{7};
  std::vector<uint64_t> memory(64);
  for (uint64_t& x : memory) x = random();
  constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64,
                              DType::i32, DType::i64,  DType::u8};
  for (int round = 0; round < 20; ++round) {
    std::vector<NamedTensor> tensors;
    for (int i = 0; i < round; ++i)
      tensors.push_back(
          {"t." + std::to_string(i), Tensor(memory.data() + random() % 8, kTypes[random() % 7],
                                            {static_cast<int64_t>(random() % 5),
                                             static_cast<int64_t>(1 + random() % 4), 1})});
    const auto path = folder.path / "x.bin";
    write_torch_zip(path, tensors);
    const MappedFile file(path);
    const TensorTable table = read_torch_zip({file.data(), file.size()}, "x");
    ASSERT_EQ(table.entries.size(), tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = tensors[i].tensor;
      const Tensor& found = table.entries[i].tensor;
      EXPECT_EQ(table.entries[i].name, tensors[i].name);
      ASSERT_EQ(shape_string(found), shape_string(t));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(found.data) % 64, 0u);
      EXPECT_EQ(std::memcmp(found.data, t.data, t.bytes()), 0);
    }
  }
}

TEST(TorchZip, TiedTensorsAreWrittenOnce) {
  test::TemporaryFolder folder;
  float x[4] = {1, 2, 3, 4};
  const NamedTensor tensors[] = {{"a", Tensor(x, DType::f32, {4})},
                                 {"b", Tensor(x, DType::f32, {2, 2})},
                                 {"c", Tensor(x, DType::f32, {2})}};
  write_torch_zip(folder.path / "x.bin", tensors);
  const MappedFile file(folder.path / "x.bin");
  const TensorTable table = read_torch_zip({file.data(), file.size()}, "x");
  EXPECT_EQ(table.entries[0].tensor.data, table.entries[1].tensor.data);
  EXPECT_NE(table.entries[0].tensor.data, table.entries[2].tensor.data);
  EXPECT_EQ(shape_string(table.entries[1].tensor), "(2, 2) f32");
}

// More than 65534 records: the end record overflows into its zip64 form.
TEST(TorchZip, ManyTensorsNeedZip64) {
  test::TemporaryFolder folder;
  std::vector<NamedTensor> tensors;
  for (int i = 0; i < 66000; ++i)
    tensors.push_back({std::to_string(i), Tensor(nullptr, DType::f32, {0})});
  write_torch_zip(folder.path / "x.bin", tensors);
  const MappedFile file(folder.path / "x.bin");
  EXPECT_EQ(read_torch_zip({file.data(), file.size()}, "x").entries.size(), 66000u);
}

}  // namespace
}  // namespace krait
