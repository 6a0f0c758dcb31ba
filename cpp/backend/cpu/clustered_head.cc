#include "backend/cpu/clustered_head.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "backend/cpu/operands.h"
#include "backend/cpu/sampler_kernels.h"
#include "backend/cpu/top_k.h"

namespace draftwerk::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kBytesPerPiece = 16 * 1024;

}  // namespace

ClusteredLogits::ClusteredLogits(const MatmulKernels& matmul, WorkerPool& pool, int max_outputs, int vocabulary)
    : matmul_(matmul),
      pool_(pool),
      vocabulary_(vocabulary),
      stride_(round_up(vocabulary, kPanel) + kPanel),
      chunks_((vocabulary + kLogitChunk - 1) / kLogitChunk),
      written_(static_cast<std::size_t>(max_outputs), -1) {
  const std::int64_t elements = max_outputs * vocabulary_;  // no more clusters than tokens
  logits_.resize(max_outputs * stride_);
  maxima_.resize(max_outputs * chunks_);
  tokens_.resize(elements);
  scores_.resize(elements);
  chosen_.resize(elements);
  pairs_.resize(elements);
  values_.resize(elements);
  panels_.resize(pool.size() * stride_);
}

LogitRows ClusteredLogits::rows() const {
  return {logits_.data(), stride_, static_cast<int>(vocabulary_), maxima_.data(), chunks_};
}

/// Minus infinity everywhere: the first time all over, later only where something was written.
void ClusteredLogits::clear_row(std::int64_t row) {
  float* logits = logits_.data() + row * stride_;
  float* maxima = maxima_.data() + row * chunks_;
  std::int64_t& written = written_[static_cast<std::size_t>(row)];
  if (written < 0) {
    std::fill_n(logits, vocabulary_, kMinusInfinity);
    std::fill_n(maxima, chunks_, kMinusInfinity);
  }
  const std::int32_t* tokens = tokens_.data() + row * vocabulary_;
  for (std::int64_t i = 0; i < written; ++i) {
    logits[tokens[i]] = kMinusInfinity;
    maxima[tokens[i] / kLogitChunk] = kMinusInfinity;
  }
  written = 0;
}

void ClusteredLogits::choose_clusters(const PackedMatrix& centroids, const Activations& x, int outputs, int chosen) {
  const int clusters = static_cast<int>(centroids.rows);
  pool_.parallel_for(panel_count(clusters),
                     std::max<std::int64_t>(kBytesPerPiece / static_cast<std::int64_t>(centroids.panel_bytes), 1),
                     [&](std::int64_t begin, std::int64_t end, int) {
                       matmul_.matmul(centroids, begin, end, x, outputs, scores_.data(), clusters);
                     });
  pool_.parallel_for(outputs, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t row = begin; row < end; ++row) {
      choose_largest(scores_.data() + row * clusters, clusters, chosen, chosen_.data() + row * chosen);
      clear_row(row);
    }
  });
}

/// Puts the logits of a row's clusters to their tokens.
void ClusteredLogits::scatter_row(const ClusteredHead& head, std::int64_t row, int size) {
  float* logits = logits_.data() + row * stride_;
  float* maxima = maxima_.data() + row * chunks_;
  std::int32_t* written = tokens_.data() + row * vocabulary_;
  const float* values = values_.data() + row * vocabulary_;
  for (int j = 0; j < head.chosen; ++j) {
    const std::int32_t* tokens = head.tokens + std::int64_t{chosen_[row * head.chosen + j]} * size;
    for (int i = 0; i < size; ++i) {
      const std::int32_t token = tokens[i];
      const float value = *values++;
      *written++ = token;
      logits[token] = value;
      float& most = maxima[token / kLogitChunk];
      most = value > most ? value : most;
    }
  }
  written_[static_cast<std::size_t>(row)] = std::int64_t{head.chosen} * size;
}

void ClusteredLogits::compute(const ClusteredHead& head, const Activations& x, int outputs) {
  const PackedMatrix& centroids = packed(*head.centroids);
  const PackedMatrix& matrix = packed(*head.head);
  require(matrix.rows == vocabulary_ && centroids.columns == matrix.columns, "a clustered head of the vocabulary");
  require(vocabulary_ % centroids.rows == 0, "clusters of equal size");
  require(head.chosen > 0 && head.chosen <= centroids.rows, "no more chosen clusters than there are");
  const int chosen = head.chosen;
  const int size = static_cast<int>(vocabulary_ / centroids.rows);
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
  pool_.parallel_for(pairs, std::max<std::int64_t>(kBytesPerPiece / cluster_bytes, 1),
                     [&](std::int64_t begin, std::int64_t end, int worker) {
                       float* panels = panels_.data() + worker * stride_;
                       for (std::int64_t i = begin; i < end; ++i) {
                         const Pair& pair = pairs_[i];
                         const std::int64_t first = std::int64_t{pair.cluster} * size;
                         const std::int64_t first_panel = first / kPanel;
                         const std::int64_t past_panel = panel_count(first + size);
                         const PackedMatrix part =
                             panels_of(matrix, first_panel * kPanel, matrix.rows - first_panel * kPanel);
                         matmul_.matmul(part, 0, past_panel - first_panel, x.from(pair.row), 1, panels, stride_);
                         std::copy_n(panels + first % kPanel, size,
                                     values_.data() + pair.row * vocabulary_ + std::int64_t{pair.index} * size);
                       }
                     });
  pool_.parallel_for(outputs, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t row = begin; row < end; ++row) scatter_row(head, row, size);
  });
}

}  // namespace draftwerk::cpu
