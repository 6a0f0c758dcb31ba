#include "backend/backend_checks.h"

#include <cstddef>
#include <stdexcept>
#include <string>

namespace draftwerk {
namespace {

constexpr int kRowGroup = 16;  // that weights are uploaded in

void require(bool condition, const char* backend, const char* what) {
  if (!condition) throw std::logic_error(std::string(backend) + ": " + what);
}

/// Parents of drafts, as of Segment and VerifyGroup: each an earlier draft or -1.
bool is_tree(std::span<const std::int32_t> parents) {
  for (std::size_t i = 0; i < parents.size(); ++i) {
    if (parents[i] < -1 || parents[i] >= static_cast<std::int64_t>(i)) return false;
  }
  return true;
}

bool is_tree_of(const Segment& segment, std::span<const std::int64_t> positions) {
  if (segment.parents.size() + 1 != static_cast<std::size_t>(segment.rows) || !is_tree(segment.parents)) return false;
  const auto own = positions.subspan(static_cast<std::size_t>(segment.first_row));
  if (own[0] != segment.first_position) return false;
  for (std::size_t i = 0; i < segment.parents.size(); ++i) {
    if (own[i + 1] != own[static_cast<std::size_t>(segment.parents[i] + 1)] + 1) return false;
  }
  return true;
}

}  // namespace

void check_shape(const char* what, WeightType type, std::int64_t rows, std::int64_t columns, std::int64_t most) {
  if (rows > 0 && columns > 0 && rows <= most && columns <= most && columns % block_columns(type) == 0) return;
  throw std::invalid_argument(std::string(what) + " [" + std::to_string(rows) + ", " + std::to_string(columns) +
                              "] of type " + weight_type_name(type) +
                              ": rows and columns must be positive, columns a multiple of " +
                              std::to_string(block_columns(type)));
}

void check_upload(const Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type) {
  const std::int64_t rows = weight.rows();
  const bool whole_groups = first_row % kRowGroup == 0 && (count % kRowGroup == 0 || first_row + count == rows);
  if (first_row < 0 || count < 0 || first_row > rows - count || !whole_groups) {
    throw std::invalid_argument("rows " + std::to_string(first_row) + " .. " + std::to_string(first_row + count) +
                                " of " + std::to_string(rows) + ": not whole groups of 16");
  }
  const WeightType type = weight.type();
  const bool converts = is_float(source_type) && (type == WeightType::q8_0 || type == WeightType::q4_0 ||
                                                  type == WeightType::f8_e4m3 || is_float(type));
  if (source_type != type && !converts) {
    throw std::invalid_argument(std::string("rows of type ") + weight_type_name(source_type) +
                                " for a weight of type " + weight_type_name(type));
  }
}

void check_sizes(const char* backend, int max_rows, int max_outputs, int max_columns, int vocabulary,
                 int reserved_vocabulary) {
  if (max_rows < 1 || max_outputs < 1 || max_columns < 1 || vocabulary < 1) {
    throw std::invalid_argument(std::string(backend) + ": a step needs at least one row, output, column and token");
  }
  if (reserved_vocabulary != 0 && vocabulary != reserved_vocabulary) {
    throw std::invalid_argument(std::string(backend) + ": a vocabulary of " + std::to_string(vocabulary) +
                                " beside one of " + std::to_string(reserved_vocabulary));
  }
}

void check_experts(const char* backend, int max_rows, int chosen, const Experts& experts) {
  if (max_rows >= 1 && chosen >= 1 && chosen <= experts.count) return;
  throw std::invalid_argument(std::string(backend) + ": " + std::to_string(chosen) + " of " +
                              std::to_string(experts.count) + " experts for " + std::to_string(max_rows) + " rows");
}

void check_step(const char* backend, const StepRows& step, int max_rows, int max_outputs) {
  require(step.tokens.size() <= static_cast<std::size_t>(max_rows), backend, "more rows than reserved");
  require(step.output_rows.size() <= static_cast<std::size_t>(max_outputs), backend, "more outputs than reserved");
  require(step.positions.size() == step.tokens.size(), backend, "a position for every row");
  const auto rows = static_cast<int>(step.tokens.size());
  int row = 0;
  for (const Segment& segment : step.segments) {
    require(segment.first_row == row && segment.rows > 0 && segment.rows <= rows - row, backend,
            "segments that cover the rows in order");
    require(segment.parents.empty() || is_tree_of(segment, step.positions), backend,
            "a tree behind the segment's first row");
    row += segment.rows;
  }
  require(row == rows, backend, "segments that cover all rows");
  for (const Growth& growth : step.growths) {
    require(growth.segment >= 0 && growth.segment < static_cast<int>(step.segments.size()) && growth.proposed >= 0,
            backend, "trees that grow in segments of the step");
    require(!step.segments[static_cast<std::size_t>(growth.segment)].parents.empty(), backend,
            "drafts where a tree grows");
  }
}

void check_groups(const char* backend, std::span<const VerifyGroup> groups) {
  for (const VerifyGroup& group : groups) {
    require(group.parents.empty() || (group.parents.size() == group.drafts.size() && is_tree(group.parents)), backend,
            "a tree of drafts");
  }
}

}  // namespace draftwerk
