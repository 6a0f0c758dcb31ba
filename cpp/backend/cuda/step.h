// What kernels know of a step: arrays on the device, filled by a copy when it begins. They lie at the same addresses
// in every step, and rows are padded to one of a few counts, so that steps of equal shape are the same launches.
#pragma once

#include <cstdint>

#include "backend/backend.h"

namespace draftwerk::cuda {

/// Room for the rows that a row of a tree descends from, and itself.
inline constexpr int kMaxPath = 80;

/// Rows of one sequence, as Segment has them.
struct StepSegment {
  std::int32_t first_row;
  std::int32_t rows;
  std::int32_t first_position;
  std::int32_t pages[kPageTables];  ///< where its page tables begin in StepView::pages
  std::int32_t tree = 0;            ///< whether StepView::paths has its rows
  std::int32_t grown = 0;           ///< whether the device finds out what its drafts are
};

/// A tree of drafts that the device grows (Growth).
struct StepGrowth {
  std::int32_t first_row;       ///< of the last known token; those of the drafts follow
  std::int32_t drafts;          ///< 0: it is there for padding
  std::int32_t first_position;  ///< of first_row
  std::int32_t proposed;        ///< output row of the step before
  std::int32_t passes;          ///< of that step
  std::int32_t outputs;         ///< likewise, with padding
};

/// A step. Positions fit 32 bits.
struct StepView {
  const std::int32_t* tokens;       ///< [rows]
  const std::int32_t* positions;    ///< [rows]
  const std::int32_t* row_segment;  ///< [rows]; -1: the row is there for padding. It stores nothing in the KV cache and
                                    ///< what it computes is for nobody, but must be computed without harm
  const std::int32_t* output_rows;  ///< [outputs], ascending; padding repeats row 0
  const StepSegment* segments;      ///< [segments]
  const PageId* pages;              ///< page tables of all segments
  const std::uint8_t* paths;        ///< [rows, kMaxPath]; of rows of trees: for i from 0 to (position of the row -
                                    ///< first_position of its segment), the row of its segment that it descends from
                                    ///< (or is) at position first_position + i: that one's K/V slot is first_position +
                                    ///< that row
  std::byte* arena;                 ///< the KV cache
  std::int32_t rows;                ///< with padding
  std::int32_t outputs;             ///< with padding
  std::int32_t segment_count;       ///< with padding, behind all others: no rows, and first_row is the number of those
                                    ///< before
  std::int32_t context;             ///< all positions are below; a power of two
};

}  // namespace draftwerk::cuda
