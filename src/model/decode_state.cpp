#include "model/decode_state.h"

#include <array>
#include <cstring>
#include <string>

#include "core/convert.h"
#include "core/error.h"
#include "ops/elementwise.h"

namespace krait {
namespace {

constexpr uint64_t kMagic = 0x3145544154534b;  // "KSTATE1"
constexpr int kHeaderWords = 6;  // magic, n_layer, d_inner, d_state, d_conv, bytes of an element

Tensor layer_of(const Tensor& pool, int64_t layer, std::initializer_list<int64_t> shape) {
  KRAIT_CHECK(layer >= 0 && layer < pool.shape[0]);
  const Tensor part = pool.slice(0, layer, layer + 1);
  return Tensor(part.data, part.dtype, shape);
}

// Bytes of one slot in one layer, and where they are.
struct Piece {
  std::byte* data;
  size_t bytes;
};

Piece piece(const Tensor& pool, int64_t layer, int64_t slot) {
  const size_t bytes = static_cast<size_t>(pool.shape[2]) * size_of(pool.dtype);
  return {static_cast<std::byte*>(pool.data) +
              static_cast<size_t>(layer * pool.shape[1] + slot) * bytes,
          bytes};
}

}  // namespace

DecodeState::DecodeState(const Config& config, int64_t slots, DType dtype, Memory& memory)
    : n_layer_(config.n_layer),
      slots_(slots),
      d_conv_(config.d_conv),
      d_inner_(config.d_inner),
      d_state_(config.d_state) {
  KRAIT_CHECK(slots > 0 && (dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f64));
  conv_ = OwnedTensor(dtype, {n_layer_, slots, (d_conv_ - 1) * d_inner_}, memory);
  ssm_ = OwnedTensor(dtype, {n_layer_, slots, d_inner_ * d_state_}, memory);
}

bool DecodeState::matches(const Config& c) const {
  return c.n_layer == n_layer_ && c.d_inner == d_inner_ && c.d_state == d_state_ &&
         c.d_conv == d_conv_;
}

Tensor DecodeState::conv(int64_t layer) const {
  return layer_of(conv_, layer, {slots_, d_conv_ - 1, d_inner_});
}

Tensor DecodeState::ssm(int64_t layer) const {
  return layer_of(ssm_, layer, {slots_, d_inner_, d_state_});
}

template <class F>
void DecodeState::for_each_pool(F&& f) const {
  for (int64_t layer = 0; layer < n_layer_; ++layer)
    for (const Tensor& pool : {conv_.view(), ssm_.view()}) f(pool, layer);
}

void DecodeState::check_slot(int64_t slot) const {
  KRAIT_CHECK(slot >= 0 && slot < slots_,
              "slot " + std::to_string(slot) + " of " + std::to_string(slots_));
}

void DecodeState::reset(int64_t slot) {
  check_slot(slot);
  for_each_pool([&](const Tensor& pool, int64_t layer) {
    const Piece p = piece(pool, layer, slot);
    conv_.memory().zero(p.data, p.bytes);
  });
}

void DecodeState::reset() {
  conv_.zero();
  ssm_.zero();
}

void DecodeState::copy(Context& ctx, int64_t from, int64_t to) {
  check_slot(from);
  check_slot(to);
  if (from == to) return;
  for (const Tensor& pool : {conv_.view(), ssm_.view()}) {
    const auto layers = [&](int64_t slot) {  // (n_layer, elements of a slot)
      Tensor t(piece(pool, 0, slot).data, pool.dtype, {n_layer_, pool.shape[2]});
      t.stride[0] = pool.stride[0];
      return t;
    };
    copy_elements(ctx, layers(from), layers(to));
  }
}

std::vector<std::byte> DecodeState::save(int64_t slot) const {
  check_slot(slot);
  const std::array<uint64_t, kHeaderWords> header = this->header(dtype());
  std::vector<std::byte> saved(saved_bytes(dtype()));
  std::memcpy(saved.data(), header.data(), sizeof header);
  std::byte* out = saved.data() + sizeof header;
  for_each_pool([&](const Tensor& pool, int64_t layer) {
    const Piece p = piece(pool, layer, slot);
    conv_.memory().download(out, p.data, p.bytes);
    out += p.bytes;
  });
  return saved;
}

void DecodeState::restore(int64_t slot, std::span<const std::byte> saved) {
  check_slot(slot);
  const DType from = saved_dtype(saved);
  const std::array<uint64_t, kHeaderWords> header = this->header(from);
  if (saved.size() != saved_bytes(from))
    throw Error("saved state has the wrong size for this model", "state",
                std::to_string(saved_bytes(from)) + " bytes", std::to_string(saved.size()));
  if (std::memcmp(saved.data(), header.data(), sizeof header) != 0)
    throw Error("saved state belongs to a model of another shape", "state");
  if (from != dtype() && (from == DType::f64 || dtype() == DType::f64))
    throw Error("saved state has another element type", "state", name_of(dtype()), name_of(from));
  std::vector<std::byte> converted;
  const std::byte* in = saved.data() + sizeof header;
  for_each_pool([&](const Tensor& pool, int64_t layer) {
    const Piece p = piece(pool, layer, slot);
    const std::byte* numbers = in;
    if (from != dtype()) {
      converted.resize(p.bytes);
      convert_on_host(1, Tensor(const_cast<std::byte*>(in), from, {pool.shape[2]}),
                      Tensor(converted.data(), dtype(), {pool.shape[2]}));
      numbers = converted.data();
    }
    conv_.memory().upload(p.data, numbers, p.bytes);
    in += static_cast<size_t>(pool.shape[2]) * size_of(from);
  });
}

DType DecodeState::saved_dtype(std::span<const std::byte> saved) {
  std::array<uint64_t, kHeaderWords> header = {};
  if (saved.size() >= sizeof header) std::memcpy(header.data(), saved.data(), sizeof header);
  if (header[0] == kMagic)
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64})
      if (header.back() == size_of(dtype)) return dtype;
  throw Error("no saved state", "state", "what was saved of a sequence");
}

std::array<uint64_t, 6> DecodeState::header(DType dtype) const {
  return {kMagic,
          static_cast<uint64_t>(n_layer_),
          static_cast<uint64_t>(d_inner_),
          static_cast<uint64_t>(d_state_),
          static_cast<uint64_t>(d_conv_),
          size_of(dtype)};
}

size_t DecodeState::saved_bytes(DType dtype) const {
  return kHeaderWords * sizeof(uint64_t) +
         static_cast<size_t>((conv_->size() + ssm_->size()) / slots_) * size_of(dtype);
}

}  // namespace krait
