#include "ops/onednn.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <string_view>
#include <unordered_map>

#include "core/threads.h"
#include "dnnl.hpp"

namespace krait::cpu {
namespace {

using dnnl::memory;

bool widening_forced = false;

// Everything a primitive depends on, compared and hashed as bytes: only int64_t, so no padding.
struct Key {
  int64_t m, n, k, a_stride[2], b_stride[2], c_stride, a_dtype, c_dtype, bias, accumulate;

  bool operator==(const Key& o) const { return std::memcmp(this, &o, sizeof o) == 0; }
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    return std::hash<std::string_view>()({reinterpret_cast<const char*>(&key), sizeof key});
  }
};

memory::data_type type_of(DType dtype) {
  return dtype == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
}

struct Primitive {
  Primitive(const dnnl::engine& engine, const Key& key);

  // Runs it on this memory. Every primitive has its own arguments, so nothing is allocated.
  void run(const dnnl::stream& stream, Arena& workspace, const Matmul& op);

 private:
  dnnl::matmul matmul_;
  size_t scratchpad_bytes_ = 0;
  std::unordered_map<int, memory> arguments_;  // their pointers are set at each run
};

Primitive::Primitive(const dnnl::engine& engine, const Key& key) {
  const auto t = type_of(static_cast<DType>(key.a_dtype));
  const memory::desc a_desc({key.m, key.k}, t, {key.a_stride[0], key.a_stride[1]});
  const memory::desc b_desc({key.k, key.n}, t, {key.b_stride[0], key.b_stride[1]});
  const memory::desc c_desc({key.m, key.n}, type_of(static_cast<DType>(key.c_dtype)),
                            {key.c_stride, 1});
  const memory::desc bias_desc({1, key.n}, memory::data_type::f32, {key.n, 1});
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (key.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attr.set_post_ops(sum);
  }
  const auto op = key.bias ? dnnl::matmul::desc(a_desc, b_desc, bias_desc, c_desc)
                           : dnnl::matmul::desc(a_desc, b_desc, c_desc);
  const dnnl::matmul::primitive_desc desc(op, attr, engine);
  matmul_ = dnnl::matmul(desc);
  scratchpad_bytes_ = desc.scratchpad_desc().get_size();
  const auto argument = [&](int name, const memory::desc& d) {
    arguments_.emplace(name, memory(d, engine, nullptr));
  };
  argument(DNNL_ARG_SRC, a_desc);
  argument(DNNL_ARG_WEIGHTS, b_desc);
  argument(DNNL_ARG_DST, c_desc);
  argument(DNNL_ARG_SCRATCHPAD, desc.scratchpad_desc());
  if (key.bias) argument(DNNL_ARG_BIAS, bias_desc);
}

void Primitive::run(const dnnl::stream& stream, Arena& workspace, const Matmul& op) {
  const Arena::Scope scope(workspace);
  arguments_.at(DNNL_ARG_SRC).set_data_handle(op.a.data);
  arguments_.at(DNNL_ARG_WEIGHTS).set_data_handle(op.b.data);
  arguments_.at(DNNL_ARG_DST).set_data_handle(op.c.data);
  arguments_.at(DNNL_ARG_SCRATCHPAD).set_data_handle(workspace.allocate(scratchpad_bytes_));
  if (op.bias) arguments_.at(DNNL_ARG_BIAS).set_data_handle(op.bias.data);
  matmul_.execute(stream, arguments_);
}

// The state of the CPU engine: the most recently used primitives.
struct State {
  static constexpr size_t kCapacity = 256;

  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::list<std::pair<Key, Primitive>> recent;  // the most recent first
  std::unordered_map<Key, decltype(recent)::iterator, KeyHash> index;

  Primitive& get(const Key& key) {
    if (const auto found = index.find(key); found != index.end()) {
      recent.splice(recent.begin(), recent, found->second);
    } else {
      recent.emplace_front(key, Primitive(engine, key));
      index[key] = recent.begin();
      if (recent.size() > kCapacity) {
        index.erase(recent.back().first);
        recent.pop_back();
      }
    }
    return recent.front().second;
  }
};

// oneDNN takes the number of threads from OpenMP's setting for the calling thread.
class ThreadCount {
 public:
  explicit ThreadCount(int threads) : before_(omp_get_max_threads()) {
    omp_set_num_threads(threads);
  }
  ~ThreadCount() { omp_set_num_threads(before_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

Key key_of(const Matmul& op) {
  const int64_t m = op.a.shape[0], k = op.a.shape[1], n = op.b.shape[1];
  // Strides along dimensions of extent 1 mean nothing, but oneDNN chooses by them.
  const auto stride = [](const Tensor& t, size_t d) {
    return t.shape[d] > 1         ? t.stride[d]
           : t.stride[1 - d] == 1 ? std::max<int64_t>(t.shape[1 - d], 1)
                                  : int64_t{1};
  };
  return {.m = m,
          .n = n,
          .k = k,
          .a_stride = {stride(op.a, 0), stride(op.a, 1)},
          .b_stride = {stride(op.b, 0), stride(op.b, 1)},
          .c_stride = m > 1 ? op.c.stride[0] : n,
          .a_dtype = static_cast<int64_t>(op.a.dtype),
          .c_dtype = static_cast<int64_t>(op.c.dtype),
          .bias = op.bias ? 1 : 0,
          .accumulate = op.accumulate ? 1 : 0};
}

void run(Context& ctx, const Matmul& op) {
  State& state = ctx.engine_state<State>();
  const ThreadCount threads(ctx.threads());
  state.get(key_of(op)).run(state.stream, ctx.workspace(), op);
  state.stream.wait();
}

// Converts the rows (or, where the second stride is not 1, the columns) of a (2-d) bf16 view to
// dense f32 ones in the workspace, same orientation.
Tensor widened(Context& ctx, const Tensor& t) {
  if (t.stride[1] != 1 && t.shape[1] > 1) return transposed(widened(ctx, transposed(t)));
  const Tensor wide = ctx.workspace().tensor(DType::f32, {t.shape[0], t.shape[1]});
  parallel_ranges(ctx.threads(), t.shape[0], 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bf16* from = t.row<bf16>(i);
      float* to = wide.row<float>(i);
      for (int64_t j = 0; j < t.shape[1]; ++j) to[j] = from[j];
    }
  });
  return wide;
}

void rounded(Context& ctx, const Tensor& wide, const Tensor& c) {
  parallel_ranges(ctx.threads(), c.shape[0], 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = wide.row<float>(i);
      bf16* to = c.row<bf16>(i);
      for (int64_t j = 0; j < c.shape[1]; ++j) to[j] = bf16(from[j]);
    }
  });
}

constexpr int64_t kPanelM = 1024, kPanelN = 1024, kPanelK = 2048;

// c[m block, n block] over all of k, in blocks that bound the workspace.
void widened_block(Context& ctx, const Matmul& block) {
  Arena& arena = ctx.workspace();
  const Arena::Scope scope(arena);
  const int64_t k = block.a.shape[1];
  const bool narrow = block.c.dtype == DType::bf16;
  const Tensor c =
      narrow ? arena.tensor(DType::f32, {block.c.shape[0], block.c.shape[1]}) : block.c;
  for (int64_t begin = 0; begin < k; begin += kPanelK) {
    const int64_t end = std::min(k, begin + kPanelK);
    const Arena::Scope panel(arena);
    run(ctx, {.a = widened(ctx, block.a.slice(1, begin, end)),
              .b = widened(ctx, block.b.slice(0, begin, end)),
              .bias = begin == 0 ? block.bias : Tensor(),
              .c = c,
              .accumulate = block.accumulate || begin > 0});
  }
  if (narrow) rounded(ctx, c, block.c);
}

void widened_matmul(Context& ctx, const Matmul& op) {
  const int64_t m = op.a.shape[0], n = op.b.shape[1];
  for (int64_t i = 0; i < m; i += kPanelM)
    for (int64_t j = 0; j < n; j += kPanelN) {
      const int64_t i_end = std::min(m, i + kPanelM), j_end = std::min(n, j + kPanelN);
      widened_block(ctx, {.a = op.a.slice(0, i, i_end),
                          .b = op.b.slice(1, j, j_end),
                          .bias = op.bias ? op.bias.slice(0, j, j_end) : Tensor(),
                          .c = op.c.slice(0, i, i_end).slice(1, j, j_end),
                          .accumulate = op.accumulate});
    }
}

}  // namespace

Tensor transposed(const Tensor& t) {
  KRAIT_CHECK(t.rank == 2);
  Tensor other = t;
  std::swap(other.shape[0], other.shape[1]);
  std::swap(other.stride[0], other.stride[1]);
  return other;
}

bool native_bf16() {
  static const bool native = [] {
    const int isa = static_cast<int>(dnnl::get_effective_cpu_isa());
    const int needed = static_cast<int>(dnnl::cpu_isa::avx512_core_bf16);
    return (isa & needed) == needed;  // an ISA's bits contain those of what it includes
  }();
  return native && !widening_forced;
}

void force_widening(bool on) { widening_forced = on; }

void matmul(Context& ctx, const Matmul& op) {
  const int64_t m = op.a.shape[0], k = op.a.shape[1], n = op.b.shape[1];
  KRAIT_CHECK(op.b.shape[0] == k && op.c.shape[0] == m && op.c.shape[1] == n);
  KRAIT_CHECK(op.a.dtype == op.b.dtype && k > 0 && !(op.accumulate && op.c.dtype == DType::bf16));
  if (m == 0 || n == 0) return;
  if (op.a.dtype == DType::bf16 && !native_bf16()) return widened_matmul(ctx, op);
  run(ctx, op);
}

}  // namespace krait::cpu
