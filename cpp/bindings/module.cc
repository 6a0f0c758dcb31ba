// The Python face of the core: draftwerk._core. Conversion only; every call that may take long releases the GIL. Those
// that take the engine's mutex alone keep it: it is held for microseconds, by a thread that never wants the GIL, and
// giving the GIL up would take as long as the call.
#include <pybind11/chrono.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/quantized_blocks.h"
#include "backend/weight_type.h"
#include "bindings/events.h"
#include "drafting/lookup.h"
#include "drafting/random.h"
#include "engine/engine.h"
#include "engine/evaluation.h"
#include "model/gemma.h"
#include "model/weights.h"

namespace py = pybind11;

namespace draftwerk {
namespace {

/// Rows with logits in one step, unless told otherwise: each costs a vocabulary of float32 while in use.
constexpr int kDefaultOutputs = 128;

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

ModelConfig parse_config(const py::dict& config) {
  ModelConfig parsed;
  parsed.vocabulary = field<int>(config, "vocab_size");
  parsed.hidden = field<int>(config, "hidden_size");
  parsed.norm_epsilon = field<float>(config, "rms_norm_eps");
  parsed.attention_scale = static_cast<float>(1.0 / std::sqrt(field<double>(config, "query_pre_attn_scalar")));
  parsed.final_softcap = field<float>(config, "final_logit_softcapping");
  parsed.window = field<int>(config, "sliding_window");
  parsed.max_positions = field<std::int64_t>(config, "max_position_embeddings");
  parsed.rope[static_cast<int>(LayerType::sliding)] = {field<double>(config, "rope_local_theta"), 1.0};
  parsed.rope[static_cast<int>(LayerType::full)] = {field<double>(config, "rope_theta"),
                                                    field<double>(config, "rope_scaling_factor")};
  LayerConfig layer;
  layer.query_heads = field<int>(config, "num_attention_heads");
  layer.kv_heads = field<int>(config, "num_key_value_heads");
  layer.head_dim = field<int>(config, "head_dim");
  layer.mlp = field<int>(config, "intermediate_size");
  for (const auto& type : field<std::vector<std::string>>(config, "layer_types")) {
    if (type != "sliding_attention" && type != "full_attention") {
      throw std::invalid_argument("model config: layer_types has '" + type +
                                  "', known: sliding_attention, full_attention");
    }
    layer.type = type == "full_attention" ? LayerType::full : LayerType::sliding;
    parsed.layers.push_back(layer);
  }
  check(parsed);
  return parsed;
}

/// A model under construction, then ready: what Python holds on to. Backend, weights and activations in one.
class PyModel {
 public:
  PyModel(const py::dict& config, int threads, int max_step_rows, int max_outputs)
      : config_(parse_config(config)),
        max_rows_(max_step_rows),
        max_outputs_(max_outputs == 0 ? std::min(max_step_rows, kDefaultOutputs) : max_outputs) {
    if (max_step_rows < 2 || max_step_rows > 65536) {
      throw std::invalid_argument("max_step_rows is " + std::to_string(max_step_rows) + ", must be 2 to 65536");
    }
    if (max_outputs_ < 1 || max_outputs_ > max_step_rows) {
      throw std::invalid_argument("max_outputs is " + std::to_string(max_outputs) + ", must be 1 to max_step_rows (" +
                                  std::to_string(max_step_rows) + "), or 0 for the default");
    }
    backend_ = make_cpu_backend(threads);
    weights_ = std::make_unique<Weights>(*backend_);
  }

  void create_weight(const std::string& name, const std::string& type, std::int64_t rows, std::int64_t columns) {
    building().create(name, parse_weight_type(type), rows, columns);
  }

  void upload_rows(const std::string& name, std::int64_t first_row, const std::string& source_type, std::int64_t rows,
                   const py::buffer& data) {
    const py::buffer_info info = data.request();
    const auto bytes = static_cast<std::size_t>(info.size * info.itemsize);
    if (info.ndim != 1 || (info.size > 1 && info.strides[0] != info.itemsize)) {
      throw std::invalid_argument("tensor " + name + ": the data must be one contiguous dimension");
    }
    Weights& weights = building();
    const WeightType type = parse_weight_type(source_type);
    const py::gil_scoped_release release;
    weights.upload_rows(name, first_row, rows, type, {static_cast<const std::byte*>(info.ptr), bytes});
  }

  void set_vector(const std::string& name,
                  const py::array_t<float, py::array::c_style | py::array::forcecast>& values) {
    building().set_vector(name, {values.data(), static_cast<std::size_t>(values.size())});
  }

  void finish() {
    building();
    model_.emplace(*backend_, config_, *weights_, max_rows_, max_outputs_);
#if defined(__GLIBC__)
    malloc_trim(0);  // what loading and building the tokenizer left in the heap: 15 MB for a vocabulary of 262,144
#endif
  }

  Gemma& model() {
    if (!model_) throw std::runtime_error("the model is not finished: call finish() after the last tensor");
    return *model_;
  }

  /// Keeps evaluation and a running engine apart: the model has one set of activations.
  void acquire() {
    model();
    const std::lock_guard lock(mutex_);
    if (in_use_) throw std::runtime_error("the model is in use by an engine or an evaluation");
    in_use_ = true;
  }
  void release() {
    const std::lock_guard lock(mutex_);
    in_use_ = false;
  }

  py::array_t<float> logits(const std::vector<TokenId>& tokens, int chunk) {
    const Use use(*this);
    const auto vocabulary = static_cast<py::ssize_t>(config_.vocabulary);
    py::array_t<float> out({static_cast<py::ssize_t>(tokens.size()), vocabulary});
    const std::span<float> span(out.mutable_data(), static_cast<std::size_t>(out.size()));
    const py::gil_scoped_release release;
    score(*model_, tokens, chunk, span);
    return out;
  }

  std::vector<double> time_rows(int rows, int repeats, int context) {
    const Use use(*this);
    const py::gil_scoped_release release;
    return time_passes(*model_, rows, repeats, context);
  }

  [[nodiscard]] std::string description() const { return backend_->description(); }
  [[nodiscard]] std::size_t weight_bytes() const { return weights_->bytes(); }

 private:
  class Use {
   public:
    explicit Use(PyModel& model) : model_(model) { model_.acquire(); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    Use(Use&&) = delete;
    Use& operator=(Use&&) = delete;
    ~Use() { model_.release(); }

   private:
    PyModel& model_;
  };

  Weights& building() {
    if (model_) throw std::runtime_error("the model is finished; its weights cannot change");
    return *weights_;
  }

  ModelConfig config_;
  int max_rows_;
  int max_outputs_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weights> weights_;
  std::optional<Gemma> model_;
  std::mutex mutex_;
  bool in_use_ = false;
};

/// An engine and its hold on the model.
class PyEngine {
 public:
  PyEngine(
      std::shared_ptr<PyModel> model, const EngineOptions& options, const std::string& drafter,
      const std::optional<std::pair<py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>, py::bytes>>&
          token_bytes)
      : model_(std::move(model)) {
    std::unique_ptr<Drafter> made = make_drafter(drafter, model_->model().config().vocabulary);
    TokenBytes table;
    if (token_bytes) {
      const auto& offsets = token_bytes->first;
      table = TokenBytes({offsets.data(), offsets.data() + offsets.size()}, token_bytes->second);
    }
    model_->acquire();
    try {
      engine_ = std::make_unique<Engine>(model_->model(), options, std::move(made), std::move(table));
    } catch (...) {
      model_->release();
      throw;
    }
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;
  PyEngine(PyEngine&&) = delete;
  PyEngine& operator=(PyEngine&&) = delete;
  ~PyEngine() { close(); }

  Engine& engine() { return *engine_; }

  py::list wait_events(double timeout) {
    std::vector<Event> events;
    if (timeout > 0.0) {
      const py::gil_scoped_release release;
      events = engine_->wait_events(std::chrono::duration<double>(timeout));
    } else {
      events = engine_->wait_events({});
    }
    return to_python(events);
  }

  void close() {
    engine_->close();
    if (!std::exchange(released_, true)) model_->release();
  }

 private:
  static std::unique_ptr<Drafter> make_drafter(const std::string& name, int vocabulary) {
    if (name == "none") return nullptr;
    if (name == "lookup") return make_lookup_drafter();
    if (name == "random") return make_random_drafter(vocabulary);
    throw std::invalid_argument("unknown drafter '" + name + "' (known: none, lookup, random)");
  }

  std::shared_ptr<PyModel> model_;
  std::unique_ptr<Engine> engine_;
  bool released_ = false;
};

py::dict to_dict(const EngineStatistics& s) {
  py::dict seconds;
  seconds["schedule"] = s.schedule_seconds;
  seconds["draft"] = s.draft_seconds;
  seconds["target"] = s.target_seconds;
  seconds["commit"] = s.commit_seconds;
  py::dict kv;
  kv["budget_bytes"] = s.kv.budget_bytes;
  kv["used_bytes"] = s.kv.used_bytes;
  kv["peak_bytes"] = s.kv.peak_bytes;
  kv["cached_bytes"] = s.kv.cached_bytes;
  kv["sliding_pages"] = s.kv.pages_in_use[0];
  kv["full_pages"] = s.kv.pages_in_use[1];
  kv["cached_blocks"] = s.kv.cached_blocks;
  kv["prefix_lookup_tokens"] = s.kv.prefix_lookup_tokens;
  kv["prefix_hit_tokens"] = s.kv.prefix_hit_tokens;
  kv["evicted_pages"] = s.kv.evicted_pages;
  kv["parked_bytes"] = s.parked_bytes;
  py::dict d;
  d["steps"] = s.steps;
  d["rows"] = s.rows;
  d["prefill_rows"] = s.prefill_rows;
  d["drafted"] = s.drafted;
  d["accepted"] = s.accepted;
  d["drafted_by_position"] = s.drafted_by_position;
  d["accepted_by_position"] = s.accepted_by_position;
  d["generated_tokens"] = s.generated_tokens;
  d["requests"] = s.requests;
  d["finished"] = s.finished;
  d["preemptions"] = s.preemptions;
  d["running"] = s.running;
  d["waiting"] = s.waiting;
  d["paused"] = s.paused;
  d["conversations"] = s.conversations;
  d["queued_tokens"] = s.queued_tokens;
  d["seconds"] = seconds;
  d["kv"] = kv;
  return d;
}

void bind_model(py::module_& m) {
  py::class_<PyModel, std::shared_ptr<PyModel>>(m, "Model", "A target model on this machine's processor.")
      .def(py::init<const py::dict&, int, int, int>(), py::arg("config"), py::kw_only(), py::arg("threads") = 0,
           py::arg("max_step_rows") = 512, py::arg("max_outputs") = 0)
      .def("create_weight", &PyModel::create_weight, py::arg("name"), py::arg("type"), py::arg("rows"),
           py::arg("columns"))
      .def("upload_rows", &PyModel::upload_rows, py::arg("name"), py::arg("first_row"), py::arg("source_type"),
           py::arg("rows"), py::arg("data"))
      .def("set_vector", &PyModel::set_vector, py::arg("name"), py::arg("values"))
      .def("finish", &PyModel::finish)
      .def("logits", &PyModel::logits, py::arg("token_ids"), py::arg("chunk") = 0)
      .def("time_rows", &PyModel::time_rows, py::arg("rows"), py::arg("repeats"), py::arg("context"))
      .def_property_readonly("description", &PyModel::description)
      .def_property_readonly("weight_bytes", &PyModel::weight_bytes);
}

void bind_requests(py::module_& m) {
  py::class_<Request>(m, "Request", "What a caller asks of the engine.")
      .def(py::init<>())
      .def_readwrite("prompt", &Request::prompt)
      .def_readwrite("max_tokens", &Request::max_tokens)
      .def_readwrite("min_tokens", &Request::min_tokens)
      .def_property(
          "temperature", [](const Request& r) { return r.sampling.temperature; },
          [](Request& r, float v) { r.sampling.temperature = v; })
      .def_property(
          "top_k", [](const Request& r) { return r.sampling.top_k; },
          [](Request& r, std::int32_t v) { r.sampling.top_k = v; })
      .def_property(
          "top_p", [](const Request& r) { return r.sampling.top_p; }, [](Request& r, float v) { r.sampling.top_p = v; })
      .def_property(
          "min_p", [](const Request& r) { return r.sampling.min_p; }, [](Request& r, float v) { r.sampling.min_p = v; })
      .def_property(
          "repetition_penalty", [](const Request& r) { return r.sampling.repetition_penalty; },
          [](Request& r, float v) { r.sampling.repetition_penalty = v; })
      .def_property(
          "presence_penalty", [](const Request& r) { return r.sampling.presence_penalty; },
          [](Request& r, float v) { r.sampling.presence_penalty = v; })
      .def_property(
          "frequency_penalty", [](const Request& r) { return r.sampling.frequency_penalty; },
          [](Request& r, float v) { r.sampling.frequency_penalty = v; })
      .def_property(
          "logit_bias",
          [](const Request& r) {
            return std::map<TokenId, float>(r.sampling.logit_bias.begin(), r.sampling.logit_bias.end());
          },
          [](Request& r, const std::map<TokenId, float>& v) { r.sampling.logit_bias.assign(v.begin(), v.end()); })
      .def_property(
          "seed", [](const Request& r) { return r.sampling.seed; },
          [](Request& r, std::uint64_t v) { r.sampling.seed = v; })
      .def_property(
          "logprobs", [](const Request& r) { return r.sampling.logprobs; },
          [](Request& r, std::int32_t v) { r.sampling.logprobs = v; })
      .def_readwrite("stop_token_ids", &Request::stop_token_ids)
      .def_property(
          "stop_strings",
          [](const Request& r) { return std::vector<py::bytes>(r.stop_strings.begin(), r.stop_strings.end()); },
          [](Request& r, const std::vector<py::bytes>& v) { r.stop_strings.assign(v.begin(), v.end()); })
      .def_readwrite("ignore_eos", &Request::ignore_eos)
      .def_readwrite("drafting", &Request::drafting)
      .def_readwrite("max_draft_length", &Request::max_draft_length)
      .def_readwrite("salt", &Request::salt)
      .def_readwrite("conversation", &Request::conversation);
}

void bind_engine(py::module_& m) {
  struct Options {
    EngineOptions engine;
    std::string drafter = "lookup";
  };
  const auto option = [](auto EngineOptions::* member) {
    return std::pair([member](const Options& o) { return o.engine.*member; },
                     [member](Options& o, std::decay_t<decltype(std::declval<EngineOptions>().*member)> value) {
                       o.engine.*member = std::move(value);
                     });
  };
  py::class_<Options> options(m, "EngineOptions");
  const auto add = [&](const char* name, auto member) {
    auto [get, set] = option(member);
    options.def_property(name, get, set);
  };
  options.def(py::init<>()).def_readwrite("drafter", &Options::drafter);
  add("kv_memory_bytes", &EngineOptions::kv_memory_bytes);
  add("max_sequences", &EngineOptions::max_sequences);
  add("prefill_chunk", &EngineOptions::prefill_chunk);
  add("draft_length", &EngineOptions::draft_length);
  add("max_draft_length", &EngineOptions::max_draft_length);
  add("prefix_cache", &EngineOptions::prefix_cache);
  add("max_queued_tokens", &EngineOptions::max_queued_tokens);
  add("eos_token_ids", &EngineOptions::eos_token_ids);
  add("max_context", &EngineOptions::max_context);

  using Offsets = py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>;
  py::class_<PyEngine>(m, "Engine", "The engine thread and its queues.")
      .def(py::init([](std::shared_ptr<PyModel> model, const Options& o,
                       const std::optional<std::pair<Offsets, py::bytes>>& token_bytes) {
             return std::make_unique<PyEngine>(std::move(model), o.engine, o.drafter, token_bytes);
           }),
           py::arg("model"), py::arg("options"), py::arg("token_bytes") = py::none())
      .def(
          "submit", [](PyEngine& e, const Request& request) { return e.engine().submit(request); }, py::arg("request"))
      .def(
          "cancel", [](PyEngine& e, RequestId id) { e.engine().cancel(id); }, py::arg("request_id"))
      .def(
          "pause", [](PyEngine& e, RequestId id) { e.engine().pause(id); }, py::arg("request_id"))
      .def(
          "resume", [](PyEngine& e, RequestId id) { e.engine().resume(id); }, py::arg("request_id"))
      .def("open_conversation", [](PyEngine& e) { return e.engine().open_conversation(); })
      .def(
          "close_conversation", [](PyEngine& e, ConversationId id) { e.engine().close_conversation(id); },
          py::arg("conversation"))
      .def("wait_events", &PyEngine::wait_events, py::arg("timeout"))
      .def("event_fd", [](PyEngine& e) { return e.engine().event_descriptor(); })
      .def("stats", [](PyEngine& e) { return to_dict(e.engine().statistics()); })
      .def("close", &PyEngine::close, py::call_guard<py::gil_scoped_release>());
}

void bind_errors(py::module_& m) {
  static PyObject* request_error = PyErr_NewException("draftwerk._core.RequestError", PyExc_ValueError, nullptr);
  m.attr("RequestError") = py::reinterpret_borrow<py::object>(request_error);
  py::register_exception<QueueFull>(m, "QueueFull", PyExc_RuntimeError);
  py::register_exception<EngineClosed>(m, "EngineClosed", PyExc_RuntimeError);
  // By value, as pybind11's type of a translator has it. NOLINTNEXTLINE(performance-unnecessary-value-param)
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const RequestError& error) {
      const FieldError& field = error.field();
      const py::tuple arguments = py::make_tuple(field.field, field.value, field.allowed);
      PyErr_SetObject(request_error, arguments.ptr());
    }
  });
}

/// Dequantises `elements` values of a tensor stored in `type`: the plain form that the kernels are held to.
py::array_t<float> dequantize_tensor(const std::string& type_name, const py::buffer& data, std::int64_t elements) {
  const WeightType type = parse_weight_type(type_name);
  const py::buffer_info info = data.request();
  const auto bytes = static_cast<std::size_t>(info.size * info.itemsize);
  if (elements < 0 || bytes != stored_row_bytes(type, elements)) {
    throw std::invalid_argument(std::to_string(bytes) + " bytes do not hold " + std::to_string(elements) +
                                " values of type " + type_name);
  }
  py::array_t<float> out(static_cast<py::ssize_t>(elements));
  cpu::dequantize(type, static_cast<const std::byte*>(info.ptr), elements, out.mutable_data());
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "Draftwerk's core: the engine, its model and its queues. The package draftwerk is the interface for people.";
  bind_errors(m);
  bind_model(m);
  bind_requests(m);
  bind_events(m);
  bind_engine(m);
  m.def("dequantize", &dequantize_tensor, py::arg("type"), py::arg("data"), py::arg("elements"));
}

}  // namespace draftwerk
