// Trees of drafts that grow on the device (draftwerk::Growth), so that the target's pass may follow the drafter's
// without waiting for the host.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/sampler_kernels.h"
#include "backend/cuda/step_upload.h"

namespace draftwerk::cuda {

/// Chooses the drafts of the step's trees from `proposed` [passes, outputs], which the rows `proposing` [outputs] were
/// chosen by, and writes their tokens, positions and paths. In front of everything that reads those.
void grow_trees(LaunchList& list, const StepUpload& step, const ProposedRow* proposed, const SampledRow* proposing);

/// Tells the rows by which a step chooses, [outputs], what its trees have become. In front of the choice.
void tell_rows(LaunchList& list, const StepView& step, SampledRow* rows);

}  // namespace draftwerk::cuda
