// The lookup drafter: what followed the last time the sequence said this.
//
// Prompt lookup decoding (A. Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding) with the longest
// suffix match in place of a fixed n-gram, as in suffix-automaton and suffix-tree drafters (Hu et al., "SAM Decoding",
// arXiv:2411.10666; Oliaro et al., "SuffixDecoding", arXiv:2411.04975).
#pragma once

#include <memory>

#include "drafting/drafter.h"

namespace draftwerk {

/// The shortest suffix whose earlier occurrence is worth a draft.
inline constexpr int kLookupShortestMatch = 2;
/// Matches are told apart up to this length; longer ones count as this long.
inline constexpr int kLookupLongestMatch = 32;
/// Occurrences that are compared with the end of the sequence, the most recent ones first.
inline constexpr int kLookupCandidates = 64;

/// Proposes the tokens that followed an earlier occurrence of the sequence's longest recurring suffix, the most recent
/// such occurrence; where the copy runs into the end of the sequence it goes on from the copy itself, which extends a
/// repetition with its period. Let m be the length of the longest recurring suffix and n the largest of 2, 4, 8, 16
/// with n <= m: the occurrence is chosen among the kLookupCandidates most recent ones of the last n tokens, so that
/// one call takes bounded time (a few microseconds) at any sequence length.
///
/// The confidence class is the length of the match: 2, 3, 4, 5-6, 7-9, 10-15, 16-31, 32 and more.
/// Takes 48 to 80 bytes per token of the sequence.
std::unique_ptr<Drafter> make_lookup_drafter();

}  // namespace draftwerk
