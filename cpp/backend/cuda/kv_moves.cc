#include "backend/cuda/kv_moves.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "backend/round_up.h"

namespace draftwerk::cuda {
namespace {

constexpr std::size_t kAlignment = 16;

bool of_one_sequence(const KvMove& a, const KvMove& b) {
  return std::equal(std::begin(a.pages), std::end(a.pages), std::begin(b.pages));
}

/// Arrays that lie behind each other, on the host and on the device.
class Arrays {
 public:
  Arrays(std::byte* host, const std::byte* device) : host_(host), device_(device) {}

  /// Where a copy of `values` will be on the device.
  template <typename T>
  const T* add(const std::vector<T>& values) {
    std::memcpy(host_ + bytes_, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<const T*>(device_ + std::exchange(bytes_, bytes_ + room(values)));
  }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

  template <typename T>
  static std::size_t room(const std::vector<T>& values) {
    return round_up(values.size() * sizeof(T), kAlignment);
  }

 private:
  std::byte* host_;
  const std::byte* device_;
  std::size_t bytes_ = 0;
};

}  // namespace

void KvMoves::run(std::span<const KvLayer> layers, std::span<const KvMove> moves, KvArena arena, cudaStream_t stream) {
  if (moves.empty() || layers.empty()) return;
  if (enqueued_) check(cudaStreamSynchronize(stream), "moving keys and values");
  enqueued_ = true;
  launches_.clear();
  cuda::move_kv(launches_, stage(layers, moves, arena, stream));
  launches_.run(stream);
}

MoveView KvMoves::stage(std::span<const KvLayer> layers, std::span<const KvMove> moves, KvArena arena,
                        cudaStream_t stream) {
  std::vector<MovedLayer> moved;
  std::vector<PositionMove> positions;
  std::vector<SequenceMoves> sequences;
  std::vector<PageId> pages;
  MoveView view{};
  for (const KvLayer& kv : layers) {
    moved.push_back(moved_layer(kv));
    view.most_components = std::max(view.most_components, moved.back().components);
  }
  for (std::size_t first = 0, next = 0; first < moves.size(); first = next) {
    std::int64_t farthest = 0;
    for (; next < moves.size() && of_one_sequence(moves[first], moves[next]); ++next) {
      positions.push_back({static_cast<std::int32_t>(moves[next].from), static_cast<std::int32_t>(moves[next].to)});
      farthest = std::max({farthest, moves[next].from, moves[next].to});
    }
    SequenceMoves its{static_cast<std::int32_t>(first), static_cast<std::int32_t>(next - first), {}};
    const auto held = static_cast<std::size_t>(farthest / kPageSize + 1);
    for (int table = 0; table < kPageTables; ++table) {
      its.pages[table] = static_cast<std::int32_t>(pages.size());
      const PageId* table_pages = moves[first].pages[table];
      for (std::size_t i = 0; i < held; ++i) pages.push_back(table_pages == nullptr ? kNoPage : table_pages[i]);
    }
    sequences.push_back(its);
  }
  const std::size_t bytes =
      Arrays::room(moved) + Arrays::room(positions) + Arrays::room(sequences) + Arrays::room(pages);
  memory_.reserve_more(std::max<std::size_t>(bytes, 16384));
  Arrays arrays(memory_.host(), memory_.device());
  view.layers = arrays.add(moved);
  view.moves = arrays.add(positions);
  view.sequences = arrays.add(sequences);
  view.pages = arrays.add(pages);
  view.arena = arena.base;
  view.layer_count = static_cast<std::int32_t>(moved.size());
  view.sequence_count = static_cast<std::int32_t>(sequences.size());
  check(cudaMemcpyAsync(memory_.device(), memory_.host(), arrays.bytes(), cudaMemcpyHostToDevice, stream),
        "copying moves");
  return view;
}

}  // namespace draftwerk::cuda
