#include "formats/pickle.h"

#include <gtest/gtest.h>

#include "formats/test_files.h"

namespace krait {
namespace {

using test::error_of;
using test::little_endian;

std::string text(const std::string& s) { return "X" + little_endian(s.size(), 4) + s; }
const std::string kProto = "\x80\x02";
const std::string kStorage =
    "(" + text("storage") + "ctorch\nFloatStorage\n" + text("0") + text("cpu") + "K\x06tQ";

std::string tensor(const std::string& storage, const std::string& arguments) {
  return "ctorch._utils\n_rebuild_tensor_v2\n(" + storage + arguments + "tR";
}
const std::string kShape = "K\x02K\x03\x86K\x03K\x01\x86";  // (2, 3), strides (3, 1)
const std::string kRest = "\x89}";                          // requires_grad, hooks
std::string dict_of(const std::string& name, const std::string& value) {
  return kProto + "}" + text(name) + value + "s.";
}
const std::string kZero("K\0", 2);
const std::string kGood = dict_of("w", tensor(kStorage, kZero + kShape + kRest));

std::vector<PickledEntry> read(const std::string& pickle, size_t memory = 1 << 20) {
  return read_state_dict(pickle, "m.bin: data.pkl", memory);
}
std::string error_in(const std::string& pickle) {
  return error_of([&] { read(pickle); });
}

TEST(Pickle, DescribesTensors) {
  const std::vector<PickledEntry> entries = read(kGood);
  ASSERT_EQ(entries.size(), 1u);
  EXPECT_EQ(entries[0].name, "w");
  const PickledTensor& t = entries[0].tensor;
  EXPECT_STREQ(t.type->name, "FloatStorage");
  EXPECT_EQ(t.key, "0");
  EXPECT_EQ(t.numel, 6);
  EXPECT_EQ(t.offset, 0);
  EXPECT_EQ(t.size, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(t.stride, (std::vector<int64_t>{3, 1}));
}

TEST(Pickle, KnowsTheStorageTypes) {
  for (const char* global : {"torch\nBFloat16Storage", "torch\nHalfStorage", "torch\nDoubleStorage",
                             "torch\nIntStorage", "torch\nLongStorage", "torch\nByteStorage",
                             "torch.storage\nUntypedStorage", "torch\nBoolStorage"}) {
    std::string pickle = kGood;
    pickle.replace(pickle.find("torch\nFloatStorage"), 18, global);
    EXPECT_EQ(read(pickle)[0].tensor.type->name,
              std::string(global).substr(std::string(global).find('\n') + 1));
  }
}

TEST(Pickle, IntegersOfEveryLength) {
  const std::pair<std::string, int64_t> cases[] = {
      {"J" + little_endian(0x7fffffff, 4), 0x7fffffff},
      {"M" + little_endian(65535, 2), 65535},
      {std::string("\x8a\0", 2), 0},
      {"\x8a\x01\x7f", 127},
      {"\x8a\x02" + little_endian(255, 2), 255},
      {"\x8a\x08" + little_endian(uint64_t{1} << 62, 8), int64_t{1} << 62},
      {"\x8b" + little_endian(3, 4) + little_endian(0x123456, 3), 0x123456},
  };
  for (const auto& [number, expected] : cases)
    EXPECT_EQ(read(dict_of("w", tensor(kStorage, number + kShape + kRest)))[0].tensor.offset,
              expected);
}

TEST(Pickle, OtherValuesAreListed) {
  const std::pair<std::string, const char*> cases[] = {{"N", "None"},
                                                       {"\x88", "a bool"},
                                                       {"K\x05", "a whole number"},
                                                       {"G12345678", "a float"},
                                                       {text("x"), "a string"},
                                                       {")", "a tuple"},
                                                       {"]K\x01"
                                                        "a(K\x02K\x03"
                                                        "e",
                                                        "a list"}};
  for (const auto& [value, expected] : cases)
    EXPECT_EQ(read(dict_of("w", value))[0].problem, expected);
}

TEST(Pickle, HostilePicklesAreErrors) {
  const std::string huge = "\x8a\xff" + std::string(255, '\x7f');
  const std::pair<std::string, const char*> cases[] =
      {
          {"", "pickle truncated"},
          {kProto, "pickle truncated"},
          {"\x80\x01}.", "unknown pickle protocol"},
          {"\x80\x06}.", "unknown pickle protocol; expected 2 to 5, got 6"},
          {kProto + "}..", "bytes after the end of the pickle"},
          {kProto + "}}.", "values left on the stack"},
          {kProto + "(}.", "values left on the stack"},
          {kProto + ".", "stack underflow"},
          {kProto + "K\x01.", "expected a dict, got a whole number"},
          {kProto + "].", "expected a dict, got a list"},
          // Code execution, as in every known attack: the global is refused before anything could
          // use it.
          {kProto + "cos\nsystem\n" + text("id") + "\x85R.",
           "global not allowed; expected tensors, dicts, lists, strings and numbers only, got "
           "\"os.system\""},
          {kProto + "cbuiltins\neval\n" + text("1") + "\x85R.", "\"builtins.eval\""},
          {kProto + "cposix\nsystem\n.", "\"posix.system\""},
          {kProto + text("os") + text("system") + "\x93.", "\"os.system\""},
          {kProto + "ctorch\nload\n.", "\"torch.load\""},
          {kProto + "ctorch.storage\n_load_from_bytes\n.", "global not allowed"},
          {kProto + "ctorch._utils _rebuild_tensor_v2\n\n.", "global not allowed"},
          {kProto + "ccollections\nOrderedDictX\n.", "global not allowed"},
          {kProto + "ccollections.\nOrderedDict\n.", "global not allowed"},
          {kProto + "c\n\n.", "global not allowed"},
          {kProto + "cos", "pickle truncated"},
          {kProto + "ios\nsystem\n.", "pickle opcode not allowed; got \"i\""},  // INST
          {kProto + "(ios\n", "pickle opcode not allowed"},
          {kProto + "}o.", "pickle opcode not allowed; got \"o\""},         // OBJ
          {kProto + ")\x81.", "pickle opcode not allowed; got \"\\x81\""},  // NEWOBJ
          {kProto + "\x82\x01.", "pickle opcode not allowed"},              // EXT1
          {kProto + "P0\n.", "pickle opcode not allowed"},                  // PERSID
          {kProto + "\x97.", "pickle opcode not allowed"},                  // NEXT_BUFFER
          {kProto + "I1\n.", "pickle opcode not allowed"},                  // INT as text
          {kProto + "}2.", "pickle opcode not allowed"},                    // DUP
          {kProto + "\x8f.", "pickle opcode not allowed"},                  // EMPTY_SET
          {kProto + "C\x01x.", "pickle opcode not allowed"},                // SHORT_BINBYTES
          {kProto + std::string("\0", 1), "pickle opcode not allowed; got \"\\x00\""},
          {kProto + "h\x05.", "memo entry missing; got 5"},
          {kProto + "j" + little_endian(0xffffffff, 4) + ".", "memo entry missing; got 4294967295"},
          {kProto + "}q\x02h\x01.", "memo entry missing; got 1"},
          {kProto + "}r" + little_endian(0xffffffff, 4) + ".", "memo index too large"},
          {kProto + "}q\xff.", "memo index too large"},
          {kProto + std::string("q\0", 2), "stack underflow"},
          {kProto + std::string("(q\0", 3), "stack underflow"},
          {kProto + "t.", "pickle without a mark"},
          {kProto + "u.", "pickle without a mark"},
          {kProto + "e.", "pickle without a mark"},
          {kProto + "(e.", "stack underflow"},
          {kProto + "K\x01\x86.", "stack underflow"},
          {kProto + "K\x01(K\x01\x86.", "stack underflow"},
          {kProto + "\x87.", "stack underflow"},
          {kProto + "K\x01K\x01K\x01s.", "unexpected value to add to; expected a dict"},
          {kProto + "]K\x01K\x01s.", "expected a dict, got a list"},
          {kProto + "}K\x01"
                    "a.",
           "expected a list, got a dict"},
          {kProto + "}(K\x01u.", "dict with a key without a value"},
          {kProto + "R.", "stack underflow"},
          {kProto + "K\x01)R.", "unexpected callee; expected a function, got a whole number"},
          {kProto + "}K\x01R.", "unexpected arguments; expected a tuple"},
          {kProto + "ctorch\nFloatStorage\n)R.", "unexpected callee"},
          {kProto + "ccollections\nOrderedDict\n]\x85R.", "OrderedDict with arguments"},
          {kProto + "]}b.", "expected a dict, got a list"},
          {kProto + "}K\x01"
                    "b.",
           "unexpected state"},
          {kProto + "}b.", "stack underflow"},
          {kProto + "Q.", "stack underflow"},
          {kProto + ")Q.", "wrong persistent id; expected 5 parts, got 0"},
          {kProto + text("x") + "Q.", "unexpected persistent id; expected a tuple"},
          {kProto + "X" + little_endian(0xffffffff, 4) + "abc",
           "pickle truncated; expected 4294967295 bytes, got 3"},
          {kProto + "\x8d" + little_endian(~uint64_t{0}, 8) + "abc", "pickle truncated"},
          {kProto + "\x95" + little_endian(~uint64_t{0}, 8) + "}.", "a whole frame"},
          {kProto + huge + ".", "whole number too long; expected at most 8 bytes, got 255"},
          {kProto + "\x8b" + little_endian(0x7fffffff, 4) + "1.", "whole number too long"},
          {kProto + "\x8b" + little_endian(0xffffffff, 4) + "1.", "whole number too long"},
          {dict_of("w", "}"), "\"w\" holds a dict"},
          {kProto + "}K\x01K\x01s.", "unexpected key of the dict"},
          {kProto + std::string("}q\0", 3) + text("self") + std::string("h\0s.", 4),
           "\"self\" holds a dict"},
          {dict_of("w", tensor("N", kZero + kShape + kRest)), "unexpected storage of a tensor"},
          {dict_of("w", tensor(kStorage, kZero + kShape)),
           "wrong number of arguments to _rebuild_tensor_v2"},
          {dict_of("w", tensor(kStorage, "N" + kShape + kRest)), "unexpected storage offset"},
          {dict_of("w", tensor(kStorage, "\x8a\x01\xff" + kShape + kRest)),
           "negative storage offset; got -1"},
          {dict_of("w", tensor(kStorage, kZero + "K\x02\x85K\x03K\x01\x86" + kRest)),
           "differ in length"},
          {dict_of("w", tensor(kStorage, kZero + "K\x02\x85J" + little_endian(0xffffffff, 4) +
                                             "\x85" + kRest)),
           "negative stride; got -1"},
          {dict_of("w", tensor(kStorage, kZero + "\x8a\x08" + little_endian(uint64_t{1} << 63, 8) +
                                             "\x85K\x01\x85" + kRest)),
           "negative size"},
          {dict_of("w", tensor(kStorage, kZero + "N\x85K\x01\x85" + kRest)),
           "unexpected size; expected a whole number, got None"},
          {dict_of("w", tensor(
                            kStorage,
                            kZero + "(" +
                                [] {
                                  std::string s;
                                  for (int i = 0; i < 65; ++i) s += "K\x01";
                                  return s;
                                }() +
                                "t)" + kRest)),
           "size of a tensor too long"},
          {dict_of("w", "ctorch._utils\n_rebuild_parameter\nK\x01\x88}\x87R"),
           "unexpected parameter"},
          {dict_of("w", "ctorch._utils\n_rebuild_parameter\n)R"),
           "wrong number of arguments to _rebuild_parameter"},
          {dict_of("w", "(" + text("module") + "ctorch\nFloatStorage\n" + text("0") + text("cpu") +
                            "K\x06tQ"),
           "wrong persistent id; expected \"storage\""},
          {dict_of("w", "(" + text("storage") + text("x") + text("0") + text("cpu") + "K\x06tQ"),
           "unexpected storage type"},
          {dict_of("w",
                   "(" + text("storage") + "ctorch\nFloatStorage\nK\x01" + text("cpu") + "K\x06tQ"),
           "unexpected storage key"},
          {dict_of("w", "(" + text("storage") + "ctorch\nFloatStorage\n" + text("0") + text("cpu") +
                            "\x8a\x01\xfftQ"),
           "negative storage size"},
      };
  for (const auto& [pickle, expected] : cases) {
    const std::string error = error_in(pickle);
    EXPECT_NE(error.find(expected), std::string::npos) << ::testing::PrintToString(pickle) << "\n"
                                                       << error;
    EXPECT_TRUE(error.starts_with("m.bin: data.pkl: byte ")) << error;
  }
}

TEST(Pickle, EveryTruncationIsAnError) {
  for (size_t n = 0; n < kGood.size(); ++n)
    EXPECT_NE(error_in(kGood.substr(0, n)), "(no error)") << n;
}

// Each of these builds more per byte than a file of its size may ask for.
TEST(Pickle, MemoryIsBounded) {
  std::string dicts = kProto, doubling = kProto + std::string(")q\0", 3), tuples = kProto,
              memo = kProto + "}";
  for (int i = 0; i < 200000; ++i) dicts += "}", tuples += "))\x86";
  for (int i = 0; i < 100000; ++i) doubling += std::string("h\0h\0h\0\x87q\0", 9);
  for (int i = 0; i < 100000; ++i) memo += "r" + little_endian(static_cast<uint64_t>(5 * i), 4);
  for (const std::string& pickle : {dicts, doubling, tuples, memo})
    EXPECT_NE(error_in(pickle).find("more memory than a file of this size may"), std::string::npos);
}

// A container that refers to itself, and one nested a million levels deep: nothing here recurses.
TEST(Pickle, DepthIsNoDanger) {
  std::string deep = kProto + "}" + text("w") + ")";
  for (int i = 0; i < 1000000; ++i) deep += "\x85";
  EXPECT_EQ(read(deep + "s.", size_t{1} << 30)[0].problem, "a tuple");
  const std::string self = kProto + "}" + text("w") + std::string("]q\0h\0as.", 8);
  EXPECT_EQ(read(self)[0].problem, "a list");
}

TEST(Pickle, ManySmallAppendsTakeLinearTime) {
  std::string pickle = kProto + "}" + text("w") + "]";
  for (int i = 0; i < 300000; ++i)
    pickle +=
        "(K\x01K\x01"
        "e";
  EXPECT_EQ(read(pickle + "s.", size_t{1} << 30)[0].problem, "a list");
}

TEST(Pickle, MutatedPicklesLoadOrAreErrors) {
  test::Random random{13};
  int loaded = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bad = kGood;
    bad[random() % bad.size()] = static_cast<char>(random());
    if (error_in(bad) == "(no error)") ++loaded;
  }
  EXPECT_GT(loaded, 0);
  EXPECT_LT(loaded, 20000);
}

}  // namespace
}  // namespace krait
