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

#include "backend/cpu/quantized_blocks.h"
#include "backend/weight_type.h"
#include "bindings/events.h"
#include "bindings/model.h"
#include "drafting/lookup.h"
#include "drafting/mtp.h"
#include "drafting/random.h"
#include "drafting/synthetic.h"
#include "engine/engine.h"

namespace py = pybind11;

namespace draftwerk {
namespace {

using TokenTable =
    std::optional<std::pair<py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>, py::bytes>>;

/// What a synthetic drafter proposes from: see make_synthetic_drafter.
struct SyntheticDrafts {
  std::vector<std::vector<TokenId>> recordings;
  double acceptance = 0.0;
  std::uint64_t seed = 0;
};

/// An engine and its hold on the model and the drafter.
class PyEngine {
 public:
  PyEngine(std::shared_ptr<PyModel> model, const EngineOptions& options, const std::vector<std::string>& drafters,
           const TokenTable& token_bytes, std::shared_ptr<PyMtpModel> mtp,
           const std::optional<SyntheticDrafts>& synthetic)
      : model_(std::move(model)), mtp_(std::move(mtp)) {
    if (mtp_ != nullptr && &mtp_->target() != model_.get()) {
      throw std::invalid_argument("the MTP drafter was made for another model");
    }
    std::vector<std::unique_ptr<Drafter>> made;
    made.reserve(drafters.size());
    for (const std::string& name : drafters) made.push_back(make_drafter(name, synthetic));
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
  std::unique_ptr<Drafter> make_drafter(const std::string& name, const std::optional<SyntheticDrafts>& synthetic) {
    const int vocabulary = model_->model().config().vocabulary;
    if (name == "lookup") return make_lookup_drafter();
    if (name == "random") return make_random_drafter(vocabulary);
    if (name == "mtp") {
      if (mtp_ == nullptr) throw std::invalid_argument("drafter 'mtp' needs its model: Engine(mtp=...)");
      return make_mtp_drafter(mtp_->model());
    }
    if (name == "synthetic") {
      if (!synthetic) throw std::invalid_argument("drafter 'synthetic' needs recordings: Engine(synthetic=...)");
      return make_synthetic_drafter(synthetic->recordings, synthetic->acceptance, synthetic->seed, vocabulary,
                                    mtp_ == nullptr ? nullptr : make_mtp_drafter(mtp_->model()));
    }
    throw std::invalid_argument("unknown drafter '" + name + "' (known: lookup, mtp, random, synthetic)");
  }

  std::shared_ptr<PyModel> model_;
  std::shared_ptr<PyMtpModel> mtp_;
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
  py::dict drafters;
  for (const DrafterStatistics& drafter : s.drafters) {
    py::dict figures;
    figures["drafted"] = drafter.drafted;
    figures["accepted"] = drafter.accepted;
    figures["drafted_by_position"] = drafter.drafted_by_position;
    figures["accepted_by_position"] = drafter.accepted_by_position;
    py::dict recent;
    recent["rounds"] = drafter.recent.rounds;
    recent["drafted_by_position"] = drafter.recent.drafted_by_position;
    recent["accepted_by_position"] = drafter.recent.accepted_by_position;
    figures["recent"] = recent;
    drafters[py::str(drafter.name)] = figures;
  }
  d["drafters"] = drafters;
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
      .def_readwrite("conversation", &Request::conversation)
      .def_readwrite("continues", &Request::continues);
}

void bind_engine(py::module_& m) {
  struct Options {
    EngineOptions engine;
    std::vector<std::string> drafters = {"lookup"};
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
  options.def(py::init<>()).def_readwrite("drafters", &Options::drafters);
  add("kv_memory_bytes", &EngineOptions::kv_memory_bytes);
  add("max_sequences", &EngineOptions::max_sequences);
  add("prefill_chunk", &EngineOptions::prefill_chunk);
  add("draft_length", &EngineOptions::draft_length);
  add("max_draft_length", &EngineOptions::max_draft_length);
  add("prefix_cache", &EngineOptions::prefix_cache);
  add("max_queued_tokens", &EngineOptions::max_queued_tokens);
  add("eos_token_ids", &EngineOptions::eos_token_ids);
  add("max_context", &EngineOptions::max_context);

  py::class_<SyntheticDrafts>(m, "SyntheticDrafts", "Recorded plain runs, and how often a draft shall be right.")
      .def(py::init([](std::vector<std::vector<TokenId>> recordings, double acceptance, std::uint64_t seed) {
             return SyntheticDrafts{std::move(recordings), acceptance, seed};
           }),
           py::arg("recordings"), py::arg("acceptance"), py::arg("seed") = 0);

  py::class_<PyEngine>(m, "Engine", "The engine thread and its queues.")
      .def(py::init([](std::shared_ptr<PyModel> model, const Options& o, const TokenTable& token_bytes,
                       std::shared_ptr<PyMtpModel> mtp, const std::optional<SyntheticDrafts>& synthetic) {
             return std::make_unique<PyEngine>(std::move(model), o.engine, o.drafters, token_bytes, std::move(mtp),
                                               synthetic);
           }),
           py::arg("model"), py::arg("options"), py::arg("token_bytes") = py::none(), py::kw_only(),
           py::arg("mtp") = nullptr, py::arg("synthetic") = py::none())
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
      .def("failure", [](PyEngine& e) { return e.engine().failure(); })
      .def("step_seconds", [](PyEngine& e) { return e.engine().step_seconds(); })
      .def("close", &PyEngine::close, py::call_guard<py::gil_scoped_release>());
}

void bind_errors(py::module_& m) {
  static PyObject* request_error = PyErr_NewException("draftwerk._core.RequestError", PyExc_ValueError, nullptr);
  m.attr("RequestError") = py::reinterpret_borrow<py::object>(request_error);
  py::register_exception<QueueFull>(m, "QueueFull", PyExc_RuntimeError);
  py::register_exception<EngineClosed>(m, "EngineClosed", PyExc_RuntimeError);
  py::register_exception<DeviceFailure>(m, "DeviceFailure", PyExc_RuntimeError);
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

/// Dequantises rows of `columns` values stored in `type`, one after the other: the plain form that the kernels are held
/// to.
py::array_t<float> dequantize_tensor(const std::string& type_name, const py::buffer& data, std::int64_t columns,
                                     std::int64_t rows) {
  const WeightType type = parse_weight_type(type_name);
  const py::buffer_info info = data.request();
  const auto bytes = static_cast<std::size_t>(info.size * info.itemsize);
  const std::size_t row_bytes = columns < 0 ? 0 : stored_row_bytes(type, columns);
  if (columns < 0 || rows < 0 || bytes / row_bytes != static_cast<std::size_t>(rows) || bytes % row_bytes != 0) {
    throw std::invalid_argument(std::to_string(bytes) + " bytes do not hold " + std::to_string(rows) + " rows of " +
                                std::to_string(columns) + " values of type " + type_name);
  }
  py::array_t<float> out(static_cast<py::ssize_t>(rows * columns));
  for (std::int64_t r = 0; r < rows; ++r) {
    cpu::dequantize(type, static_cast<const std::byte*>(info.ptr) + static_cast<std::size_t>(r) * row_bytes, columns,
                    out.mutable_data() + r * columns);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "Draftwerk's core: the engine, its model and its queues. The package draftwerk is the interface for people.";
  bind_errors(m);
  bind_models(m);
  bind_requests(m);
  bind_events(m);
  bind_engine(m);
  m.def("dequantize", &dequantize_tensor, py::arg("type"), py::arg("data"), py::arg("columns"), py::arg("rows") = 1);
}

}  // namespace draftwerk
