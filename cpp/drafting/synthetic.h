// A drafter for benchmarks whose drafts are right as often as one sets, so that speed can be shown over acceptance.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "drafting/drafter.h"

namespace draftwerk {

/// Knows what the target will say from recordings of plain runs, each a prompt and its output: a sequence follows the
/// recording that begins with its tokens, and gets drafts up to that one's end; without such a recording it gets none.
/// The draft for absolute position t is the recorded token with probability `acceptance` and any other token
/// otherwise, decided by the seed and t alone: neither how many drafts are asked for nor what was accepted before
/// plays a part, so that a run repeats itself, and all sequences are right and wrong at the same positions.
///
/// `costing`, which may be null, is a drafter that is run for the time it takes, and for how many drafts it offers;
/// its proposals are replaced. The confidence class is kModelConfidence. `vocabulary` >= 2.
/// Holds the recordings once, and per sequence a few words beside what `costing` keeps.
std::unique_ptr<Drafter> make_synthetic_drafter(std::vector<std::vector<TokenId>> recordings, double acceptance,
                                                std::uint64_t seed, int vocabulary, std::unique_ptr<Drafter> costing);

}  // namespace draftwerk
