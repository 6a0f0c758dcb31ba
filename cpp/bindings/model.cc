#include "bindings/model.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "backend/cpu/cpu_backend.h"
#include "backend/weight_type.h"
#include "engine/evaluation.h"

namespace py = pybind11;

namespace draftwerk {
namespace {

/// Rows with logits in one step, unless told otherwise: each costs a vocabulary of float32 while in use.
constexpr int kDefaultOutputs = 160;  // 16 sequences with 8 drafts each, and some more

// --- configurations ----------------------------------------------------------------------------------------------

/// One value of the config dictionary, with an error that names the field.
template <typename T>
T field(const py::dict& config, const char* name) {
  if (!config.contains(name)) throw std::invalid_argument(std::string("model config: field ") + name + " is missing");
  try {
    return config[name].cast<T>();
  } catch (const py::cast_error&) {
    throw std::invalid_argument(std::string("model config: field ") + name + " has the value " +
                                py::repr(config[name]).cast<std::string>() + ", which is of the wrong type");
  }
}

std::vector<LayerConfig> parse_layers(const py::dict& config) {
  const auto types = field<std::vector<std::string>>(config, "layer_types");
  const auto shared = field<std::size_t>(config, "num_kv_shared_layers");
  const bool double_wide = field<bool>(config, "use_double_wide_mlp");
  std::vector<LayerConfig> layers;
  for (std::size_t i = 0; i < types.size(); ++i) {
    if (types[i] != "sliding_attention" && types[i] != "full_attention") {
      throw std::invalid_argument("model config: layer_types has '" + types[i] +
                                  "', known: sliding_attention, full_attention");
    }
    const bool full = types[i] == "full_attention";
    LayerConfig layer;
    layer.type = full ? LayerType::full : LayerType::sliding;
    layer.query_heads = field<int>(config, "num_attention_heads");
    layer.kv_heads = field<int>(config, full ? "num_global_key_value_heads" : "num_key_value_heads");
    layer.head_dim = field<int>(config, full ? "global_head_dim" : "head_dim");
    layer.mlp = field<int>(config, "intermediate_size");
    layer.shares_kv = i + shared >= types.size();
    if (layer.shares_kv && double_wide) layer.mlp *= 2;
    layer.key_is_value = full && field<bool>(config, "attention_k_eq_v");
    layers.push_back(layer);
  }
  return layers;
}

ModelConfig parse_config(const py::dict& config) {
  ModelConfig parsed;
  parsed.vocabulary = field<int>(config, "vocab_size");
  parsed.hidden = field<int>(config, "hidden_size");
  parsed.norm_epsilon = field<float>(config, "rms_norm_eps");
  parsed.attention_scale = static_cast<float>(1.0 / std::sqrt(field<double>(config, "query_pre_attn_scalar")));
  parsed.final_softcap = field<float>(config, "final_logit_softcapping");
  parsed.window = field<int>(config, "sliding_window");
  parsed.max_positions = field<std::int64_t>(config, "max_position_embeddings");
  parsed.value_norm = field<bool>(config, "value_norm");
  parsed.layer_scalars = field<bool>(config, "layer_scalars");
  parsed.per_layer_width = field<int>(config, "hidden_size_per_layer_input");
  parsed.per_layer_vocabulary = field<int>(config, "vocab_size_per_layer_input");
  parsed.experts = {field<int>(config, "num_experts"), field<int>(config, "top_k_experts"),
                    field<int>(config, "moe_intermediate_size")};
  parsed.rope[static_cast<int>(LayerType::sliding)] = {field<double>(config, "rope_local_theta"), 1.0, 1.0};
  parsed.rope[static_cast<int>(LayerType::full)] = {field<double>(config, "rope_theta"),
                                                    field<double>(config, "rope_scaling_factor"),
                                                    field<double>(config, "rope_partial_rotary_factor")};
  parsed.layers = parse_layers(config);
  return parsed;
}

MtpConfig parse_mtp_config(const py::dict& config) {
  return {parse_config(field<py::dict>(config, "text")), field<int>(config, "backbone_hidden_size"),
          field<int>(config, "num_centroids"), field<int>(config, "centroid_intermediate_top_k"),
          field<int>(config, "draft_vocab_size")};
}

// --- buffers -----------------------------------------------------------------------------------------------------

std::span<const std::byte> contiguous_bytes(const std::string& name, const py::buffer_info& info) {
  if (info.ndim != 1 || (info.size > 1 && info.strides[0] != info.itemsize)) {
    throw std::invalid_argument("tensor " + name + ": the data must be one contiguous dimension");
  }
  return {static_cast<const std::byte*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize)};
}

/// What the heap holds of loading and of building the tokenizer goes back: 15 MB for a vocabulary of 262,144.
void trim_heap() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace

// --- tensors -----------------------------------------------------------------------------------------------------

void PyWeights::create_weight(const std::string& name, const std::string& type, std::int64_t rows,
                              std::int64_t columns) {
  building().create(name, parse_weight_type(type), rows, columns);
}

void PyWeights::upload_rows(const std::string& name, std::int64_t first_row, const std::string& source_type,
                            std::int64_t rows, const py::buffer& data) {
  const py::buffer_info info = data.request();
  const std::span<const std::byte> bytes = contiguous_bytes(name, info);
  Weights& weights = building();
  const WeightType type = parse_weight_type(source_type);
  const py::gil_scoped_release release;
  weights.upload_rows(name, first_row, rows, type, bytes);
}

void PyWeights::set_vector(const std::string& name,
                           const py::array_t<float, py::array::c_style | py::array::forcecast>& values) {
  building().set_vector(name, {values.data(), static_cast<std::size_t>(values.size())});
}

void PyWeights::set_indices(const std::string& name,
                            const py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>& values) {
  building().set_indices(name, {values.data(), static_cast<std::size_t>(values.size())});
}

void PyWeights::map_table(const std::string& name, const std::string& type, std::int64_t rows, std::int64_t columns,
                          const py::buffer& data) {
  const std::shared_ptr<py::buffer_info> view(new py::buffer_info(data.request()), [](py::buffer_info* info) {
    const py::gil_scoped_acquire gil;  // letting go of a view is Python's affair
    delete info;
  });
  building().map_table(name, parse_weight_type(type), rows, columns, contiguous_bytes(name, *view), view);
}

Weights& PyWeights::building() {
  if (sealed_) throw std::runtime_error("the model is finished; its weights cannot change");
  return weights_;
}

void PyWeights::seal() {
  building();
  sealed_ = true;
}

// --- target ------------------------------------------------------------------------------------------------------

PyModel::PyModel(const py::dict& config, const PyGpu* gpu, int threads, int max_step_rows, int max_outputs)
    : config_(parse_config(config)),
      max_rows_(max_step_rows),
      max_outputs_(max_outputs == 0 ? std::min(max_step_rows, kDefaultOutputs) : max_outputs) {
  check(config_);
  if (max_step_rows < 2 || max_step_rows > 65536) {
    throw std::invalid_argument("max_step_rows is " + std::to_string(max_step_rows) + ", must be 2 to 65536");
  }
  if (max_outputs_ < 1 || max_outputs_ > max_step_rows) {
    throw std::invalid_argument("max_outputs is " + std::to_string(max_outputs) + ", must be 1 to max_step_rows (" +
                                std::to_string(max_step_rows) + "), or 0 for the default");
  }
  backend_ = gpu != nullptr ? gpu->library->make_backend(gpu->number) : make_cpu_backend(threads);
  weights_ = std::make_unique<PyWeights>(*backend_);
}

void PyModel::finish(bool full_head) {
  weights_->seal();
  model_.emplace(*backend_, config_, weights_->weights(), max_rows_, max_outputs_);
  if (!full_head) model_->screen_head();
  trim_heap();
}

std::optional<std::pair<std::size_t, std::size_t>> PyModel::memory() const {
  const std::optional<MemoryInfo> memory = backend_->memory();
  if (!memory) return std::nullopt;
  return std::pair(memory->free, memory->total);
}

Gemma& PyModel::model() {
  if (!model_) throw std::runtime_error("the model is not finished: call finish() after the last tensor");
  return *model_;
}

void PyModel::acquire() {
  model();
  const std::lock_guard lock(mutex_);
  if (in_use_) throw std::runtime_error("the model is in use by an engine or an evaluation");
  in_use_ = true;
}

void PyModel::release() {
  const std::lock_guard lock(mutex_);
  in_use_ = false;
}

py::array_t<float> PyModel::logits(const std::vector<TokenId>& tokens, int chunk) {
  const Use use(*this);
  const auto vocabulary = static_cast<py::ssize_t>(config_.vocabulary);
  py::array_t<float> out({static_cast<py::ssize_t>(tokens.size()), vocabulary});
  const std::span<float> span(out.mutable_data(), static_cast<std::size_t>(out.size()));
  const py::gil_scoped_release release;
  score(*model_, tokens, chunk, span);
  return out;
}

std::span<const TokenId> PyModel::text() {
  if (text_.empty()) text_ = written_text(*model_);
  return text_;
}

std::vector<double> PyModel::time_rows(int rows, int repeats, int context) {
  const Use use(*this);
  const py::gil_scoped_release release;
  return time_passes(*model_, text(), rows, repeats, context);
}

// --- drafter -----------------------------------------------------------------------------------------------------

PyMtpModel::PyMtpModel(std::shared_ptr<PyModel> target, const py::dict& config)
    : target_(std::move(target)),
      config_(parse_mtp_config(config)),
      weights_(std::make_unique<PyWeights>(target_->backend())) {
  check(config_);
  building_.emplace(*target_);
}

void PyMtpModel::finish() {
  weights_->seal();
  model_.emplace(target_->model(), config_, weights_->weights());
  building_.reset();
  trim_heap();
}

MtpModel& PyMtpModel::model() {
  if (!model_) throw std::runtime_error("the drafter is not finished: call finish() after the last tensor");
  return *model_;
}

py::tuple PyMtpModel::draft(const std::vector<TokenId>& tokens, int count, int chunk, float temperature, int top_k,
                            float top_p, std::uint64_t seed) {
  MtpModel& drafter = model();
  const PyModel::Use use(*target_);
  SamplingParams sampling;
  sampling.temperature = temperature;
  sampling.top_k = top_k;
  sampling.top_p = top_p;
  sampling.seed = seed;
  DraftRound round;
  {
    const py::gil_scoped_release release;
    round = draftwerk::draft(drafter, tokens, count, sampling, chunk);
  }
  const auto drafts = static_cast<py::ssize_t>(round.tokens.size());
  py::array_t<float> logits({drafts, static_cast<py::ssize_t>(round.logits.size()) / drafts});
  std::copy(round.logits.begin(), round.logits.end(), logits.mutable_data());
  return py::make_tuple(round.tokens, logits);
}

std::vector<double> PyMtpModel::time_drafts(int sequences, int count, int repeats, int context) {
  MtpModel& drafter = model();
  const PyModel::Use use(*target_);
  const py::gil_scoped_release release;
  return draftwerk::time_drafts(drafter, target_->text(), sequences, count, repeats, context);
}

// --- bindings ----------------------------------------------------------------------------------------------------

namespace {

/// The GPUs that the CUDA backend in the file `path` knows of.
std::vector<PyGpu> find_gpus(const std::string& path) {
  const py::gil_scoped_release release;
  const auto library = std::make_shared<const CudaLibrary>(path);
  std::vector<PyGpu> gpus;
  for (CudaDevice& device : library->devices()) {
    gpus.push_back({library, static_cast<int>(gpus.size()), std::move(device.name), std::move(device.refusal)});
  }
  return gpus;
}

/// The methods that fill a model with tensors.
template <typename Model, typename Class>
void bind_tensors(Class& bound) {
  bound
      .def(
          "create_weight",
          [](Model& m, const std::string& name, const std::string& type, std::int64_t rows, std::int64_t columns) {
            m.weights().create_weight(name, type, rows, columns);
          },
          py::arg("name"), py::arg("type"), py::arg("rows"), py::arg("columns"))
      .def(
          "upload_rows",
          [](Model& m, const std::string& name, std::int64_t first_row, const std::string& source_type,
             std::int64_t rows,
             const py::buffer& data) { m.weights().upload_rows(name, first_row, source_type, rows, data); },
          py::arg("name"), py::arg("first_row"), py::arg("source_type"), py::arg("rows"), py::arg("data"))
      .def(
          "set_vector",
          [](Model& m, const std::string& name,
             const py::array_t<float, py::array::c_style | py::array::forcecast>& values) {
            m.weights().set_vector(name, values);
          },
          py::arg("name"), py::arg("values"))
      .def_property_readonly("weight_bytes", &Model::weight_bytes);
}

}  // namespace

void bind_models(py::module_& m) {
  py::class_<PyGpu>(m, "Gpu", "A GPU of this machine.")
      .def_readonly("number", &PyGpu::number)
      .def_readonly("name", &PyGpu::name)
      .def_readonly("refusal", &PyGpu::refusal);
  m.def("gpus", &find_gpus, py::arg("library"));

  py::class_<PyModel, std::shared_ptr<PyModel>> model(m, "Model", "A target model on a GPU or the processor.");
  model.def(py::init<const py::dict&, const PyGpu*, int, int, int>(), py::arg("config"), py::kw_only(),
            py::arg("gpu").none(true) = nullptr, py::arg("threads") = 0, py::arg("max_step_rows") = 512,
            py::arg("max_outputs") = 0);
  bind_tensors<PyModel>(model);
  model.def("finish", &PyModel::finish, py::arg("full_head") = false)
      .def(
          "map_table",
          [](PyModel& target, const std::string& name, const std::string& type, std::int64_t rows, std::int64_t columns,
             const py::buffer& data) { target.weights().map_table(name, type, rows, columns, data); },
          py::arg("name"), py::arg("type"), py::arg("rows"), py::arg("columns"), py::arg("data"))
      .def("logits", &PyModel::logits, py::arg("token_ids"), py::arg("chunk") = 0)
      .def("time_rows", &PyModel::time_rows, py::arg("rows"), py::arg("repeats"), py::arg("context"))
      .def_property_readonly("memory", &PyModel::memory)
      .def_property_readonly("description", &PyModel::description);

  py::class_<PyMtpModel, std::shared_ptr<PyMtpModel>> mtp(m, "MtpModel", "The MTP drafter of a finished model.");
  mtp.def(py::init<std::shared_ptr<PyModel>, const py::dict&>(), py::arg("target"), py::arg("config"));
  bind_tensors<PyMtpModel>(mtp);
  mtp.def("finish", &PyMtpModel::finish)
      .def(
          "set_indices",
          [](PyMtpModel& drafter, const std::string& name,
             const py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>& values) {
            drafter.weights().set_indices(name, values);
          },
          py::arg("name"), py::arg("values"))
      .def("draft", &PyMtpModel::draft, py::arg("token_ids"), py::arg("count"), py::kw_only(), py::arg("chunk") = 0,
           py::arg("temperature") = 0.0F, py::arg("top_k") = 0, py::arg("top_p") = 1.0F, py::arg("seed") = 0)
      .def("time_drafts", &PyMtpModel::time_drafts, py::arg("sequences"), py::arg("count"), py::arg("repeats"),
           py::arg("context"));
}

}  // namespace draftwerk
