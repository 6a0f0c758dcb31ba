// A drafter that guesses blindly. It is of no use but one: to show that drafts never change a token.
#pragma once

#include <memory>

#include "drafting/drafter.h"

namespace draftwerk {

/// Proposes pseudo-random tokens, as many as are asked for: in even shares tokens of the whole vocabulary, nearly
/// always rejected, and tokens of the sequence so far, which are now and then accepted. They form a tree: each follows
/// the draft before it, or in a third of the cases any earlier one. A draft is a function of the sequence's tokens, its
/// seed and its place alone. `vocabulary` >= 1.
std::unique_ptr<Drafter> make_random_drafter(int vocabulary);

}  // namespace draftwerk
