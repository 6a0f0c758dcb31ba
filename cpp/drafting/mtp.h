// The MTP drafter: drafts with a small model that reads the target's hidden state and K/V (model/mtp.h).
#pragma once

#include <memory>

#include "drafting/drafter.h"
#include "model/mtp.h"

namespace draftwerk {

/// Drafts for sequences whose target_row is known, all sequences of a step together: one pass of the model for each
/// depth of their trees (draft_tree.h), over the drafts that are worth following up. A draft is chosen as the target
/// will choose its token, by the same parameters and with the noise of its position, which makes the two agree as often
/// as can be without knowing each other (drafter-invariant speculative sampling, Daliri et al., arXiv:2408.07978).
/// `model` must outlive the drafter, and is used by nobody else meanwhile.
std::unique_ptr<Drafter> make_mtp_drafter(MtpModel& model);

}  // namespace draftwerk
