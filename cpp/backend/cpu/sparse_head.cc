#include "backend/cpu/sparse_head.h"

#include <algorithm>
#include <tuple>

#include "backend/cpu/operands.h"
#include "backend/cpu/pieces.h"
#include "backend/cpu/top_k.h"

namespace draftwerk::cpu {
namespace {

/// One vector more than needed: rows a power of two apart would share cache sets.
std::int64_t stride_of(std::int64_t count) { return round_up(count, kPanel) + kPanel; }

}  // namespace

SparseLogits::SparseLogits(const MatmulKernels& matmul, const LayerKernels& layer, WorkerPool& pool, int max_outputs,
                           int vocabulary)
    : matmul_(matmul), layer_(layer), pool_(pool), vocabulary_(vocabulary), panels_stride_(stride_of(vocabulary)) {
  const std::int64_t elements = max_outputs * stride_of(vocabulary);  // no more clusters than tokens
  values_.resize(elements);
  tokens_.resize(elements);
  scores_.resize(elements);
  chosen_.resize(elements);
  pairs_.resize(elements);
  panels_.resize(pool.size() * panels_stride_);
}

SparseLogitRows SparseLogits::compute(const SparseHead& head, const Activations& x, int outputs) {
  const PackedMatrix& matrix = packed(*head.weight);
  require(matrix.rows <= vocabulary_, "a sparse head of no more tokens than the vocabulary has");
  if (head.centroids == nullptr) return compute_all(head, x, outputs);
  const PackedMatrix& centroids = packed(*head.centroids);
  require(centroids.columns == matrix.columns, "centroids as wide as the head");
  require(matrix.rows % centroids.rows == 0, "clusters of equal size");
  require(head.chosen > 0 && head.chosen <= centroids.rows, "no more chosen clusters than there are");
  return compute_chosen(head, x, outputs);
}

SparseLogitRows SparseLogits::compute_all(const SparseHead& head, const Activations& x, int outputs) {
  const PackedMatrix& matrix = packed(*head.weight);
  const std::int64_t stride = stride_of(matrix.rows);
  pool_.parallel_for(panel_count(matrix.rows), grain_of_bytes(static_cast<std::int64_t>(matrix.panel_bytes)),
                     [&](std::int64_t begin, std::int64_t end, int) {
                       matmul_.matmul(matrix, begin, end, x, outputs, values_.data(), stride);
                       if (head.softcap == 0.0F) return;
                       const std::int64_t first = begin * kPanel;
                       const auto count = static_cast<int>(std::min(end * kPanel, matrix.rows) - first);
                       for (int r = 0; r < outputs; ++r) {
                         layer_.softcap_max(values_.data() + r * stride + first, count, head.softcap);
                       }
                     });
  return {.values = values_.data(),
          .stride = stride,
          .tokens = head.tokens,
          .count = static_cast<int>(matrix.rows),
          .row_of = head.row_of,
          .vocabulary = vocabulary_};
}

void SparseLogits::choose_clusters(const PackedMatrix& centroids, const Activations& x, int outputs, int chosen) {
  const auto clusters = static_cast<int>(centroids.rows);
  pool_.parallel_for(panel_count(clusters), grain_of_bytes(static_cast<std::int64_t>(centroids.panel_bytes)),
                     [&](std::int64_t begin, std::int64_t end, int) {
                       matmul_.matmul(centroids, begin, end, x, outputs, scores_.data(), clusters);
                     });
  pool_.parallel_for(outputs, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t row = begin; row < end; ++row) {
      choose_largest(scores_.data() + row * clusters, clusters, chosen, chosen_.data() + row * chosen);
    }
  });
}

SparseLogitRows SparseLogits::compute_chosen(const SparseHead& head, const Activations& x, int outputs) {
  const PackedMatrix& matrix = packed(*head.weight);
  const PackedMatrix& centroids = packed(*head.centroids);
  const int chosen = head.chosen;
  const auto size = static_cast<int>(matrix.rows / centroids.rows);
  const std::int64_t stride = stride_of(std::int64_t{chosen} * size);
  choose_clusters(centroids, x, outputs, chosen);

  // By cluster, so that a cluster which several rows have chosen comes from memory once.
  const std::int64_t pairs = std::int64_t{outputs} * chosen;
  for (std::int64_t i = 0; i < pairs; ++i) {
    pairs_[i] = {chosen_[i], static_cast<std::int32_t>(i / chosen), static_cast<std::int32_t>(i % chosen)};
  }
  if (outputs > 1) {
    std::sort(pairs_.data(), pairs_.data() + pairs,
              [](const Pair& a, const Pair& b) { return std::tie(a.cluster, a.row) < std::tie(b.cluster, b.row); });
  }
  const auto cluster_bytes = std::max<std::int64_t>(static_cast<std::int64_t>(matrix.panel_bytes) * size / kPanel, 1);
  pool_.parallel_for(pairs, grain_of_bytes(cluster_bytes), [&](std::int64_t begin, std::int64_t end, int worker) {
    float* panels = panels_.data() + worker * panels_stride_;
    for (std::int64_t i = begin; i < end; ++i) {
      const Pair& pair = pairs_[i];
      const std::int64_t first = std::int64_t{pair.cluster} * size;
      const std::int64_t first_panel = first / kPanel;
      const std::int64_t past_panel = panel_count(first + size);
      const PackedMatrix part = panels_of(matrix, first_panel * kPanel, matrix.rows - first_panel * kPanel);
      matmul_.matmul(part, 0, past_panel - first_panel, x.from(pair.row), 1, panels, panels_stride_);
      const std::int64_t place = pair.row * stride + std::int64_t{pair.index} * size;
      std::copy_n(panels + first % kPanel, size, values_.data() + place);
      std::copy_n(head.tokens + first, size, tokens_.data() + place);
      if (head.softcap != 0.0F) layer_.softcap_max(values_.data() + place, size, head.softcap);
    }
  });
  return {.values = values_.data(),
          .stride = stride,
          .tokens = tokens_.data(),
          .token_stride = stride,
          .count = chosen * size,
          .row_of = head.row_of,
          .vocabulary = vocabulary_,
          .chosen = chosen_.data(),
          .clusters = chosen,
          .cluster_size = size};
}

}  // namespace draftwerk::cpu
