// Choosing among the tokens of a sparse head on the device, against the specification (reference_sampler) on the whole
// row that they stand for; and choosing clusters, against sorting.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/worker_pool.h"
#include "backend/cuda/sparse_head.h"
#include "backend/reference_sampler.h"
#include "sampler_fixture.h"
#include "sampler_on_device.h"
#include "sparse_place.h"

namespace draftwerk::cuda {
namespace {

using testing::DeviceArray;
using testing::kInfinity;
using testing::pick;
using testing::Random;
using testing::SamplerOnDevice;

class CudaSparseSampler : public testing::InAnyOrder {
 protected:
  int below(int n) { return pick(random_, 0, n - 1); }

  /// The tokens of a head, and the row of each.
  struct Head {
    std::vector<std::int32_t> tokens;
    std::vector<std::int32_t> row_of;
  };
  Head some_head(int vocabulary, int count) {
    Head head{std::vector<std::int32_t>(static_cast<std::size_t>(vocabulary)), {}};
    std::iota(head.tokens.begin(), head.tokens.end(), 0);
    std::shuffle(head.tokens.begin(), head.tokens.end(), random_);
    head.tokens.resize(static_cast<std::size_t>(count));
    head.row_of.assign(static_cast<std::size_t>(vocabulary), -1);
    for (int i = 0; i < count; ++i) head.row_of[static_cast<std::size_t>(head.tokens[static_cast<std::size_t>(i)])] = i;
    return head;
  }

  float some_logit(int trial) {
    if (trial % 5 == 0 && below(6) == 0) {
      return std::vector{-kInfinity, kInfinity, std::numeric_limits<float>::quiet_NaN()}[random_() % 3];
    }
    // Of few values, so that many are equal.
    return trial % 2 == 0 ? static_cast<float>(below(4)) : std::normal_distribution<float>(0.0F, 3.0F)(random_);
  }

  /// Proposes in two rows at once, of a head of which each scores `clusters` clusters, or all where that is 0.
  void check(int trial, int vocabulary, const Head& head, int clusters, int cluster_size,
             const std::vector<ProposeRow>& places, int count) {
    const auto outputs = places.size();
    const auto head_rows = static_cast<int>(head.tokens.size());
    std::vector<std::int32_t> chosen;
    const int columns = clusters == 0 ? head_rows : clusters * cluster_size;
    const int stride = (columns + 3) / 4 * 4;
    std::vector<float> values(outputs * static_cast<std::size_t>(stride), kInfinity);
    std::vector<std::vector<float>> whole(outputs);
    for (std::size_t r = 0; r < outputs; ++r) {
      whole[r].assign(static_cast<std::size_t>(vocabulary), -kInfinity);
      std::vector<std::int32_t> own(static_cast<std::size_t>(cluster_size == 0 ? 0 : head_rows / cluster_size));
      std::iota(own.begin(), own.end(), 0);
      std::shuffle(own.begin(), own.end(), random_);
      own.resize(static_cast<std::size_t>(clusters));
      std::sort(own.begin(), own.end());
      chosen.insert(chosen.end(), own.begin(), own.end());
      for (int i = 0; i < columns; ++i) {
        const int row =
            clusters == 0 ? i : own[static_cast<std::size_t>(i / cluster_size)] * cluster_size + i % cluster_size;
        const float logit = some_logit(trial);
        values[r * static_cast<std::size_t>(stride) + static_cast<std::size_t>(i)] = logit;
        whole[r][static_cast<std::size_t>(head.tokens[static_cast<std::size_t>(row)])] = logit;
      }
    }
    LogitRows logits;
    logits.values = values_.fill(values);
    logits.tokens = tokens_.fill(head.tokens);
    logits.row_of = row_of_.fill(head.row_of);
    logits.chosen = clusters == 0 ? nullptr : chosen_.fill(chosen);
    logits.stride = stride;
    logits.columns = columns;
    logits.vocabulary = vocabulary;
    logits.clusters = clusters;
    logits.cluster_size = cluster_size;
    any_order(trial);
    const std::vector<Candidate> candidates = device_.propose(logits, places, count, static_cast<int>(outputs));
    for (std::size_t r = 0; r < outputs; ++r) {
      const std::vector<Candidate> want = reference_propose(whole[r], places[r], count);
      testing::Rows rows(1, vocabulary);
      rows.values = whole[r];
      std::vector<Candidate> on_cpu(want.size());
      cpu::WorkerPool pool(1);
      cpu::Sampler(cpu::Isa::portable, vocabulary, 1, 1).propose(rows.view(), {&places[r], 1}, count, on_cpu, pool);
      for (std::size_t i = 0; i < want.size(); ++i) {
        const Candidate& found = candidates[r * want.size() + i];
        const std::string what = "trial " + std::to_string(trial) + " row " + std::to_string(r) + " candidate " +
                                 std::to_string(i) + ": " + testing::describe(*places[r].sampling);
        ASSERT_EQ(found.token, want[i].token) << what;
        ASSERT_EQ(found.value, want[i].value) << what;
        ASSERT_EQ(found.probability, on_cpu[i].probability) << what;
      }
    }
  }

  Random random_{11};
  SamplerOnDevice device_;
  DeviceArray<float> values_;
  DeviceArray<std::int32_t> tokens_;
  DeviceArray<std::int32_t> row_of_;
  DeviceArray<std::int32_t> chosen_;
};

TEST_F(CudaSparseSampler, ChoosesWhatTheSpecificationChooses) {
  constexpr int kVocabulary = 700;
  for (int trial = 0; trial < 400; ++trial) {
    const bool clustered = trial % 4 < 2;
    const int cluster_size = clustered ? 1 + below(20) : 0;
    const int all_clusters = clustered ? 1 + below(kVocabulary / cluster_size) : 0;
    const int head_rows = clustered ? all_clusters * cluster_size : 1 + below(trial % 3 == 0 ? 20 : 600);
    const Head head = some_head(kVocabulary, head_rows);
    std::vector<testing::SparsePlace> all;
    for (int r = 0; r < 2; ++r) all.emplace_back(random_, kVocabulary, head_rows, trial * 7);
    const std::vector<ProposeRow> places = {all[0].row(), all[1].row()};
    check(trial, kVocabulary, head, clustered ? 1 + below(all_clusters) : 0, cluster_size, places,
          1 + below(kMaxCandidates));
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaSparseSampler, ChoosesAmongManyAsTheSpecificationDoes) {
  constexpr int kVocabulary = 40000;
  const Head head = some_head(kVocabulary, 17000);
  for (int trial = 1; trial < 13; ++trial) {
    SamplingParams sampling;
    sampling.temperature = trial % 4 == 0 ? 0.0F : 1.0F;
    sampling.top_k = trial % 3 == 0 ? 0 : trial % 3 == 1 ? 64 : 5000;
    sampling.top_p = trial % 2 == 0 ? 1.0F : 0.95F;
    sampling.seed = random_();
    check(trial, kVocabulary, head, 0, 0, {{{}, trial, &sampling, nullptr, {}, 0}}, 1 + trial % 5);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaSparseSampler, ChoosesTheBestClusters) {
  for (int trial = 0; trial < 60; ++trial) {
    any_order(trial);
    const int clusters = trial % 10 == 0 ? 2048 : 1 + below(150);
    const int count = trial % 10 == 0 ? 32 : 1 + below(clusters);
    const int outputs = 1 + below(3);
    std::vector<float> scores(static_cast<std::size_t>(clusters * outputs));
    for (float& score : scores) score = some_logit(trial);
    std::vector<std::int32_t> want;
    for (int r = 0; r < outputs; ++r) {
      const float* own = scores.data() + r * clusters;
      std::vector<std::int32_t> order(static_cast<std::size_t>(clusters));
      std::iota(order.begin(), order.end(), 0);
      const auto score = [own](std::int32_t c) { return std::isnan(own[c]) ? -kInfinity : own[c]; };
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return score(a) > score(b); });
      std::sort(order.begin(), order.begin() + count);
      want.insert(want.end(), order.begin(), order.begin() + count);
    }
    std::int32_t* chosen = chosen_.fill(std::vector<std::int32_t>(want.size(), -1));
    LaunchList list;
    record_choose_clusters(list, {values_.fill(scores), chosen, clusters, clusters, count}, outputs);
    list.run(nullptr);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(std::vector<std::int32_t>(chosen, chosen + want.size()), want) << "trial " << trial;
  }
}

}  // namespace
}  // namespace draftwerk::cuda
