// Logits of the chosen clusters of a head, held to the plain product of what the device has.
#include "backend/cuda/sparse_logits.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cpu/reference.h"
#include "backend/cuda/projections.h"
#include "matrix_on_device.h"
#include "strided_rows.h"

namespace draftwerk::cuda {
namespace {

constexpr int kColumns = 96;

/// What a row's clusters are and the logits of their tokens.
struct Scored {
  std::vector<std::int32_t> tokens;
  std::vector<float> logits;
  bool operator==(const Scored&) const = default;
};

TEST(ClustersOfAHead, HaveTheLogitsOfThePlainProduct) {
  std::mt19937 random(31);
  Uploader uploader;
  for (const WeightType type : {WeightType::bf16, WeightType::q8_0, WeightType::q4_0, WeightType::f8_e4m3}) {
    for (const int cluster_size : {32, 11}) {  // whole panels, and clusters that share them
      constexpr int kClusters = 12;
      constexpr int kChosen = 3;
      constexpr int kRows = 9;
      const int tokens = kClusters * cluster_size;
      const Matrix head(type, tokens, kColumns, random, uploader);
      const Matrix centroids(type, kClusters, kColumns, random, uploader);
      std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
      std::iota(ids.begin(), ids.end(), 0);
      std::shuffle(ids.begin(), ids.end(), random);
      const SparseHead sparse{&head.weight, ids.data(), nullptr, &centroids.weight, kChosen, 5.0F};
      Rows states(kRows, kColumns, 2, random);
      Projections projections{{std::size_t{227} << 10, 132, false}};
      projections.reserve(kRows, kRows, kColumns, tokens);
      const auto score = [&](int first, int rows) {
        SparseLogits logits;
        logits.reserve(rows, sparse);
        LaunchList launches;
        const LogitRows found = logits.record(
            launches, projections, rows, {states.row(first), kColumns, states.tensor().row_stride()}, sparse, tokens);
        launches.run(nullptr);
        check(cudaDeviceSynchronize(), "waiting");
        EXPECT_EQ(found.columns, kChosen * cluster_size);
        std::vector<Scored> scored;
        for (int r = 0; r < rows; ++r) {
          const float* row = found.values + r * found.stride;
          scored.push_back({SparseLogits::tokens(found, r), {row, row + found.columns}});
        }
        return scored;
      };
      const std::vector<Scored> all = score(0, kRows);
      for (int r = 0; r < kRows; ++r) {
        EXPECT_EQ(score(r, 1)[0], all[static_cast<std::size_t>(r)]) << "row " << r << " by itself";
        std::vector<double> x(states.row(r), states.row(r) + kColumns);
        for (double& value : x) value = rounded(static_cast<float>(value));
        const std::vector<double> products = cpu::reference::multiply(head.values, x);
        const Scored& got = all[static_cast<std::size_t>(r)];
        for (std::size_t i = 0; i < got.tokens.size(); ++i) {
          const auto row = static_cast<std::size_t>(std::ranges::find(ids, got.tokens[i]) - ids.begin());
          // Sums of 96 products of about unit size in float32.
          ASSERT_NEAR(got.logits[i], 5 * std::tanh(products[row] / 5), 2e-5)
              << weight_type_name(type) << ", row " << r << ", token " << got.tokens[i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace draftwerk::cuda
