// What every backend checks before it works with what it is given. What a user can cause (shapes and types of weights)
// is std::invalid_argument; a broken call by our own code is std::logic_error, which names the `backend`.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"

namespace draftwerk {

/// A matrix of this shape can be stored in `type`, with at most `most` rows and columns; `what` names it.
void check_shape(const char* what, WeightType type, std::int64_t rows, std::int64_t columns, std::int64_t most);
/// See Backend::upload_rows.
void check_upload(const Weight& weight, std::int64_t first_row, std::int64_t count, WeightType source_type);

/// See Backend::reserve; `reserved_vocabulary` is that of the calls before, 0 if there was none. std::invalid_argument.
void check_sizes(const char* backend, int max_rows, int max_outputs, int max_columns, int vocabulary,
                 int reserved_vocabulary);
/// See Backend::reserve_experts. std::invalid_argument.
void check_experts(const char* backend, int max_rows, int chosen, const Experts& experts);

/// A step within what is reserved, whose segments cover its rows, chains or trees.
void check_step(const char* backend, const StepRows& step, int max_rows, int max_outputs);
/// Groups whose drafts are chains or trees.
void check_groups(const char* backend, std::span<const VerifyGroup> groups);

}  // namespace draftwerk
