#include "backend/cuda/sparse_logits.h"

#include <algorithm>

#include "backend/cuda/activation.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/device_weight.h"
#include "backend/cuda/error.h"
#include "backend/cuda/multiply_chunk.cuh"
#include "backend/cuda/sparse_head.h"
#include "backend/round_up.h"

namespace draftwerk::cuda {
namespace {

constexpr int kWarps = 4;

struct ClusterProducts {
  OperandView operands;
  const std::byte* weight;
  const std::int32_t* chosen;  ///< [outputs, clusters]
  float* logits;               ///< [outputs, stride]
  std::int64_t panel_bytes;
  std::int64_t stride;
  std::int32_t chunks;
  std::int32_t clusters;        ///< of a row
  std::int32_t cluster_size;    ///< rows of the head
  std::int32_t cluster_panels;  ///< that a cluster may touch
  float softcap;
  std::int32_t unused = 0;
};

// A warp multiplies a panel of a chosen cluster with the tile of rows that its row is in, of which it keeps that row:
// every row has clusters of its own. Bound by latency: 32 clusters of 128 rows by 256 columns are 2 MB in bf16, in 256
// warps a row.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kWarps* kWarp) multiply_clusters(const ClusterProducts a) {
  follow_previous();
  constexpr int kBlocks = Chunk<kFormat>::kColumns / kBlockColumns;
  const int row = static_cast<int>(blockIdx.y);
  const int work = static_cast<int>(blockIdx.x) * kWarps + warp();
  if (work >= a.clusters * a.cluster_panels) return;
  const int place = work / a.cluster_panels;
  const int first = a.chosen[static_cast<std::int64_t>(row) * a.clusters + place] * a.cluster_size;
  const int panel = first / kPanelRows + work % a.cluster_panels;
  if (panel * kPanelRows >= first + a.cluster_size) return;

  const std::byte* weight = a.weight + panel * a.panel_bytes;
  const std::byte* operands = a.operands.data + row / 8 * a.operands.tile_bytes;
  float sums[1][1][4] = {};
  for (int chunk = 0; chunk < a.chunks; ++chunk) {
    multiply_chunk<Memory::global, kFormat>(weight + static_cast<std::int64_t>(chunk) * Chunk<kFormat>::kBytes,
                                            operands + static_cast<std::int64_t>(chunk) * kBlocks * kFragmentBytes,
                                            sums);
  }
  if (lane() % 4 != row % 8 / 2) return;
  for (int half = 0; half < 2; ++half) {
    const int in_cluster = panel * kPanelRows + lane() / 4 + half * 8 - first;
    if (in_cluster < 0 || in_cluster >= a.cluster_size) continue;
    a.logits[row * a.stride + place * a.cluster_size + in_cluster] = softcapped(
        times_row_scale<kFormat>(sums[0][0][half * 2 + row % 2], weight, a.panel_bytes, lane() / 4 + half * 8),
        a.softcap);
  }
}

constexpr std::int64_t padded(std::int64_t columns) { return round_up(columns, 32); }

/// Logits of a row.
std::int64_t columns_of(const SparseHead& head) {
  const std::int64_t rows = head.weight->rows();
  return head.centroids == nullptr ? rows : head.chosen * (rows / head.centroids->rows());
}

std::vector<std::int32_t> read(const std::int32_t* values, std::int32_t count) {
  std::vector<std::int32_t> on_host(static_cast<std::size_t>(count));
  check(cudaMemcpy(on_host.data(), values, on_host.size() * sizeof(std::int32_t), cudaMemcpyDeviceToHost),
        "reading tokens");
  return on_host;
}

}  // namespace

void SparseLogits::reserve(int max_outputs, const SparseHead& head) {
  const auto rows = static_cast<std::size_t>(max_outputs);
  logits_.reserve(rows * static_cast<std::size_t>(padded(columns_of(head))) * sizeof(float));
  if (head.centroids == nullptr) return;
  chosen_.reserve(rows * static_cast<std::size_t>(head.chosen) * sizeof(std::int32_t));
  scores_.reserve(rows * static_cast<std::size_t>(padded(head.centroids->rows())) * sizeof(float));
}

LogitRows SparseLogits::record(LaunchList& launches, Projections& projections, int outputs, Tensor states,
                               const SparseHead& head, int vocabulary) {
  const MatrixView& weight = view_of(*head.weight);
  LogitRows result;
  result.tokens = head.tokens;
  result.row_of = head.row_of;
  result.vocabulary = vocabulary;
  if (head.centroids == nullptr) {
    result.columns = weight.rows;
    result.stride = padded(weight.rows);
    result.values = static_cast<float*>(logits_.get());
    projections.scores(launches, outputs, states, *head.weight, head.softcap,
                       {result.values, weight.rows, static_cast<int>(result.stride)});
    return result;
  }

  const int clusters = view_of(*head.centroids).rows;
  result.clusters = head.chosen;
  result.cluster_size = weight.rows / clusters;
  result.columns = static_cast<std::int32_t>(columns_of(head));
  result.stride = padded(result.columns);
  result.values = static_cast<float*>(logits_.get());
  auto* const chosen = static_cast<std::int32_t*>(chosen_.get());
  result.chosen = chosen;
  const auto score_stride = static_cast<int>(padded(clusters));
  const Tensor scores{scores_.get(), clusters, score_stride};
  projections.scores(launches, outputs, states, *head.centroids, 0.0F, scores);
  record_choose_clusters(
      launches, {static_cast<const float*>(scores.data), chosen, score_stride, clusters, head.chosen}, outputs);
  const int size = result.cluster_size;
  const int panels = size % kPanelRows == 0 ? size / kPanelRows : (size - 1) / kPanelRows + 2;
  const ClusterProducts products{projections.round(launches, outputs, states),
                                 weight.data,
                                 chosen,
                                 result.values,
                                 weight.panel_bytes(),
                                 result.stride,
                                 weight.chunks,
                                 head.chosen,
                                 size,
                                 panels,
                                 head.softcap};
  const auto blocks = static_cast<unsigned>((head.chosen * panels + kWarps - 1) / kWarps);
  const LaunchShape shape{dim3(blocks, static_cast<unsigned>(outputs)), dim3(kWarps * kWarp)};
  with_format(weight.format,
              [&]<WeightFormat kFormat>() { launches.add(multiply_clusters<kFormat>, shape, products); });
  return result;
}

std::vector<std::int32_t> SparseLogits::tokens(const LogitRows& logits, int row) {
  if (logits.chosen == nullptr) return read(logits.tokens, logits.columns);
  std::vector<std::int32_t> tokens;
  for (const std::int32_t cluster :
       read(logits.chosen + static_cast<std::int64_t>(row) * logits.clusters, logits.clusters)) {
    const std::vector<std::int32_t> of_cluster =
        read(logits.tokens + static_cast<std::int64_t>(cluster) * logits.cluster_size, logits.cluster_size);
    tokens.insert(tokens.end(), of_cluster.begin(), of_cluster.end());
  }
  return tokens;
}

}  // namespace draftwerk::cuda
