#include "formats/pickle.h"

#include <array>
#include <bit>
#include <utility>

#include "core/error.h"
#include "formats/tensor_table.h"

namespace krait {
namespace {

constexpr size_t kMaxRank = 64;

constexpr StorageType kStorageTypes[] = {
    {"FloatStorage", 4, DType::f32},  {"BFloat16Storage", 2, DType::bf16},
    {"HalfStorage", 2, DType::f16},   {"DoubleStorage", 8, DType::f64},
    {"IntStorage", 4, DType::i32},    {"LongStorage", 8, DType::i64},
    {"ByteStorage", 1, DType::u8},    {"UntypedStorage", 1, DType::u8},
    {"BoolStorage", 1, {}},           {"CharStorage", 1, {}},
    {"ShortStorage", 2, {}},          {"ComplexFloatStorage", 8, {}},
    {"ComplexDoubleStorage", 16, {}},
};

enum class Kind : uint8_t {
  mark,
  none,
  boolean,
  integer,
  real,
  string,
  tuple,
  list,
  dict,
  storage_type,  // a global: which row of kStorageTypes
  function,      // a global: which Function
  storage,       // what a persistent id stands for; payload: the node of that id, a checked tuple
  tensor,
};

enum class Function : uint64_t { rebuild_tensor, rebuild_parameter, ordered_dict };

struct Value {
  Kind kind = Kind::none;
  uint32_t length = 0;   // of a string
  uint64_t payload = 0;  // number, position of a string in the pickle, index of a node or tensor
};

const char* kind_name(Kind kind) {
  constexpr const char* kNames[] = {
      "a mark", "None",   "a bool",         "a whole number", "a float",   "a string", "a tuple",
      "a list", "a dict", "a storage type", "a function",     "a storage", "a tensor"};
  return kNames[static_cast<size_t>(kind)];
}

std::optional<Value> find_global(std::string_view module, std::string_view name) {
  constexpr std::pair<std::string_view, Function> kFunctions[] = {
      {"torch._utils _rebuild_tensor_v2", Function::rebuild_tensor},
      {"torch._utils _rebuild_parameter", Function::rebuild_parameter},
      {"collections OrderedDict", Function::ordered_dict},
  };
  for (const auto& [full, function] : kFunctions)
    if (full.size() == module.size() + 1 + name.size() && full.starts_with(module) &&
        full[module.size()] == ' ' && full.ends_with(name))
      return Value{Kind::function, 0, static_cast<uint64_t>(function)};
  if (module == "torch" || module == "torch.storage")
    for (size_t i = 0; i < std::size(kStorageTypes); ++i)
      if (name == kStorageTypes[i].name) return Value{Kind::storage_type, 0, i};
  return std::nullopt;
}

class Machine {
 public:
  Machine(std::string_view pickle, const std::string& where, size_t memory)
      : pickle_(pickle), where_(where), memory_(memory) {}

  std::vector<PickledEntry> run() {
    while (step()) {
    }
    if (position_ != pickle_.size())
      fail("bytes after the end of the pickle", "", std::to_string(pickle_.size() - position_));
    const Value root = pop(Kind::dict, "result, not a dict of tensors");
    if (!stack_.empty())
      fail("values left on the stack", "one dict", std::to_string(stack_.size() + 1));
    return members(nodes_[root.payload]);
  }

 private:
  using Node = std::vector<Value>;  // a tuple's or list's values; a dict's keys and values by turns

  [[noreturn]] void fail(const std::string& what, const std::string& expected = {},
                         const std::string& got = {}) const {
    throw Error(what, where_ + ": byte " + std::to_string(start_), expected, got);
  }

  // Every allocation is announced first, at an upper bound of what it takes with the containers'
  // spare room.
  void charge(size_t bytes) {
    if (bytes > memory_) fail("the pickle asks for more memory than a file of this size may");
    memory_ -= bytes;
  }

  std::string_view take(uint64_t bytes) {
    if (bytes > pickle_.size() - position_)
      fail("pickle truncated", std::to_string(bytes) + " bytes",
           std::to_string(pickle_.size() - position_));
    const std::string_view part = pickle_.substr(position_, bytes);
    position_ += bytes;
    return part;
  }

  uint64_t take_unsigned(size_t bytes) {
    uint64_t value = 0;
    const std::string_view part = take(bytes);
    for (size_t i = bytes; i-- > 0;) value = value << 8 | static_cast<unsigned char>(part[i]);
    return value;
  }

  std::string_view take_line() {
    const size_t end = pickle_.find('\n', position_);
    if (end == std::string_view::npos) fail("pickle truncated", "a line");
    const std::string_view line = take(end - position_);
    ++position_;
    return line;
  }

  void push(Value value) {
    if (stack_.size() == stack_.capacity()) charge((stack_.size() + 16) * 2 * sizeof(Value));
    stack_.push_back(value);
  }
  void push_integer(int64_t x) { push({Kind::integer, 0, static_cast<uint64_t>(x)}); }
  void push_node(Kind kind, Node node) {
    charge(sizeof(Node) * 2 + 32);
    push({kind, 0, nodes_.size()});
    nodes_.push_back(std::move(node));
  }
  void push_string(uint64_t length) {
    const std::string_view text = take(length);
    if (length > UINT32_MAX) fail("string too long");
    push({Kind::string, static_cast<uint32_t>(length), position_ - text.size()});
  }
  void push_long(uint64_t bytes) {
    if (bytes > 8) fail("whole number too long", "at most 8 bytes", std::to_string(bytes));
    uint64_t value = take_unsigned(bytes);
    if (bytes > 0 && bytes < 8 && value >> (8 * bytes - 1)) value -= uint64_t{1} << (8 * bytes);
    push({Kind::integer, 0, value});
  }

  Value pop() {
    if (stack_.empty() || stack_.back().kind == Kind::mark) fail("pickle stack underflow");
    const Value top = stack_.back();
    stack_.pop_back();
    return top;
  }
  Value pop(Kind kind, const char* what) {
    const Value top = pop();
    require(top, kind, what);
    return top;
  }
  Node pop_to_mark() {
    size_t first = stack_.size();
    while (first > 0 && stack_[first - 1].kind != Kind::mark) --first;
    if (first == 0) fail("pickle without a mark");
    return pop_last(stack_.size() - first, true);
  }
  Node pop_last(size_t count, bool and_mark = false) {
    for (size_t i = 0; i < count; ++i)
      if (i >= stack_.size() || stack_[stack_.size() - 1 - i].kind == Kind::mark)
        fail("pickle stack underflow");
    charge(count * sizeof(Value));
    Node node(stack_.end() - static_cast<std::ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count - (and_mark ? 1 : 0));
    return node;
  }
  void require(const Value& value, Kind kind, const char* what) const {
    if (value.kind != kind)
      fail(std::string("unexpected ") + what, kind_name(kind), kind_name(value.kind));
  }
  Node& top_node(Kind kind) {
    if (stack_.empty()) fail("pickle stack underflow");
    require(stack_.back(), kind, "value to add to");
    return nodes_[stack_.back().payload];
  }

  bool step();
  bool step_literal(unsigned char op);
  bool step_container(unsigned char op);
  bool step_memo(unsigned char op);
  void append(Node& node, const Node& values);
  void remember(uint64_t index);
  void recall(uint64_t index);
  void push_global(std::string_view module, std::string_view name);
  void call();
  void build();
  void make_storage();
  void make_tensor(const Node& arguments);
  std::vector<int64_t> extents(const Value& tuple, const char* what);
  std::vector<PickledEntry> members(const Node& dict);

  std::string_view text_of(const Value& v) const { return pickle_.substr(v.payload, v.length); }
  int64_t number_of(const Value& v, const char* what) const {
    require(v, Kind::integer, what);
    return static_cast<int64_t>(v.payload);
  }

  std::string_view pickle_;
  std::string where_;
  size_t memory_;                    // what may still be taken from the heap
  size_t position_ = 0, start_ = 0;  // of what is read next; of the opcode at hand
  std::vector<Value> stack_, memo_;
  std::vector<Node> nodes_;
  std::optional<Value> empty_tuple_;
  std::vector<PickledTensor> tensors_;
};

// One opcode; false after the last. Names and codes: pickletools of the Python library.
bool Machine::step() {
  start_ = position_;
  const auto op = static_cast<unsigned char>(take(1)[0]);
  if (step_literal(op) || step_container(op) || step_memo(op)) return true;
  switch (op) {
    case 0x80:  // PROTO
      if (const uint64_t version = take_unsigned(1); version < 2 || version > 5)
        fail("unknown pickle protocol", "2 to 5", std::to_string(version));
      return true;
    case 0x95:  // FRAME
      if (take_unsigned(8) > pickle_.size() - position_) fail("pickle truncated", "a whole frame");
      return true;
    case 'c': {  // GLOBAL
      const std::string_view module = take_line();
      push_global(module, take_line());
      return true;
    }
    case 0x93: {  // STACK_GLOBAL
      const Value name = pop(Kind::string, "name"), module = pop(Kind::string, "module");
      push_global(text_of(module), text_of(name));
      return true;
    }
    case 'Q':  // BINPERSID
      make_storage();
      return true;
    case 'R':  // REDUCE
      call();
      return true;
    case 'b':  // BUILD
      build();
      return true;
    case '.':  // STOP
      return false;
    default:
      fail("pickle opcode not allowed", "", in_quotes(pickle_.substr(start_, 1)));
  }
}

bool Machine::step_literal(unsigned char op) {
  switch (op) {
    case 'N':  // NONE
      push({Kind::none, 0, 0});
      return true;
    case 0x88:  // NEWTRUE, NEWFALSE
    case 0x89:
      push({Kind::boolean, 0, op == 0x88 ? 1u : 0u});
      return true;
    case 'J':  // BININT
      push_integer(static_cast<int32_t>(take_unsigned(4)));
      return true;
    case 'K':  // BININT1
      push_integer(static_cast<int64_t>(take_unsigned(1)));
      return true;
    case 'M':  // BININT2
      push_integer(static_cast<int64_t>(take_unsigned(2)));
      return true;
    case 0x8a:  // LONG1
      push_long(take_unsigned(1));
      return true;
    case 0x8b:  // LONG4
      push_long(take_unsigned(4));
      return true;
    case 'G':  // BINFLOAT
      take(8);
      push({Kind::real, 0, 0});
      return true;
    case 0x8c:  // SHORT_BINUNICODE
      push_string(take_unsigned(1));
      return true;
    case 'X':  // BINUNICODE
      push_string(take_unsigned(4));
      return true;
    case 0x8d:  // BINUNICODE8
      push_string(take_unsigned(8));
      return true;
    default:
      return false;
  }
}

bool Machine::step_container(unsigned char op) {
  switch (op) {
    case '(':  // MARK
      push({Kind::mark, 0, 0});
      return true;
    case ')':  // EMPTY_TUPLE: one for all, since tuples do not change
      if (!empty_tuple_) {
        push_node(Kind::tuple, {});
        empty_tuple_ = stack_.back();
      } else {
        push(*empty_tuple_);
      }
      return true;
    case 't':  // TUPLE
      push_node(Kind::tuple, pop_to_mark());
      return true;
    case 0x85:  // TUPLE1, TUPLE2, TUPLE3
    case 0x86:
    case 0x87:
      push_node(Kind::tuple, pop_last(op - 0x84u));
      return true;
    case '}':  // EMPTY_DICT
      push_node(Kind::dict, {});
      return true;
    case ']':  // EMPTY_LIST
      push_node(Kind::list, {});
      return true;
    case 'a':    // APPEND
    case 'e': {  // APPENDS
      const Node values = op == 'a' ? pop_last(1) : pop_to_mark();
      append(top_node(Kind::list), values);
      return true;
    }
    case 's':    // SETITEM
    case 'u': {  // SETITEMS
      const Node values = op == 's' ? pop_last(2) : pop_to_mark();
      if (values.size() % 2 != 0) fail("dict with a key without a value");
      append(top_node(Kind::dict), values);
      return true;
    }
    default:
      return false;
  }
}

bool Machine::step_memo(unsigned char op) {
  switch (op) {
    case 'q':  // BINPUT
      remember(take_unsigned(1));
      return true;
    case 'r':  // LONG_BINPUT
      remember(take_unsigned(4));
      return true;
    case 0x94:  // MEMOIZE
      remember(memo_.size());
      return true;
    case 'h':  // BINGET
      recall(take_unsigned(1));
      return true;
    case 'j':  // LONG_BINGET
      recall(take_unsigned(4));
      return true;
    default:
      return false;
  }
}

void Machine::append(Node& node, const Node& values) {
  if (node.size() + values.size() > node.capacity())
    charge((node.size() + values.size()) * 2 * sizeof(Value));
  // insert() alone would fit the capacity to each small batch, and many of them would take
  // quadratic time.
  if (node.size() + values.size() > node.capacity())
    node.reserve((node.size() + values.size()) * 2);
  node.insert(node.end(), values.begin(), values.end());
}

void Machine::remember(uint64_t index) {
  if (stack_.empty() || stack_.back().kind == Kind::mark) fail("pickle stack underflow");
  // Picklers number from 0, one opcode each, so an honest index is below the number of bytes read.
  if (index >= position_) fail("memo index too large", "", std::to_string(index));
  if (index >= memo_.size()) {
    if (index >= memo_.capacity()) {
      charge((index + 1) * 2 * sizeof(Value));
      memo_.reserve((index + 1) * 2);
    }
    memo_.resize(index + 1, Value{Kind::mark, 0, 0});
  }
  memo_[index] = stack_.back();
}

void Machine::recall(uint64_t index) {
  if (index >= memo_.size() || memo_[index].kind == Kind::mark)
    fail("memo entry missing", "", std::to_string(index));
  push(memo_[index]);
}

void Machine::push_global(std::string_view module, std::string_view name) {
  const std::optional<Value> found = find_global(module, name);
  if (!found)
    fail("global not allowed", "tensors, dicts, lists, strings and numbers only",
         in_quotes(std::string(module.substr(0, 100)) + "." + std::string(name.substr(0, 100)),
                   200));
  push(*found);
}

void Machine::call() {
  const Value arguments = pop(Kind::tuple, "arguments");
  const Value function = pop(Kind::function, "callee");
  const Node& values = nodes_[arguments.payload];
  switch (static_cast<Function>(function.payload)) {
    case Function::rebuild_tensor:
      make_tensor(values);
      break;
    case Function::rebuild_parameter:  // (tensor, requires_grad, hooks)
      if (values.size() != 3) fail("wrong number of arguments to _rebuild_parameter", "3");
      require(values[0], Kind::tensor, "parameter");
      push(values[0]);
      break;
    case Function::ordered_dict:
      if (!values.empty()) fail("OrderedDict with arguments", "none");
      push_node(Kind::dict, {});
      break;
  }
}

// What torch hangs on a state dict as attributes (_metadata: versions of modules) is of no use
// here.
void Machine::build() {
  const Value state = pop();
  if (state.kind != Kind::none) require(state, Kind::dict, "state");
  top_node(Kind::dict);
}

// The persistent id of a storage: ("storage", type, key, location, elements).
void Machine::make_storage() {
  const Value id = pop(Kind::tuple, "persistent id");
  const Node& parts = nodes_[id.payload];
  if (parts.size() != 5) fail("wrong persistent id", "5 parts", std::to_string(parts.size()));
  require(parts[0], Kind::string, "persistent id");
  if (text_of(parts[0]) != "storage")
    fail("wrong persistent id", "\"storage\"", in_quotes(text_of(parts[0])));
  require(parts[1], Kind::storage_type, "storage type");
  require(parts[2], Kind::string, "storage key");
  require(parts[3], Kind::string, "storage location");
  if (number_of(parts[4], "storage size") < 0) fail("negative storage size");
  push({Kind::storage, 0, id.payload});
}

// (storage, offset, size, stride, requires_grad, hooks[, metadata])
void Machine::make_tensor(const Node& arguments) {
  if (arguments.size() != 6 && arguments.size() != 7)
    fail("wrong number of arguments to _rebuild_tensor_v2", "6 or 7",
         std::to_string(arguments.size()));
  require(arguments[0], Kind::storage, "storage of a tensor");
  if (tensors_.size() >= kMaxTensors)
    fail("too many tensors", "at most " + std::to_string(kMaxTensors));
  const Node& id = nodes_[arguments[0].payload];
  charge(2 * sizeof(PickledTensor));
  PickledTensor t;
  t.type = &kStorageTypes[id[1].payload];
  t.key = text_of(id[2]);
  t.numel = number_of(id[4], "storage size");
  t.offset = number_of(arguments[1], "storage offset");
  if (t.offset < 0) fail("negative storage offset", "", std::to_string(t.offset));
  t.size = extents(arguments[2], "size");
  t.stride = extents(arguments[3], "stride");
  if (t.size.size() != t.stride.size()) fail("size and stride of a tensor differ in length");
  push({Kind::tensor, 0, tensors_.size()});
  tensors_.push_back(std::move(t));
}

std::vector<int64_t> Machine::extents(const Value& tuple, const char* what) {
  require(tuple, Kind::tuple, what);
  const Node& values = nodes_[tuple.payload];
  if (values.size() > kMaxRank)
    fail(std::string(what) + " of a tensor too long", std::to_string(kMaxRank) + " numbers");
  charge(values.size() * sizeof(int64_t) + 16);
  std::vector<int64_t> out;
  out.reserve(values.size());
  for (const Value& v : values) {
    out.push_back(number_of(v, what));
    if (out.back() < 0) fail(std::string("negative ") + what, "", std::to_string(out.back()));
  }
  return out;
}

std::vector<PickledEntry> Machine::members(const Node& dict) {
  if (dict.size() / 2 > kMaxTensors)
    fail("too many tensors", "at most " + std::to_string(kMaxTensors));
  charge(dict.size() / 2 * sizeof(PickledEntry));
  std::vector<PickledEntry> entries;
  entries.reserve(dict.size() / 2);
  for (size_t i = 0; i < dict.size(); i += 2) {
    require(dict[i], Kind::string, "key of the dict of tensors");
    PickledEntry& entry = entries.emplace_back();
    entry.name = text_of(dict[i]);
    const Value& value = dict[i + 1];
    if (value.kind == Kind::dict)
      fail("not a flat dict of tensors: " + in_quotes(entry.name) + " holds a dict");
    if (value.kind == Kind::tensor) {
      charge(tensors_[value.payload].size.size() * 2 * sizeof(int64_t) + 64);
      entry.tensor = tensors_[value.payload];
    } else {
      entry.problem = kind_name(value.kind);
    }
  }
  return entries;
}

}  // namespace

const StorageType& storage_type_of(DType dtype) {
  for (const StorageType& t : kStorageTypes)
    if (t.dtype == dtype) return t;
  KRAIT_CHECK(false);
}

std::vector<PickledEntry> read_state_dict(std::string_view pickle, const std::string& where,
                                          size_t memory) {
  return Machine(pickle, where, memory).run();
}

}  // namespace krait
