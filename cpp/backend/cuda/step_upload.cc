#include "backend/cuda/step_upload.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <utility>

#include "backend/round_up.h"

namespace draftwerk::cuda {
namespace {

constexpr std::size_t kAlignment = 256;

constexpr std::size_t aligned(std::size_t bytes) { return round_up(bytes, kAlignment); }

std::size_t pages_of(const Segment& segment) {
  return static_cast<std::size_t>((segment.first_position + segment.rows + kPageSize - 1) / kPageSize);
}

/// Page numbers of all tables.
std::size_t pages_of(const StepRows& rows) {
  std::size_t pages = 0;
  for (const Segment& segment : rows.segments) pages += kPageTables * pages_of(segment);
  return pages;
}

/// The rows that each row of a tree descends from, and itself, in their order.
void fill_paths(const Segment& segment, std::uint8_t* paths) {
  int depth[kMaxPath] = {};
  paths[0] = 0;
  for (int row = 1; row < segment.rows; ++row) {
    const int parent = segment.parents[static_cast<std::size_t>(row - 1)] + 1;
    depth[row] = depth[parent] + 1;
    std::copy_n(paths + parent * kMaxPath, depth[row], paths + row * kMaxPath);
    paths[row * kMaxPath + depth[row]] = static_cast<std::uint8_t>(row);
  }
}

}  // namespace

int padded_count(int count) {
  if (count <= 2) return count;
  if (count <= 4) return 4;
  return round_up(count, count <= 32 ? 8 : count <= 128 ? 32 : count <= 256 ? 64 : 128);
}

void StepUpload::reserve(int max_rows, int max_outputs) {
  max_rows_ = std::max(max_rows_, padded_count(max_rows));
  max_outputs_ = std::max(max_outputs_, padded_count(max_outputs));
}

template <typename T>
T* StepUpload::place(std::size_t count, T*& on_host) {
  on_host = reinterpret_cast<T*>(host() + used_);
  auto* on_device = reinterpret_cast<T*>(static_cast<std::byte*>(device_.get()) + used_);
  used_ += aligned(count * sizeof(T));
  return on_device;
}

std::size_t StepUpload::room_for(std::size_t pages) const {
  const auto max_rows = static_cast<std::size_t>(max_rows_);
  return 3 * aligned(max_rows * 4) + aligned(max_rows * sizeof(StepSegment)) + aligned(max_rows * sizeof(StepGrowth)) +
         aligned(max_rows * kMaxPath) + aligned(static_cast<std::size_t>(max_outputs_) * 4) +
         aligned(kRowLists * max_rows * 4) + aligned(pages * sizeof(PageId));
}

bool StepUpload::has_room(const StepRows& rows) const {
  return pages_of(rows) <= page_capacity_ && room_for(page_capacity_) <= device_.bytes();
}

void StepUpload::fill(const StepRows& rows, KvArena arena, FoundDrafts found) {
  const std::size_t pages = pages_of(rows);
  const std::size_t capacity = std::bit_ceil(std::max<std::size_t>({pages, page_capacity_, 1024}));
  if (const std::size_t room = room_for(capacity); room > device_.bytes()) {
    std::array<PinnedMemory, 2> host = {PinnedMemory::of(room), PinnedMemory::of(room)};  // first: there may be none
    device_.reserve(room);
    host_ = std::move(host);
  }
  page_capacity_ = capacity;
  turn_ = 1 - turn_;

  const auto count = static_cast<int>(rows.tokens.size());
  const auto outputs = static_cast<int>(rows.output_rows.size());
  const int segments_padded = std::min(padded_count(static_cast<int>(rows.segments.size())), max_rows_);
  view_.rows = std::min(padded_count(count), max_rows_);
  view_.outputs = std::min(padded_count(outputs), max_outputs_);
  // Of nothing are there more than rows. So addresses follow from their number, as launches do, and little is copied
  // for few of them.
  const auto room = static_cast<std::size_t>(view_.rows);
  used_ = 0;
  std::int32_t* tokens = nullptr;
  std::int32_t* positions = nullptr;
  std::int32_t* row_segment = nullptr;
  std::int32_t* output_rows = nullptr;
  StepSegment* segments = nullptr;
  StepGrowth* growths = nullptr;
  std::uint8_t* paths = nullptr;
  PageId* tables = nullptr;
  view_.tokens = growing_.tokens = place(room, tokens);
  view_.positions = growing_.positions = place(room, positions);
  view_.row_segment = place(room, row_segment);
  view_.output_rows = place(std::min(room, static_cast<std::size_t>(max_outputs_)), output_rows);
  view_.segments = place(room, segments);
  growing_.growths = place(room, growths);
  view_.paths = growing_.paths = place(room * kMaxPath, paths);
  lists_on_device_ = place(kRowLists * room, lists_on_host_);
  row_lists_ = collected_row_lists_ = 0;
  collected_ = false;
  view_.pages = place(pages, tables);  // last: only what is used is copied
  view_.arena = arena.base;

  std::fill_n(tokens, view_.rows, 0);
  std::fill_n(positions, view_.rows, 0);
  std::fill_n(row_segment, view_.rows, -1);
  std::fill_n(output_rows, view_.outputs, 0);
  std::fill_n(segments, segments_padded, StepSegment{count, 0, 0, {}, 0, 0});
  for (int row = 0; row < count; ++row) {
    const auto at = static_cast<std::size_t>(row);
    tokens[row] = rows.tokens[at];
    positions[row] = static_cast<std::int32_t>(rows.positions[at]);
  }
  std::copy(rows.output_rows.begin(), rows.output_rows.end(), output_rows);
  std::int64_t longest = 1;
  std::size_t page = 0;
  for (std::size_t s = 0; s < rows.segments.size(); ++s) {
    const Segment& segment = rows.segments[s];
    StepSegment& its = segments[s];
    its = {segment.first_row, segment.rows, static_cast<std::int32_t>(segment.first_position), {}, 0, 0};
    std::fill_n(row_segment + segment.first_row, segment.rows, static_cast<std::int32_t>(s));
    for (int table = 0; table < kPageTables; ++table) {
      its.pages[table] = static_cast<std::int32_t>(page);
      const std::size_t held = pages_of(segment);
      if (segment.pages[table] == nullptr) {
        std::fill_n(tables + page, held, kNoPage);
      } else {
        std::copy_n(segment.pages[table], held, tables + page);
      }
      page += held;
    }
    if (!segment.parents.empty()) {
      its.tree = 1;
      fill_paths(segment, paths + static_cast<std::size_t>(segment.first_row) * kMaxPath);
    }
    longest = std::max(longest, segment.first_position + segment.rows);
  }
  growths_ = std::min(padded_count(static_cast<int>(rows.growths.size())), max_rows_);
  std::fill_n(growths, growths_, StepGrowth{});
  for (std::size_t g = 0; g < rows.growths.size(); ++g) {
    const Growth& growth = rows.growths[g];
    StepSegment& its = segments[growth.segment];
    its.grown = 1;
    growths[g] = {its.first_row, its.rows - 1, its.first_position, growth.proposed, found.passes, found.outputs};
  }
  view_.segment_count = segments_padded;
  view_.context = static_cast<std::int32_t>(std::bit_ceil(static_cast<std::uint64_t>(longest)));
}

void StepUpload::collect(std::vector<Copy>& in) {
  if (!collected_) {
    in.push_back({device_.get(), host(), used_});
  } else if (collected_row_lists_ < row_lists_) {
    const std::ptrdiff_t first = std::ptrdiff_t{collected_row_lists_} * view_.rows;
    const auto count =
        static_cast<std::size_t>(row_lists_ - collected_row_lists_) * static_cast<std::size_t>(view_.rows);
    in.push_back({lists_on_device_ + first, lists_on_host_ + first, count * sizeof(std::int32_t)});
  }
  collected_ = true;
  collected_row_lists_ = row_lists_;
}

const std::int32_t* StepUpload::add_rows(std::span<const int> rows, int padded) {
  if (padded > view_.rows || rows.size() > static_cast<std::size_t>(padded)) {
    throw std::logic_error("cuda backend: a longer list of rows than there is room for");
  }
  const std::ptrdiff_t last = std::ptrdiff_t{row_lists_ - 1} * view_.rows;
  if (row_lists_ > 0 && padded == last_list_padded_ && rows.size() == last_list_rows_ &&
      std::equal(rows.begin(), rows.end(), lists_on_host_ + last)) {
    return lists_on_device_ + last;
  }
  if (row_lists_ == kRowLists) {
    throw std::logic_error("cuda backend: more lists of rows in a step than there is room for");
  }
  last_list_padded_ = padded;
  last_list_rows_ = rows.size();
  const std::ptrdiff_t first = std::ptrdiff_t{row_lists_++} * view_.rows;
  std::fill_n(lists_on_host_ + first, padded, 0);
  std::copy(rows.begin(), rows.end(), lists_on_host_ + first);
  return lists_on_device_ + first;
}

}  // namespace draftwerk::cuda
