#include "bindings/events.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>

namespace py = pybind11;

namespace draftwerk {
namespace {

// A struct sequence (a named tuple made in C): reading a field of it takes 0.05 us, a property of a bound class 0.13 us
// and the conversion of its value, and each event of each stream is read in every step.
enum Field : std::uint8_t {
  kRequestId,
  kTokenIds,
  kDrafted,
  kLogprobs,
  kTopLogprobs,
  kPosition,
  kFinishReason,
  kError,
  kTextBytes,
  kStats,
  kFields
};

// Live as long as the process, as the module does.
PyTypeObject* event_type = nullptr;
std::array<PyObject*, static_cast<std::size_t>(FinishReason::error) + 1> finish_reasons{};  // by FinishReason

py::dict to_dict(const RequestStatistics& s) {
  py::dict d;
  d["prompt_tokens"] = s.prompt_tokens;
  d["cached_tokens"] = s.cached_tokens;
  d["generated_tokens"] = s.generated_tokens;
  d["steps"] = s.steps;
  d["drafted"] = s.drafted;
  d["accepted"] = s.accepted;
  d["preemptions"] = s.preemptions;
  d["drafted_by_position"] = s.drafted_by_position;
  d["accepted_by_position"] = s.accepted_by_position;
  d["queue_time"] = s.queue_seconds;
  d["time_to_first_token"] = s.time_to_first_token_seconds;
  d["decode_time"] = s.decode_seconds;
  return d;
}

template <typename Items, typename Convert>
py::tuple to_tuple(const Items& items, const Convert& convert) {
  py::tuple tuple(items.size());
  Py_ssize_t i = 0;
  for (const auto& item : items) PyTuple_SET_ITEM(tuple.ptr(), i++, py::object(convert(item)).release().ptr());
  return tuple;
}

py::object to_python(const Event& event) {
  const auto object = py::reinterpret_steal<py::object>(PyStructSequence_New(event_type));
  if (!object) throw py::error_already_set();
  const auto set = [&](Field field, py::object value) {
    PyStructSequence_SetItem(object.ptr(), field, value.release().ptr());
  };
  set(kRequestId, py::int_(event.request_id));
  set(kTokenIds, to_tuple(event.token_ids, [](TokenId token) { return py::int_(token); }));
  set(kDrafted, to_tuple(event.drafted, [](bool drafted) { return py::bool_(drafted); }));
  set(kLogprobs, to_tuple(event.logprobs, [](float logprob) { return py::float_(logprob); }));
  set(kTopLogprobs, to_tuple(event.top_logprobs, [](const std::vector<TokenLogprob>& row) {
        return to_tuple(row, [](const TokenLogprob& entry) { return py::make_tuple(entry.token, entry.logprob); });
      }));
  set(kPosition, py::int_(event.position));
  const auto reason = static_cast<std::size_t>(event.finish_reason);
  set(kFinishReason, py::reinterpret_borrow<py::object>(finish_reasons[reason]));
  set(kError, py::str(event.error));
  set(kTextBytes, py::int_(event.text_bytes));
  set(kStats, event.statistics ? to_dict(*event.statistics) : py::dict());
  return object;
}

}  // namespace

void bind_events(py::module_& m) {
  static PyStructSequence_Field fields[] = {
      {"request_id", nullptr},   {"token_ids", nullptr}, {"drafted", nullptr},       {"logprobs", nullptr},
      {"top_logprobs", nullptr}, {"position", nullptr},  {"finish_reason", nullptr}, {"error", nullptr},
      {"text_bytes", nullptr},   {"stats", nullptr},     {nullptr, nullptr}};
  static PyStructSequence_Desc description = {"draftwerk._core.Event",
                                              "New tokens of one request in one step, or its end.", fields, kFields};
  event_type = PyStructSequence_NewType(&description);
  if (event_type == nullptr) throw py::error_already_set();
  m.attr("Event") = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(event_type));
  for (std::size_t i = 0; i < finish_reasons.size(); ++i) {
    finish_reasons[i] = py::str(finish_reason_name(static_cast<FinishReason>(i))).release().ptr();
  }
}

py::list to_python(const std::vector<Event>& events) {
  py::list list(events.size());
  Py_ssize_t i = 0;
  for (const Event& event : events) PyList_SET_ITEM(list.ptr(), i++, to_python(event).release().ptr());
  return list;
}

}  // namespace draftwerk
