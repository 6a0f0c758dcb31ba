// Events as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "engine/request.h"

namespace draftwerk {

/// Makes the type Event and adds it to the module.
void bind_events(pybind11::module_& m);
/// The events as a list. Everything is converted here, once; what is asked for of an Event then exists.
pybind11::list to_python(const std::vector<Event>& events);

}  // namespace draftwerk
