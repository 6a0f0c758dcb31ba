// Queries, keys and values of a step's rows, and attention over the pages.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/cpu_backend_impl.h"
#include "backend/cpu/operands.h"
#include "backend/cpu/pieces.h"

namespace draftwerk::cpu {
namespace {

void require_head_dim(int head_dim) {
  require(head_dim > 0 && head_dim % 16 == 0 && head_dim <= kMaxHeadDim, "head_dim a multiple of 16 up to 512");
}

void move_layer(const KvLayer& kv, std::span<const KvMove> moves, KvArena arena) {
  const std::size_t element = kv.type == KvType::f16 ? 2 : 4;
  const auto components = static_cast<std::size_t>(kv.heads * kv.head_dim);
  const std::size_t value = static_cast<std::size_t>(kv.head_dim) * element;
  for (const KvMove& move : moves) {
    require(move.to >= 0 && move.to <= move.from, "keys and values that move back");
    if (move.to == move.from) continue;
    const auto page = [&](std::int64_t position) {
      return arena.base + std::size_t{move.pages[kv.table][position / kPageSize]} * kPageUnit;
    };
    const std::byte* from = page(move.from);
    std::byte* to = page(move.to);
    const auto from_lane = static_cast<std::size_t>(move.from % kPageSize);
    const auto to_lane = static_cast<std::size_t>(move.to % kPageSize);
    for (std::size_t c = 0; c < components; ++c) {
      std::memcpy(to + kv.key_offset + (c * kPageSize + to_lane) * element,
                  from + kv.key_offset + (c * kPageSize + from_lane) * element, element);
    }
    for (int h = 0; h < kv.heads; ++h) {
      const auto head = static_cast<std::size_t>(h) * kPageSize;
      std::memcpy(to + kv.value_offset + (head + to_lane) * value, from + kv.value_offset + (head + from_lane) * value,
                  value);
    }
  }
}

}  // namespace

/// Cosines and sines for every row of the step, computed once per rotary embedding.
const float* CpuBackend::angles(const Rope& rope, int head_dim) {
  for (int i = 0; i < std::min(ropes_used_, kRopeSlots); ++i) {
    const RopeSlot& slot = ropes_[i];
    if (slot.inverse_frequency == rope.inverse_frequency && slot.head_dim == head_dim) return slot.angles.data();
  }
  RopeSlot& slot = ropes_[ropes_used_++ % kRopeSlots];
  slot.inverse_frequency = rope.inverse_frequency;
  slot.head_dim = head_dim;
  const int half = head_dim / 2;
  pool_.parallel_for(step_rows(), 2, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      const auto position = static_cast<float>(step_.positions[static_cast<std::size_t>(r)]);
      float* cosine = slot.angles.data() + r * head_dim;
      for (int i = 0; i < half; ++i) {
        const float angle = position * rope.inverse_frequency[i];
        cosine[i] = std::cos(angle);
        cosine[half + i] = std::sin(angle);
      }
    }
  });
  return slot.angles.data();
}

/// The queries of one row.
void CpuBackend::prepare_query(Tensor query, std::int64_t row, int heads, const Norm& norm, int head_dim,
                               const float* angles) {
  const float* cosine = angles + row * head_dim;
  for (int h = 0; h < heads; ++h) {
    float* q = row_of(query, row) + h * head_dim;
    layer_.rms_norm(q, norm.scale, norm.epsilon, head_dim, q);
    layer_.rotate(q, cosine, cosine + head_dim / 2, head_dim);
  }
}

/// Keys and values of one row, into its slot.
void CpuBackend::append_row(Tensor key, Tensor value, std::int64_t row, const Norm& key_norm, const Norm* value_norm,
                            const KvLayer& kv, const float* angles) {
  const int head_dim = kv.head_dim;
  const float* cosine = angles + row * head_dim;
  const std::size_t head_bytes = kv_head_bytes(head_dim, kv.type);
  const Segment& segment = step_.segments[static_cast<std::size_t>(row_segment_[static_cast<std::size_t>(row)])];
  const std::int64_t slot = segment.first_position + row - segment.first_row;
  const int lane = static_cast<int>(slot % kPageSize);
  std::byte* page = arena_.base + std::size_t{segment.pages[kv.table][slot / kPageSize]} * kPageUnit;
  alignas(64) float normed[kMaxHeadDim];
  for (int h = 0; h < kv.heads; ++h) {
    // The value first: it may be the key, which changes in place.
    const float* v = row_of(value, row) + h * head_dim;
    if (value_norm != nullptr) {
      layer_.rms_norm(v, value_norm->scale, value_norm->epsilon, head_dim, normed);
      v = normed;
    }
    layer_.store_value(v, head_dim, kv.type, lane, page + kv.value_offset + h * head_bytes);
    float* k = row_of(key, row) + h * head_dim;
    layer_.rms_norm(k, key_norm.scale, key_norm.epsilon, head_dim, k);
    layer_.rotate(k, cosine, cosine + head_dim / 2, head_dim);
    layer_.store_key(k, head_dim, kv.type, lane, page + kv.key_offset + h * head_bytes);
  }
}

void CpuBackend::append_kv(Tensor query, Tensor key, Tensor value, int query_heads, const Norm& query_norm,
                           const Norm& key_norm, const Norm* value_norm, const Rope& rope, const KvLayer& kv) {
  const int head_dim = kv.head_dim;
  require_head_dim(head_dim);
  require(query.columns == query_heads * head_dim && key.columns == kv.heads * head_dim &&
              value.columns == kv.heads * head_dim,
          "matching head shapes");
  const float* step_angles = angles(rope, head_dim);
  // Keys of one page share cache lines, so a piece of those is about a page's worth of rows; queries share nothing and
  // are handed out behind them, few at a time.
  const std::int64_t rows = step_rows();
  const std::int64_t key_pieces = (rows + kPageSize / 2 - 1) / (kPageSize / 2);
  const std::int64_t query_grain = grain_of_rows(query.columns);
  const std::int64_t query_pieces = (rows + query_grain - 1) / query_grain;
  const std::int64_t grain = rows == 1 ? 2 : 1;  // one row is not worth a fork
  pool_.parallel_for(key_pieces + query_pieces, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t piece = begin; piece < end; ++piece) {
      if (piece < key_pieces) {
        const std::int64_t first = piece * (kPageSize / 2);
        for (std::int64_t r = first; r < std::min(first + kPageSize / 2, rows); ++r) {
          append_row(key, value, r, key_norm, value_norm, kv, step_angles);
        }
      } else {
        const std::int64_t first = (piece - key_pieces) * query_grain;
        for (std::int64_t r = first; r < std::min(first + query_grain, rows); ++r) {
          prepare_query(query, r, query_heads, query_norm, head_dim, step_angles);
        }
      }
    }
  });
}

void CpuBackend::prepare_queries(Tensor query, int query_heads, const Norm& query_norm, const Rope& rope) {
  require(query_heads > 0 && query.columns % query_heads == 0, "queries of whole heads");
  const int head_dim = query.columns / query_heads;
  require_head_dim(head_dim);
  const float* step_angles = angles(rope, head_dim);
  for_each_row(step_rows(), query.columns,
               [&](std::int64_t r, int) { prepare_query(query, r, query_heads, query_norm, head_dim, step_angles); });
}

void CpuBackend::attend(Tensor query, int query_heads, const KvLayer& kv, const Visibility& sees, float scale,
                        Tensor output) {
  require(kv.heads > 0 && query_heads % kv.heads == 0 && query.columns == query_heads * kv.head_dim &&
              output.columns == query.columns,
          "matching head shapes");
  require_head_dim(kv.head_dim);
  require(sees.own || std::find(step_.positions.begin(), step_.positions.end(), 0) == step_.positions.end(),
          "rows that see some position");
  attention_->attend(
      {row_of(query, 0), row_of(output, 0), query.row_stride(), output.row_stride(), &kv, query_heads, sees, scale},
      step_, arena_);
}

void CpuBackend::move_kv(std::span<const KvLayer> layers, std::span<const KvMove> moves) {
  for (const KvLayer& kv : layers) move_layer(kv, moves, arena_);
}

}  // namespace draftwerk::cpu
