#include "engine/stop.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace draftwerk {

TokenBytes::TokenBytes(std::vector<std::uint32_t> offsets, std::string blob)
    : offsets_(std::move(offsets)), blob_(std::move(blob)) {
  if (offsets_.empty() || offsets_.front() != 0 || offsets_.back() != blob_.size() ||
      !std::is_sorted(offsets_.begin(), offsets_.end())) {
    throw std::invalid_argument("token bytes: offsets must ascend from 0 to the " + std::to_string(blob_.size()) +
                                " bytes of the blob");
  }
}

std::string_view TokenBytes::operator[](TokenId token) const {
  const auto index = static_cast<std::size_t>(token);
  if (token < 0 || index + 1 >= offsets_.size()) return {};
  return std::string_view(blob_).substr(offsets_[index], offsets_[index + 1] - offsets_[index]);
}

StopStringMatcher::StopStringMatcher(std::vector<std::string> strings) : strings_(std::move(strings)) {
  for (const std::string& string : strings_) longest_ = std::max(longest_, string.size());
}

std::optional<std::int64_t> StopStringMatcher::push(std::string_view bytes, bool armed) {
  if (longest_ == 0) return std::nullopt;
  const std::size_t old = tail_.size();
  tail_ += bytes;
  std::size_t first = std::string::npos;
  for (const std::string& string : strings_) {
    // Only matches that end in the new bytes: earlier ones were either reported or not armed.
    const std::size_t from = old + 1 > string.size() ? old + 1 - string.size() : 0;
    first = std::min(first, tail_.find(string, from));
  }
  if (armed && first != std::string::npos) return bytes_before_tail_ + static_cast<std::int64_t>(first);
  if (tail_.size() >= longest_) {
    const std::size_t drop = tail_.size() - (longest_ - 1);
    tail_.erase(0, drop);
    bytes_before_tail_ += static_cast<std::int64_t>(drop);
  }
  return std::nullopt;
}

}  // namespace draftwerk
