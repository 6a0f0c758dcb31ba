#include "backend/cpu/attention.h"

#include <algorithm>
#include <cstddef>

namespace draftwerk::cpu {
namespace {

// Query tiles per thread from which on attention is divided by tiles alone, without splitting their contexts.
constexpr std::int64_t kTilesPerThread = 4;
// Partial results of split contexts that scratch holds; longer contexts proceed in several waves.
constexpr std::int64_t kPartialsPerThread = 64;
// Slots of a row that there is room for from the start; deeper trees take more.
constexpr std::size_t kSlotsPerRow = 8;

}  // namespace

Attention::Attention(const LayerKernels& kernels, WorkerPool& pool, int max_rows) : kernels_(kernels), pool_(pool) {
  const std::int64_t threads = pool_.size();
  worker_states_.resize(2 * threads);
  tile_states_.resize(kTilesPerThread * threads);
  partials_.resize(kPartialsPerThread * threads);
  split_tiles_.resize(static_cast<std::size_t>(kTilesPerThread * threads));
  split_begin_.resize(split_tiles_.size() + 1);
  segment_tile_.resize(static_cast<std::size_t>(max_rows) + 1);
  segment_tail_.resize(static_cast<std::size_t>(max_rows));
  row_slots_.resize(static_cast<std::size_t>(max_rows));
  slots_.reserve(static_cast<std::size_t>(max_rows) * kSlotsPerRow);
}

void Attention::begin(const StepRows& step) {
  slots_.clear();
  for (std::size_t s = 0; s < step.segments.size(); ++s) segment_tail_[s] = place_tree(step, step.segments[s]);
}

/// Where the paths of a segment part: the first position that is not everywhere the slot of the same number. Lists the
/// slots from there on for each row.
std::int64_t Attention::place_tree(const StepRows& step, const Segment& segment) {
  if (segment.parents.empty()) return kNoTail;
  const auto parent = [&segment](int row) { return segment.parents[static_cast<std::size_t>(row) - 1] + 1; };
  // The rows before `trunk` are a chain, and all others descend from its last.
  int trunk = 1;
  while (trunk < segment.rows && parent(trunk) == trunk - 1) ++trunk;
  for (int row = trunk; row < segment.rows; ++row) trunk = std::min(trunk, parent(row) + 1);
  if (trunk == segment.rows) return kNoTail;
  const std::int64_t tail = segment.first_position + trunk;
  for (int row = trunk; row < segment.rows; ++row) {
    const auto index = static_cast<std::size_t>(segment.first_row + row);
    row_slots_[index] = slots_.size();
    const std::int64_t before = step.positions[index] - tail;
    const std::size_t path = row_slots_[static_cast<std::size_t>(segment.first_row + parent(row))];
    for (std::int64_t i = 0; i < before; ++i) slots_.push_back(slots_[path + static_cast<std::size_t>(i)]);
    slots_.push_back(segment.first_position + row);
  }
  return tail;
}

/// Tile number `index`: tiles run over segments, within a segment over key/value heads, within a head over its queries
/// (row-major: all query heads of a row that share the head, then the next row).
Attention::TilePlace Attention::place_tile(const AttentionCall& call, const StepRows& step, KvArena arena,
                                           std::int64_t index) const {
  const KvLayer& kv = *call.kv;
  const int group = call.query_heads / kv.heads;
  const auto first_tile = segment_tile_.begin();
  const auto after =
      std::upper_bound(first_tile, first_tile + static_cast<std::ptrdiff_t>(step.segments.size()), index / kv.heads);
  const std::ptrdiff_t s = after - first_tile - 1;
  const Segment& segment = step.segments[static_cast<std::size_t>(s)];
  const std::int64_t tiles =
      segment_tile_[static_cast<std::size_t>(s) + 1] - segment_tile_[static_cast<std::size_t>(s)];
  const std::int64_t local = index - segment_tile_[static_cast<std::size_t>(s)] * kv.heads;
  const std::int64_t kv_head = local / tiles;
  const std::int64_t first_query = local % tiles * kQueryTile;

  TilePlace place;
  const std::size_t head_bytes = kv_head_bytes(kv.head_dim, kv.type);
  place.kv = {arena.base,
              segment.pages[kv.table],
              kv.key_offset + static_cast<std::size_t>(kv_head) * head_bytes,
              kv.value_offset + static_cast<std::size_t>(kv_head) * head_bytes,
              kv.head_dim,
              kv.type};
  QueryTile& tile = place.tile;
  tile.count = static_cast<int>(std::min<std::int64_t>(kQueryTile, std::int64_t{segment.rows} * group - first_query));
  tile.tail = segment_tail_[static_cast<std::size_t>(s)];
  std::int64_t first = INT64_MAX;
  std::int64_t last = 0;
  for (int i = 0; i < tile.count; ++i) {
    const std::int64_t row = segment.first_row + (first_query + i) / group;
    const std::int64_t head = kv_head * group + (first_query + i) % group;
    tile.query[i] = call.query + row * call.query_stride + head * kv.head_dim;
    place.outputs[i] = call.output + row * call.output_stride + head * kv.head_dim;
    tile.last[i] = step.positions[static_cast<std::size_t>(row)] - (call.sees.own ? 0 : 1);
    tile.first[i] = call.sees.window > 0 ? std::max<std::int64_t>(tile.last[i] - call.sees.window + 1, 0) : 0;
    if (tile.last[i] >= tile.tail) tile.slots[i] = slots_.data() + row_slots_[static_cast<std::size_t>(row)];
    first = std::min(first, tile.first[i]);
    last = std::max(last, tile.last[i]);
  }
  place.first_chunk = first / kAttentionChunk;
  place.chunks = last / kAttentionChunk - place.first_chunk + 1;
  return place;
}

void Attention::attend(const AttentionCall& call, const StepRows& step, KvArena arena) {
  const int group = call.query_heads / call.kv->heads;
  std::int64_t tiles = 0;
  for (std::size_t s = 0; s < step.segments.size(); ++s) {
    segment_tile_[s] = tiles;
    tiles += (std::int64_t{step.segments[s].rows} * group + kQueryTile - 1) / kQueryTile;
  }
  segment_tile_[step.segments.size()] = tiles;
  tiles *= call.kv->heads;
  // Both ways do the same arithmetic in the same order.
  const auto in_one_chunk = [](const Segment& s) { return s.first_position + s.rows <= kAttentionChunk; };
  if (tiles >= kTilesPerThread * pool_.size() ||
      (tiles >= pool_.size() && std::all_of(step.segments.begin(), step.segments.end(), in_one_chunk))) {
    attend_by_tile(call, step, arena, tiles);
  } else {
    attend_by_chunk(call, step, arena, tiles);
  }
}

/// Many rows: a worker takes a tile through all of its chunks.
void Attention::attend_by_tile(const AttentionCall& call, const StepRows& step, KvArena arena, std::int64_t tiles) {
  pool_.parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end, int worker) {
    AttentionState& total = worker_states_[2 * worker];
    AttentionState& part = worker_states_[2 * worker + 1];
    for (std::int64_t index = begin; index < end; ++index) {
      const TilePlace place = place_tile(call, step, arena, index);
      for (std::int64_t c = place.first_chunk; c < place.first_chunk + place.chunks; ++c) {
        kernels_.attend_chunk(place.tile, place.kv, c, call.scale, part);
        kernels_.merge_chunk(place.tile, c, call.kv->head_dim, part, total);
      }
      kernels_.finish_attention(place.tile, call.kv->head_dim, total, place.outputs);
    }
  });
}

/// Few rows: workers share the chunks of a tile, which are merged in order afterwards.
void Attention::attend_by_chunk(const AttentionCall& call, const StepRows& step, KvArena arena, std::int64_t tiles) {
  std::int64_t items = 0;
  for (std::int64_t t = 0; t < tiles; ++t) {
    split_tiles_[static_cast<std::size_t>(t)] = place_tile(call, step, arena, t);
    split_begin_[static_cast<std::size_t>(t)] = items;
    items += split_tiles_[static_cast<std::size_t>(t)].chunks;
  }
  split_begin_[static_cast<std::size_t>(tiles)] = items;
  const std::int64_t wave = kPartialsPerThread * pool_.size();
  // Where all tiles have the same chunks (one sequence), a chunk's tiles go one after the other, so that its keys and
  // values are read from memory by one thread.
  const std::int64_t chunks = split_tiles_.front().chunks;
  bool by_chunk = items <= wave && items == tiles * chunks;
  for (std::int64_t t = 0; t < tiles; ++t) {
    by_chunk = by_chunk && split_tiles_[static_cast<std::size_t>(t)].first_chunk == split_tiles_.front().first_chunk &&
               split_tiles_[static_cast<std::size_t>(t)].chunks == chunks;
  }
  for (std::int64_t first = 0; first < items; first += wave) {
    const std::int64_t last = std::min(first + wave, items);
    pool_.parallel_for(last - first, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t ordinal = first + begin; ordinal < first + end; ++ordinal) {
        const std::int64_t item = by_chunk ? ordinal % tiles * chunks + ordinal / tiles : ordinal;
        const auto after = std::upper_bound(split_begin_.begin(), split_begin_.begin() + tiles, item);
        const std::ptrdiff_t t = after - split_begin_.begin() - 1;
        const TilePlace& place = split_tiles_[static_cast<std::size_t>(t)];
        const std::int64_t chunk = place.first_chunk + item - split_begin_[static_cast<std::size_t>(t)];
        kernels_.attend_chunk(place.tile, place.kv, chunk, call.scale, partials_[item - first]);
      }
    });
    pool_.parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const TilePlace& place = split_tiles_[static_cast<std::size_t>(t)];
        const std::int64_t tile_begin = split_begin_[static_cast<std::size_t>(t)];
        const std::int64_t tile_end = split_begin_[static_cast<std::size_t>(t) + 1];
        for (std::int64_t item = std::max(first, tile_begin); item < std::min(last, tile_end); ++item) {
          kernels_.merge_chunk(place.tile, place.first_chunk + item - tile_begin, call.kv->head_dim,
                               partials_[item - first], tile_states_[t]);
        }
        if (tile_end > first && tile_end <= last) {
          kernels_.finish_attention(place.tile, call.kv->head_dim, tile_states_[t], place.outputs);
        }
      }
    });
  }
}

}  // namespace draftwerk::cpu
