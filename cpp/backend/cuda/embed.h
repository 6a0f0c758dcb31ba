// Rows of an embedding matrix for the tokens of a step.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/step.h"

namespace draftwerk::cuda {

/// out[r] = table[tokens[r]] * scale for all rows of the step. `table` is a DeviceWeight.
void embed(LaunchList& launches, const StepView& step, const Weight& table, float scale, Tensor out);

}  // namespace draftwerk::cuda
