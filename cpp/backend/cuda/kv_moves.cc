#include "backend/cuda/kv_moves.h"

#include <algorithm>
#include <cstring>

#include "backend/round_up.h"

namespace draftwerk::cuda {
namespace {

constexpr std::size_t kAlignment = 16;

bool of_one_sequence(const KvMove& a, const KvMove& b) {
  return std::equal(std::begin(a.pages), std::end(a.pages), std::begin(b.pages));
}

bool equal(const KvMove& a, const KvMove& b) { return of_one_sequence(a, b) && a.from == b.from && a.to == b.to; }

}  // namespace

void KvMoves::run(const KvLayer& kv, std::span<const KvMove> moves, KvArena arena, cudaStream_t stream) {
  if (moves.empty()) return;
  if (!std::equal(moves.begin(), moves.end(), latest_.begin(), latest_.end(), equal)) {
    if (!latest_.empty()) check(cudaStreamSynchronize(stream), "moving keys and values");
    stage(moves, arena, stream);
  }
  launches_.clear();
  move_kv(launches_, view_, kv);
  launches_.run(stream);
}

void KvMoves::stage(std::span<const KvMove> moves, KvArena arena, cudaStream_t stream) {
  std::vector<PositionMove> positions;
  std::vector<SequenceMoves> sequences;
  std::vector<PageId> pages;
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
  const std::size_t of_positions = round_up(positions.size() * sizeof(PositionMove), kAlignment);
  const std::size_t of_sequences = round_up(sequences.size() * sizeof(SequenceMoves), kAlignment);
  const std::size_t bytes = of_positions + of_sequences + pages.size() * sizeof(PageId);
  memory_.reserve_more(std::max<std::size_t>(bytes, 16384));
  std::byte* const host = memory_.host();
  std::memcpy(host, positions.data(), positions.size() * sizeof(PositionMove));
  std::memcpy(host + of_positions, sequences.data(), sequences.size() * sizeof(SequenceMoves));
  std::memcpy(host + of_positions + of_sequences, pages.data(), pages.size() * sizeof(PageId));
  const std::byte* const device = memory_.device();
  view_.moves = reinterpret_cast<const PositionMove*>(device);
  view_.sequences = reinterpret_cast<const SequenceMoves*>(device + of_positions);
  view_.pages = reinterpret_cast<const PageId*>(device + of_positions + of_sequences);
  view_.arena = arena.base;
  view_.sequence_count = static_cast<std::int64_t>(sequences.size());
  check(cudaMemcpyAsync(memory_.device(), host, bytes, cudaMemcpyHostToDevice, stream), "copying moves");
  latest_.assign(moves.begin(), moves.end());
}

}  // namespace draftwerk::cuda
