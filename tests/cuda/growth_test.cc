// Trees that grow on the emulated device are those that the host grows of the same candidates.
#include "backend/cuda/growth.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cpu/choosing.h"
#include "drafting/draft_tree.h"
#include "sampler_on_device.h"
#include "step_arrays.h"
#include "taken_drafts.h"

namespace draftwerk::cuda {
namespace {

using testing::DeviceArray;

int between(int least, int most, std::mt19937& random) { return std::uniform_int_distribution(least, most)(random); }

/// What a pass found for a row: up to kMaxCandidates candidates, likeliest first, at times fewer than a tree looks at.
ProposedRow random_found(const ProposeRow& place, std::mt19937& random) {
  ProposedRow found{};
  found.count = between(0, 9, random) == 0 ? between(0, 3, random) : kDraftBranches;
  found.largest = std::uniform_real_distribution(-2.0F, 2.0F)(random);
  found.mass = static_cast<std::uint64_t>(std::uniform_real_distribution(1.0, 9.0)(random) * 0x1p40);
  std::vector<TokenId> tokens(50);
  std::iota(tokens.begin(), tokens.end(), 0);
  std::shuffle(tokens.begin(), tokens.end(), random);
  std::vector<float> values;
  for (int i = 0; i < found.count; ++i) {
    found.token[i] = tokens[static_cast<std::size_t>(i)];
    const float z = found.largest - std::exponential_distribution(0.5F)(random);
    const bool greedy = place.sampling->temperature <= 0.0F;
    const float noise =
        cpu::portable::kSamplerKernels.gumbel(noise_word(place.sampling->seed, place.position, found.token[i]));
    values.push_back(greedy ? z : z + noise);
  }
  std::sort(values.rbegin(), values.rend());
  std::copy(values.begin(), values.end(), found.value);
  return found;
}

/// The same as a host hears of it.
std::vector<Candidate> candidates_of(const ProposedRow& found, const ProposeRow& place) {
  std::vector<Candidate> candidates(kDraftBranches, cpu::kNoCandidate);
  for (int i = 0; i < found.count; ++i) candidates[static_cast<std::size_t>(i)] = {found.token[i], found.value[i]};
  cpu::set_probabilities(cpu::portable::kSamplerKernels, place, cpu::log_normalizer(found.largest, found.mass),
                         candidates);
  return candidates;
}

testing::Taken host_tree(const std::vector<std::vector<Candidate>>& passes, int count, bool greedy) {
  DraftTree tree;
  tree.start(count, {}, 0.0);
  for (std::size_t p = 0; p < passes.size() && (p == 0 || tree.frontier_size() > 0); ++p) {
    tree.add(0, passes[p], choice_probabilities(passes[p], greedy));
    tree.advance_ahead();
  }
  return testing::take(tree, count);
}

// A GPU's expf, powf and log are its own: of drafts whose reaches differ by less, any may come first.
#if defined(DRAFTWERK_CUDA_EMULATION)
constexpr float kRounding = 0.0F;
#else
constexpr float kRounding = 1e-5F;
#endif

/// A draft that was found: of which pass, from 1 on, and how likely.
struct Found {
  TokenId token;
  int depth;
  float reach;
};

/// The host's tree of the likeliest drafts; where only rounding tells which is likelier, in the order of `tokens` and
/// `depths`.
testing::Taken tree_in_order(const std::vector<std::vector<Candidate>>& passes, bool greedy,
                             std::span<const TokenId> tokens, std::span<const int> depths) {
  const testing::Taken all = host_tree(passes, kMostPassesAhead * kDraftBranches, greedy);
  std::vector<Found> found;
  for (std::size_t d = 0; d < all.drafts.size(); ++d) {
    const Found before = all.parents[d] < 0 ? Found{0, 0, 1.0F} : found[static_cast<std::size_t>(all.parents[d])];
    const std::vector<Candidate>& pass = passes[static_cast<std::size_t>(before.depth)];
    const auto branch = std::ranges::find(pass, all.drafts[d], &Candidate::token) - pass.begin();
    const float chance = choice_probabilities(pass, greedy)[static_cast<std::size_t>(branch)];
    found.push_back({all.drafts[d], before.depth + 1, before.reach * chance});
  }
  for (std::size_t d = 0; d < std::min(found.size(), tokens.size()); ++d) {
    for (std::size_t other = d; other < found.size(); ++other) {
      if (other > d && found[d].reach - found[other].reach >= kRounding * found[d].reach) break;
      if (found[other].token != tokens[d] || found[other].depth != depths[d]) continue;
      std::rotate(found.begin() + static_cast<std::ptrdiff_t>(d), found.begin() + static_cast<std::ptrdiff_t>(other),
                  found.begin() + static_cast<std::ptrdiff_t>(other) + 1);
      break;
    }
  }
  found.resize(std::min(found.size(), tokens.size()));
  testing::Taken tree;
  for (const Found& draft : found) {
    // What went ahead is the first candidate of each pass.
    const auto parent = std::ranges::find_if(found, [&](const Found& one) {
      return one.depth + 1 == draft.depth && one.token == passes[static_cast<std::size_t>(one.depth) - 1][0].token;
    });
    tree.drafts.push_back(draft.token);
    tree.parents.push_back(draft.depth == 1 ? -1 : static_cast<std::int32_t>(parent - found.begin()));
  }
  return tree;
}

class Growth : public testing::InAnyOrder {};

TEST_F(Growth, IsWhatTheHostWouldHaveGrown) {
  std::mt19937 random(8);
  for (int round = 0; round < 60; ++round) {
    any_order(round);
    const int trees = between(1, 5, random);
    const int passes = between(1, kMostPassesAhead, random);
    const int proposing = padded_count(trees + between(0, 2, random));
    // The rows of a prompt, then the trees.
    const int prompt = between(1, 3, random);
    std::vector<Segment> segments = {{0, prompt, 7, {nullptr, nullptr}}};
    std::vector<TokenId> tokens(static_cast<std::size_t>(prompt), 1);
    std::vector<std::int64_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), 7);
    std::vector<int> outputs;
    std::vector<draftwerk::Growth> growths;
    std::vector<std::int32_t> chain(64);
    std::iota(chain.begin(), chain.end(), -1);
    std::vector<int> order(static_cast<std::size_t>(trees));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<SamplingParams> sampling(order.size());
    std::vector<ProposeRow> places(order.size());
    for (int t = 0; t < trees; ++t) {
      const auto proposed = static_cast<std::size_t>(order[static_cast<std::size_t>(t)]);
      const int drafts = between(1, std::min(kDraftBranches * passes, 40), random);
      const int position = between(0, 500, random);
      growths.push_back({static_cast<int>(segments.size()), static_cast<int>(proposed)});
      segments.push_back({static_cast<int>(tokens.size()),
                          drafts + 1,
                          position,
                          {nullptr, nullptr},
                          std::span(chain).first(static_cast<std::size_t>(drafts))});
      for (int r = 0; r <= drafts; ++r) {
        outputs.push_back(static_cast<int>(tokens.size()));
        tokens.push_back(r == 0 ? 3 : 0);
        positions.push_back(position + r);
      }
      sampling[proposed].temperature = between(0, 1, random) == 0 ? 0.0F : 0.8F;
      sampling[proposed].seed = static_cast<std::uint64_t>(round) * 100 + proposed;
      places[proposed].position = position + 1;
      places[proposed].sampling = &sampling[proposed];
    }
    std::vector<std::byte> arena(1);
    StepUpload upload;
    upload.reserve(static_cast<int>(tokens.size()), static_cast<int>(outputs.size()));
    upload.fill({tokens, positions, segments, outputs, growths}, {arena.data()}, {passes, proposing});

    std::vector<ProposedRow> found(static_cast<std::size_t>(passes * proposing));
    std::vector<SampledRow> proposing_rows(static_cast<std::size_t>(proposing));
    std::vector<std::vector<std::vector<Candidate>>> of_host(order.size());
    for (std::size_t t = 0; t < order.size(); ++t) {
      proposing_rows[t].way = sampling[t].temperature > 0.0F ? Way::whole : Way::greedy;
      proposing_rows[t].seed = sampling[t].seed;
      proposing_rows[t].position = places[t].position;
      for (int pass = 0; pass < passes; ++pass) {
        ProposeRow place = places[t];
        place.position += pass;
        ProposedRow& row = found[static_cast<std::size_t>(pass * proposing) + t];
        row = random_found(place, random);
        of_host[t].push_back(candidates_of(row, place));
      }
    }
    const auto padded = static_cast<std::size_t>(upload.view().outputs);
    std::vector<SampledRow> choosing(padded);
    for (std::size_t o = 0; o < padded; ++o) {
      choosing[o].way = o < outputs.size() ? Way::whole : Way::none;
      choosing[o].position = -1;
    }
    for (std::size_t t = 1; t < segments.size(); ++t) {
      const auto first = static_cast<std::size_t>(segments[t].first_row - prompt);
      choosing[first].position = segments[t].first_position + 1;
    }

    DeviceArray<ProposedRow> found_on_device;
    DeviceArray<SampledRow> proposing_on_device, choosing_on_device;
    SampledRow* told = choosing_on_device.fill(choosing);
    arrived(upload);
    const Stream stream = Stream::create();
    LaunchList list;
    grow_trees(list, upload, found_on_device.fill(found), proposing_on_device.fill(proposing_rows));
    tell_rows(list, upload.view(), told);
    list.run(stream.get());
    stream.wait();

    const StepView& view = upload.view();
    for (std::size_t g = 0; g < growths.size(); ++g) {
      const Segment& segment = segments[static_cast<std::size_t>(growths[g].segment)];
      const auto proposed = static_cast<std::size_t>(growths[g].proposed);
      const auto first = static_cast<std::size_t>(segment.first_row) + 1;
      std::vector<int> depths;
      for (std::size_t d = 0; d < segment.parents.size(); ++d) {
        depths.push_back(view.positions[first + d] - static_cast<int>(segment.first_position));
      }
      testing::Taken want = tree_in_order(of_host[proposed], sampling[proposed].temperature <= 0.0F,
                                          {view.tokens + first, depths.size()}, depths);
      // Where less was found, the others are drafts of token 0 behind the last known token.
      want.drafts.resize(segment.parents.size(), 0);
      want.parents.resize(segment.parents.size(), -1);
      EXPECT_EQ(view.tokens[segment.first_row], 3) << "the last known token";
      std::vector<std::vector<int>> paths = {{0}};
      for (int draft = 0; draft + 1 < segment.rows; ++draft) {
        const auto d = static_cast<std::size_t>(draft);
        const int row = segment.first_row + 1 + draft;
        paths.push_back(paths[static_cast<std::size_t>(want.parents[d] + 1)]);
        paths.back().push_back(draft + 1);
        const auto depth = static_cast<int>(paths.back().size()) - 1;
        ASSERT_EQ(view.tokens[row], want.drafts[d]) << "round " << round << ", tree " << g << ", draft " << draft;
        ASSERT_EQ(view.positions[row], segment.first_position + depth);
        const std::uint8_t* path = view.paths + static_cast<std::ptrdiff_t>(row) * kMaxPath;
        ASSERT_EQ(std::vector<int>(path, path + depth + 1), paths.back());
        const SampledRow& its = told[row - prompt];
        ASSERT_EQ(its.draft, want.drafts[d]);
        ASSERT_EQ(its.parent, want.parents[d] + 1);
        ASSERT_EQ(its.position, segment.first_position + 1 + depth);
      }
    }
  }
}

}  // namespace
}  // namespace draftwerk::cuda
