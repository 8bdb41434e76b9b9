#include "model/parameters.h"

#include <algorithm>

namespace krait {
namespace {

enum Kind { kMatrix, kMatrixNoDecay, kFull, kFullDecay };

ParameterInfo info(std::string name, std::vector<int64_t> shape, Kind kind, const char* group) {
  ParameterInfo p;
  p.name = std::move(name);
  p.file_shape = shape;
  p.shape = std::move(shape);
  p.matrix = kind == kMatrix || kind == kMatrixNoDecay;
  p.decay = kind == kMatrix || kind == kFullDecay;
  p.group = group;
  return p;
}

void add_layer(const Config& c, int64_t layer, std::vector<ParameterInfo>& table) {
  using L = LayerParameters;
  const std::string prefix = "backbone.layers." + std::to_string(layer) + ".",
                    mixer = prefix + "mixer.";
  const auto add = [&](Tensor L::*member, ParameterInfo p) {
    p.layer = layer;
    p.in_layer = member;
    table.push_back(std::move(p));
  };
  add(&L::norm, info(prefix + "norm.weight", {c.d_model}, kFull, "norm"));
  add(&L::in_proj, info(mixer + "in_proj.weight", {2 * c.d_inner, c.d_model}, kMatrix, "in_proj"));
  if (c.use_bias)
    add(&L::in_proj_bias, info(mixer + "in_proj.bias", {2 * c.d_inner}, kFull, "in_proj"));
  add(&L::conv1d_weight,
      info(mixer + "conv1d.weight", {c.d_inner, c.d_conv}, kFullDecay, "conv1d"));
  table.back().file_shape = {c.d_inner, 1, c.d_conv};
  if (c.use_conv_bias)
    add(&L::conv1d_bias, info(mixer + "conv1d.bias", {c.d_inner}, kFull, "conv1d"));
  if (c.x_proj_size() > 0)
    add(&L::x_proj, info(mixer + "x_proj.weight", {c.x_proj_size(), c.d_inner}, kMatrix, "x_proj"));
  if (c.selective_delta)
    add(&L::dt_proj, info(mixer + "dt_proj.weight", {c.d_inner, c.dt_rank}, kMatrix, "dt_proj"));
  add(&L::dt_proj_bias, info(mixer + "dt_proj.bias", {c.d_inner}, kFull, "dt_proj"));
  add(&L::A_log, info(mixer + "A_log", {c.d_inner, c.d_state}, kFull, "A_log"));
  add(&L::D, info(mixer + "D", {c.d_inner}, kFull, "D"));
  if (!c.selective_B)
    add(&L::B_const, info(mixer + "B_const", {c.d_state}, kMatrixNoDecay, "B_const"));
  if (!c.selective_C)
    add(&L::C_const, info(mixer + "C_const", {c.d_state}, kMatrixNoDecay, "C_const"));
  add(&L::out_proj, info(mixer + "out_proj.weight", {c.d_model, c.d_inner}, kMatrix, "out_proj"));
  if (c.use_bias)
    add(&L::out_proj_bias, info(mixer + "out_proj.bias", {c.d_model}, kFull, "out_proj"));
}

}  // namespace

int64_t ParameterInfo::size() const {
  int64_t n = 1;
  for (int64_t extent : shape) n *= extent;
  return n;
}

int64_t ParameterInfo::aligned_size(DType dtype) const {
  const int64_t line = static_cast<int64_t>(kAlignment / size_of(dtype));
  return (size() + line - 1) / line * line;
}

Tensor ParameterInfo::view(void* data, DType dtype) const {
  return shape.size() == 1 ? Tensor(data, dtype, {shape[0]})
                           : Tensor(data, dtype, {shape[0], shape[1]});
}

std::vector<ParameterInfo> parameter_table(const Config& c) {
  std::vector<ParameterInfo> table;
  const auto add = [&](Tensor Parameters::*member, ParameterInfo p) {
    p.in_model = member;
    table.push_back(std::move(p));
  };
  add(&Parameters::embedding,
      info("backbone.embeddings.weight", {c.vocab_size, c.d_model}, kMatrix, "embedding"));
  for (int64_t layer = 0; layer < c.n_layer; ++layer) add_layer(c, layer, table);
  add(&Parameters::norm_f, info("backbone.norm_f.weight", {c.d_model}, kFull, "norm"));
  if (!c.tie_embeddings)
    add(&Parameters::lm_head,
        info("lm_head.weight", {c.vocab_size, c.d_model}, kMatrix, "lm_head"));
  return table;
}

ParameterInfo head_info(const Config& config) {
  Config untied = config;
  untied.tie_embeddings = false;
  return parameter_table(untied).back();
}

Parameters empty_parameters(const Config& config) {
  Parameters p;
  p.layers.resize(static_cast<size_t>(config.n_layer));
  return p;
}

int64_t parameter_count(const Config& config) {
  int64_t n = 0;
  for (const ParameterInfo& p : parameter_table(config)) n += p.size();
  return n;
}

std::vector<ParameterCount> parameter_counts(const Config& config) {
  std::vector<ParameterCount> counts;
  for (const ParameterInfo& p : parameter_table(config)) {
    const auto found = std::find_if(counts.begin(), counts.end(),
                                    [&](const ParameterCount& c) { return c.group == p.group; });
    if (found == counts.end())
      counts.push_back({p.group, p.size()});
    else
      found->count += p.size();
  }
  return counts;
}

ParameterStore::ParameterStore(const Config& config, DType dtype, Memory& memory)
    : parameters_(empty_parameters(config)) {
  KRAIT_CHECK(dtype == DType::f32 || dtype == DType::f64);
  const std::vector<ParameterInfo> table = parameter_table(config);
  int64_t size = 0;
  std::vector<int64_t> offsets(table.size());
  const auto place = [&](auto&& which) {
    for (size_t i = 0; i < table.size(); ++i) {
      if (!which(table[i])) continue;
      offsets[i] = size;
      size += table[i].aligned_size(DType::f32);  // the same layout in f64
    }
    return size;
  };
  matrices_ = place([](const ParameterInfo& p) { return p.decay && p.matrix; });
  decayed_ = place([](const ParameterInfo& p) { return p.decay && !p.matrix; });
  place([](const ParameterInfo& p) { return !p.decay; });
  buffer_ = OwnedTensor(dtype, {size}, memory);
  char* const base = static_cast<char*>(buffer_->data);
  for (size_t i = 0; i < table.size(); ++i)
    table[i].of(parameters_) =
        table[i].view(base + offsets[i] * static_cast<int64_t>(size_of(dtype)), dtype);
}

}  // namespace krait
