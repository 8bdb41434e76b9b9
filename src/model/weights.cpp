#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>

#include "core/convert.h"
#include "core/error.h"
#include "core/mapped_file.h"
#include "core/threads.h"
#include "formats/safetensors.h"
#include "formats/tensor_file.h"
#include "formats/torch_zip.h"
#include "model/model_memory.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kBackbone = "backbone.", kHead = "lm_head.weight",
                           kEmbeddings = "embeddings.weight", kEmbedding = "embedding.weight";

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

bool has_shape(const Tensor& t, const std::vector<int64_t>& shape) {
  return static_cast<size_t>(t.rank) == shape.size() &&
         std::equal(shape.begin(), shape.end(), t.shape.begin());
}

// Finds the parameters in a file whatever prefix its names have, and knows what it was not asked
// for.
class Checkpoint {
 public:
  explicit Checkpoint(const TensorFile& file) : file_(file) {
    // transformers and mamba_ssm; a model saved without its head; wrapped in another module.
    for (const char* prefix : {"backbone.", "", "model.backbone.", "model."})
      for (std::string_view embedding : {kEmbeddings, kEmbedding})
        if (!found_ && file.contains(prefix + std::string(embedding))) {
          found_ = true;
          prefix_ = prefix;
          embedding_ = embedding;
        }
    if (!found_)
      throw Error("no embedding among the tensors", file.path().string(),
                  "\"backbone.embeddings.weight\" or \"backbone.embedding.weight\"");
  }

  // All of the model's, in the order of its table.
  std::vector<Tensor> take_all(const Config& config) {
    std::vector<Tensor> tensors;
    for (const ParameterInfo& info : parameter_table(config)) tensors.push_back(take(info));
    if (config.tie_embeddings) take_tied_head(head_info(config), tensors[0]);
    refuse_leftovers();
    return tensors;
  }

  std::string name_of(const ParameterInfo& info) const {
    std::string_view name = info.name;
    if (name == kHead)
      return file_.contains("model.lm_head.weight") ? "model.lm_head.weight" : std::string(kHead);
    name.remove_prefix(kBackbone.size());
    return prefix_ + std::string(name == kEmbeddings ? embedding_ : name);
  }

  Tensor take(const ParameterInfo& info) {
    const std::string name = name_of(info);
    taken_.insert(name);
    const Tensor t = file_.at(name);
    if (!has_shape(t, info.file_shape) && !has_shape(t, info.shape))
      throw Error("wrong shape", where(name), shape_text(info.file_shape), shape_string(t));
    if (t.dtype != DType::f32 && t.dtype != DType::bf16 && t.dtype != DType::f16 &&
        t.dtype != DType::f64)
      throw Error("wrong element type", where(name), "f32, bf16, f16 or f64",
                  ::krait::name_of(t.dtype));
    return t;
  }

  // A head beside tied embeddings must be a copy of them; a sample of its rows tells without
  // reading it all.
  void take_tied_head(const ParameterInfo& head, const Tensor& embedding) {
    if (!file_.contains(name_of(head))) return;
    const Tensor t = take(head);
    const size_t row = embedding.bytes() / static_cast<size_t>(embedding.shape[0]);
    const int64_t rows = embedding.shape[0], sample = std::max<int64_t>(rows / 64, 1);
    bool equal = t.dtype == embedding.dtype;
    for (int64_t i = 0; equal && i < rows; i += sample) {
      const size_t at = static_cast<size_t>(i) * row;
      equal = std::memcmp(static_cast<char*>(t.data) + at, static_cast<char*>(embedding.data) + at,
                          row) == 0;
    }
    if (!equal)
      throw Error("the head differs from the embedding, yet config.json ties them",
                  where(name_of(head)), "equal tensors, or \"tie_word_embeddings\": false");
  }

  void refuse_leftovers() const {
    for (const std::string& name : file_.names())
      if (!taken_.contains(name))
        throw Error("unexpected tensor", where(name), "only the tensors that config.json implies");
  }

  std::string where(const std::string& name) const {
    return (file_.contains(name) ? file_.file_of(name) : file_.path().string()) + ": tensor " +
           in_quotes(name);
  }

 private:
  const TensorFile& file_;
  bool found_ = false;
  std::string prefix_;
  std::string_view embedding_;
  std::set<std::string> taken_;
};

// f(the tensor in the parameter's shape, aligned for its type).
template <class F>
void with_aligned(const ParameterInfo& info, const Tensor& in_file, F&& f) {
  if (aligned(in_file)) return f(info.view(in_file.data, in_file.dtype));
  const Buffer copy(in_file.bytes());
  std::memcpy(copy.data(), in_file.data, in_file.bytes());
  f(info.view(copy.data(), in_file.dtype));
}

// A view of mapped memory as it is, or a converted copy.
Tensor load_parameter(Model& model, const ParameterInfo& info, const Tensor& in_file, DType dtype) {
  if (in_file.dtype == dtype && aligned(in_file)) {
    model.mapped_bytes += static_cast<int64_t>(in_file.bytes());
    return info.view(in_file.data, dtype);
  }
  const Tensor t = allocate_parameter(model, info, dtype);
  with_aligned(info, in_file,
               [&](const Tensor& from) { convert_on_host(available_cores(), from, t); });
  return t;
}

// Weights left by a format that readers prefer would hide what is written now.
void refuse_hidden(const fs::path& folder) {
  for (const char* name : {"model.safetensors", "model.safetensors.index.json"})
    if (fs::exists(folder / name))
      throw Error("the folder holds other weights, which would be read instead",
                  (folder / name).string());
}

}  // namespace

void check_tensors(const Config& config, const TensorFile& file) {
  Checkpoint(file).take_all(config);
}

Model load_model(const fs::path& folder, std::optional<DType> dtype, Memory& memory,
                 Quantization quantization) {
  const Config config = read_config(folder);
  const auto file = std::make_shared<TensorFile>(TensorFile::open_folder(folder));
  Checkpoint checkpoint(*file);
  const std::vector<ParameterInfo> table = parameter_table(config);
  const std::vector<Tensor> in_file =
      checkpoint.take_all(config);  // before any memory is asked for

  const DType file_dtype = in_file[0].dtype;
  Model model =
      make_model(config, dtype.value_or(file_dtype == DType::bf16 ? DType::bf16 : DType::f32));
  model.file_dtype = file_dtype;
  model.storage.push_back(file);
  // From what the file holds, not from what it is rounded to.
  const auto quantize = [&](const ParameterInfo& info, const Tensor& from_file) {
    with_aligned(info, from_file, [&](const Tensor& from) {
      quantize_parameter(model, info, from, checkpoint.where(checkpoint.name_of(info)));
    });
  };
  Parameters& parameters = model.weights.parameters;
  for (size_t i = 0; i < table.size(); ++i) {
    if (quantization == Quantization::int8 && scale_of(table[i], parameters))
      quantize(table[i], in_file[i]);
    else
      table[i].of(parameters) =
          load_parameter(model, table[i], in_file[i],
                         table[i].matrix ? model.weights.dtype : model.weights.A.dtype);
  }
  if (quantization == Quantization::int8 && config.tie_embeddings)
    quantize(head_info(config), in_file[0]);
  compute_A(model);
  if (!memory.on_host()) {
    model = copy_model(model, memory);
    model.storage.push_back(file);
  }
  for (size_t i = 0; i < table.size(); ++i)
    model.in_file.push_back({table[i].name, table[i].view(in_file[i].data, in_file[i].dtype)});
  return model;
}

namespace {

// Rounding to f16 must not make infinities.
void check_f16_range(const Tensor& t, const std::string& name) {
  for (int64_t i = 0; i < t.size(); ++i) {
    const float x = t.dtype == DType::f32 ? t.ptr<float>()[i] : float(t.ptr<bf16>()[i]);
    if (std::isfinite(x) && std::abs(x) >= 65520.0f)
      throw Error("value outside the range of f16", name, "at most 65504 in size; bf16 holds it",
                  std::to_string(x));
  }
}

}  // namespace

void save_model(const fs::path& folder, const Config& config, const Parameters& parameters,
                Dialect dialect, DType dtype) {
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16)
    throw Error("cannot store weights in this element type", "dtype", "f32, bf16 or f16",
                name_of(dtype));
  const std::string config_text = config_to_json(config, dialect, dtype);
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) throw Error("cannot create folder: " + error.message(), folder.string());
  std::vector<NamedTensor> tensors;
  std::vector<Buffer> converted;
  for (const ParameterInfo& info : parameter_table(config)) {
    Tensor t = info.of(parameters);
    KRAIT_CHECK(t.dtype != DType::i8, "weights in 8 bits are not saved");
    const DType stored = info.matrix ? dtype : DType::f32;
    if (t.dtype != stored) {
      if (stored == DType::f16 && t.dtype != DType::f64) check_f16_range(t, info.name);
      converted.emplace_back(static_cast<size_t>(info.size()) * size_of(stored));
      const Tensor copy = info.view(converted.back().data(), stored);
      convert_on_host(available_cores(), t, copy);
      t = copy;
    }
    if (info.file_shape.size() == 3)
      t = t.reshape({info.file_shape[0], info.file_shape[1], info.file_shape[2]});
    const bool rename =
        dialect == Dialect::state_spaces && info.name == "backbone.embeddings.weight";
    tensors.push_back({rename ? "backbone.embedding.weight" : info.name, t});
  }
  if (dialect == Dialect::hf) {
    write_safetensors(folder / "model.safetensors", tensors);
  } else {
    refuse_hidden(folder);
    if (config.tie_embeddings) tensors.push_back({std::string(kHead), tensors[0].tensor});
    write_torch_zip(folder / "pytorch_model.bin", tensors);
  }
  write_file_atomic(folder / "config.json", config_text);
}

}  // namespace krait
