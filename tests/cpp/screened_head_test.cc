#include "backend/cpu/screened_head.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "backend/cpu/activations.h"
#include "backend/cpu/cpu_backend_impl.h"
#include "cpu_backend_fixture.h"
#include "random_blocks.h"

namespace draftwerk {
namespace {

constexpr int kColumns = 128;
constexpr int kVocabulary = 5000;

// Two backends with the same head and states, of which one screens it.
class ScreenedChoice : public testing::TestWithParam<cpu::Isa> {
 protected:
  static constexpr int kRows = 8;

  ScreenedChoice() {
    scale_.resize(kColumns);
    // As of the models: a few columns hold most of a state.
    for (int c = 0; c < kColumns; ++c) scale_[static_cast<std::size_t>(c)] = c % 9 == 0 ? 20.0F : 1.0F;
    blocks_ = cpu::random_blocks(WeightType::q8_0, std::int64_t{kVocabulary} * kColumns, random_);
  }

  void upload_head() {
    for (auto* one : {&plain_, &screened_}) {
      one->backend = std::make_unique<cpu::CpuBackend>(2, GetParam(), cpu::Screening::always);
      one->head = upload(*one->backend, WeightType::q8_0, kVocabulary, kColumns, blocks_);
      one->backend->reserve(kRows, kRows, kColumns, kVocabulary);
    }
    screened_.backend->screen_head(*screened_.head, {scale_.data(), 1e-6F});
    screenable_steps_ = 0;
  }

  // States as a norm of that scale makes them, each of which shall choose a row of the head with some confidence. The
  // columns that lose something have so much of them.
  std::vector<float> random_states(float confidence, float lossy = 1.0F) {
    std::vector<float> states = cpu::random_values(std::int64_t{kRows} * kColumns, random_);
    const std::vector<float> rows = cpu::values_of_rows(WeightType::q8_0, kVocabulary, kColumns, blocks_);
    for (int r = 0; r < kRows; ++r) {
      const std::size_t token = random_() % kVocabulary;
      for (int c = 0; c < kColumns; ++c) {
        float& value = states[static_cast<std::size_t>(r * kColumns + c)];
        value = (value + confidence * rows[token * kColumns + static_cast<std::size_t>(c)]) *
                scale_[static_cast<std::size_t>(c)] * 0.1F * (c % 9 == 0 ? 1.0F : lossy);
      }
    }
    return states;
  }

  // What groups of random drafts accept, on one of the backends. Drafts are what the row chooses half of the time.
  std::vector<VerifyResult> verify(Backend& backend, const Weight& head, std::vector<float> states,
                                   const std::vector<VerifyGroup>& groups, float softcap) {
    PlainStep step(kRows, kVocabulary);
    step.outputs.resize(kRows);
    std::iota(step.outputs.begin(), step.outputs.end(), 0);
    backend.begin(step.rows(), {});
    backend.head({states.data(), kColumns}, head, softcap);
    std::vector<VerifyResult> results(groups.size());
    backend.verify(groups, results);
    return results;
  }

  // Both give the same tokens for these states, whatever is drafted.
  void expect_the_same(const std::vector<float>& states, const SamplingParams& sampling, float softcap = 0.0F) {
    // One row at a time says what each chooses; then groups whose drafts are partly right, chains and trees.
    std::vector<VerifyGroup> alone(kRows);
    for (int r = 0; r < kRows; ++r) {
      VerifyGroup& group = alone[static_cast<std::size_t>(r)];
      group.first_output = r;
      group.position = 100 + r;
      group.sampling = &sampling;
    }
    const auto want = verify(*plain_.backend, *plain_.head, states, alone, softcap);
    const auto got = verify(*screened_.backend, *screened_.head, states, alone, softcap);
    for (std::size_t r = 0; r < kRows; ++r) ASSERT_EQ(got[r].tokens, want[r].tokens) << "row " << r;

    std::vector<TokenId> drafts(kRows);
    std::vector<std::int32_t> parents(kRows);
    for (int r = 1; r < kRows; ++r) {
      const auto at = static_cast<std::size_t>(r - 1);
      drafts[at] = random_() % 4 != 0 ? want[at].tokens[0] : static_cast<TokenId>(random_() % kVocabulary);
      parents[at] = r - 2;
    }
    drafts[4] = (drafts[3] + 1) % kVocabulary;  // beside draft 3, in a tree
    parents[4] = parents[3];
    const std::vector<std::int32_t> tree(parents.begin(), parents.begin() + 5);
    for (const bool is_tree : {false, true}) {
      std::vector<VerifyGroup> groups(1);
      groups[0].sampling = &sampling;
      groups[0].position = 100;
      groups[0].drafts = std::span(drafts).first(5);
      if (is_tree) groups[0].parents = tree;
      for (int r = 6; r < kRows; ++r) groups.push_back(alone[static_cast<std::size_t>(r)]);
      const auto expected = verify(*plain_.backend, *plain_.head, states, groups, softcap);
      const auto found = verify(*screened_.backend, *screened_.head, states, groups, softcap);
      for (std::size_t g = 0; g < groups.size(); ++g) {
        ASSERT_EQ(found[g].tokens, expected[g].tokens) << "group " << g;
        ASSERT_EQ(found[g].drafts, expected[g].drafts) << "group " << g;
      }
    }
    const bool among_few = sampling.top_k > 0 && sampling.top_k <= cpu::kMostChosenAmong;
    if (sampling.temperature <= 0.0F || among_few) screenable_steps_ += 3;
  }

  SamplingParams random_sampling() {
    SamplingParams sampling;
    if (random_() % 3 == 0) return sampling;
    const float temperatures[] = {0.01F, 0.3F, 1.0F, 2.0F, 5.0F, 30.0F};
    sampling.temperature = temperatures[random_() % 6];
    const int ks[] = {1, 2, 20, 64, 256, 0, 300, kVocabulary};
    sampling.top_k = ks[random_() % 8];
    const float ps[] = {1.0F, 0.95F, 0.5F, 1e-6F};
    sampling.top_p = ps[random_() % 4];
    sampling.min_p = random_() % 3 == 0 ? 0.1F : 0.0F;
    sampling.seed = random_();
    return sampling;
  }

  struct One {
    std::unique_ptr<cpu::CpuBackend> backend;
    std::unique_ptr<Weight> head;
  };
  std::mt19937 random_{11};
  std::vector<float> scale_;
  std::vector<std::byte> blocks_;
  One plain_;
  One screened_;
  std::int64_t screenable_steps_ = 0;  // since there is a head
};

TEST_P(ScreenedChoice, IsThatOfAllLogits) {
  upload_head();
  for (int round = 0; round < 40; ++round) {
    const float confidences[] = {0.0F, 0.5F, 1.0F, 3.0F};
    const float lossy[] = {1.0F, 0.1F, 0.01F};
    const std::vector<float> states = random_states(confidences[random_() % 4], lossy[random_() % 3]);
    ASSERT_NO_FATAL_FAILURE(expect_the_same(states, random_sampling(), round % 3 == 0 ? 30.0F : 0.0F)) << round;
  }
  EXPECT_GT(screenable_steps_, 60);
  EXPECT_EQ(screened_.backend->screened_steps(), screenable_steps_);
}

TEST_P(ScreenedChoice, TakesTheLowestOfEqualTokens) {
  // Rows that are equal, near each other and far apart.
  const std::size_t row_bytes = blocks_.size() / kVocabulary;
  for (int copy = 0; copy < 40; ++copy) {
    const std::size_t from = random_() % kVocabulary;
    for (int i = 0; i < 20; ++i) {
      const std::size_t to = i % 2 == 0 ? std::min<std::size_t>(from + static_cast<std::size_t>(i), kVocabulary - 1)
                                        : random_() % kVocabulary;
      std::copy_n(blocks_.begin() + static_cast<std::ptrdiff_t>(from * row_bytes), row_bytes,
                  blocks_.begin() + static_cast<std::ptrdiff_t>(to * row_bytes));
    }
  }
  upload_head();
  for (int round = 0; round < 30; ++round) {
    // A softcap this small makes all large logits equal.
    const float softcap = round % 2 == 0 ? 0.0F : 0.05F;
    ASSERT_NO_FATAL_FAILURE(expect_the_same(random_states(3.0F), random_sampling(), softcap)) << round;
  }
  EXPECT_GT(screenable_steps_, 45);
  EXPECT_EQ(screened_.backend->screened_steps(), screenable_steps_);
}

TEST_P(ScreenedChoice, OfStatesThatNoBoundHoldsFor) {
  upload_head();
  const float values[] = {
      std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e38F, 1e30F, 1e-38F, 0.0F};
  for (const float value : values) {
    std::vector<float> states = random_states(1.0F);
    for (int r = 0; r < kRows; r += 3) {
      for (int c = 0; c < kColumns; c += value == 0.0F ? 1 : 5) {
        states[static_cast<std::size_t>(r * kColumns + c)] = value;
      }
    }
    for (int i = 0; i < 6; ++i) {
      ASSERT_NO_FATAL_FAILURE(expect_the_same(states, random_sampling(), i % 2 == 0 ? 0.0F : 30.0F)) << value;
    }
  }
  // Where no bound holds for a row, all logits are computed after all.
  EXPECT_GT(screened_.backend->screened_steps(), 0);
  EXPECT_LT(screened_.backend->screened_steps(), screenable_steps_);
}

TEST_P(ScreenedChoice, OfWeightsThatNoBoundHoldsFor) {
  for (const std::uint16_t bits : {0x7C00, 0x7E00, 0x7BFF, 0x0001}) {  // infinity, NaN, the largest and the least
    blocks_ = cpu::random_blocks(WeightType::q8_0, std::int64_t{kVocabulary} * kColumns, random_);
    for (int row = 0; row < kVocabulary; row += 777) {
      std::memcpy(blocks_.data() + static_cast<std::size_t>(row) * (blocks_.size() / kVocabulary), &bits, sizeof bits);
    }
    upload_head();
    for (int i = 0; i < 5; ++i)
      ASSERT_NO_FATAL_FAILURE(expect_the_same(random_states(1.0F), random_sampling())) << bits;
    const bool finite = std::isfinite(cpu::half_to_float(bits));
    EXPECT_EQ(screened_.backend->screened_steps(), finite ? screenable_steps_ : 0) << bits;
  }
}

TEST_P(ScreenedChoice, LeavesWhatElseIsAskedForToAllLogits) {
  upload_head();
  const std::vector<float> states = random_states(1.0F);
  const std::vector<TokenId> banned = {17, 18};
  TokenHistory history;
  for (TokenId token = 0; token < 2000; ++token) history[token] = {true, 1};
  std::vector<SamplingParams> ways(5);
  ways[0].logprobs = 5;
  ways[1].repetition_penalty = 1.5F;
  ways[2].logit_bias = {{123, 50.0F}};
  ways[3].temperature = 0.8F;  // of all tokens
  for (std::size_t way = 0; way < ways.size(); ++way) {
    std::vector<VerifyGroup> groups(1);
    groups[0].sampling = &ways[way];
    if (ways[way].needs_history()) groups[0].history = &history;
    if (way == 4) {
      SamplingParams greedy;
      std::vector<VerifyGroup> first(1);
      first[0].sampling = &greedy;
      const TokenId best = verify(*plain_.backend, *plain_.head, states, first, 0.0F)[0].tokens[0];
      const std::vector<TokenId> the_best = {best};
      groups[0].banned = the_best;
      groups[0].banned_tokens = 1;
      EXPECT_NE(verify(*screened_.backend, *screened_.head, states, groups, 0.0F)[0].tokens[0], best);
      continue;
    }
    const auto want = verify(*plain_.backend, *plain_.head, states, groups, 0.0F);
    const auto got = verify(*screened_.backend, *screened_.head, states, groups, 0.0F);
    EXPECT_EQ(got[0].tokens, want[0].tokens);
    EXPECT_EQ(got[0].logprobs, want[0].logprobs);
  }
  EXPECT_EQ(screened_.backend->screened_steps(), 0);
}

TEST_P(ScreenedChoice, LeavesEmbeddingAndLogitsAsTheyWere) {
  upload_head();
  std::vector<float> states = random_states(1.0F);
  PlainStep step(kRows, kVocabulary);
  const std::size_t outputs = step.outputs.size();
  std::vector<std::vector<float>> embedded;
  std::vector<std::vector<float>> logits;
  for (auto* one : {&plain_, &screened_}) {
    one->backend->begin(step.rows(), {});
    embedded.emplace_back(static_cast<std::size_t>(kRows * kColumns));
    one->backend->embed(*one->head, 2.5F, {embedded.back().data(), kColumns});
    one->backend->head({states.data(), kColumns}, *one->head, 30.0F);
    logits.emplace_back(outputs * kVocabulary);
    one->backend->read_logits(logits.back());
  }
  EXPECT_EQ(embedded[0], embedded[1]);
  EXPECT_EQ(logits[0], logits[1]);
  EXPECT_EQ(plain_.head->bytes(), screened_.head->bytes());
}

// Activations of other products are not in the order of its columns.
TEST(SplitHead, IsForNoOtherProduct) {
  constexpr int kSize = 64;
  cpu::CpuBackend backend(1, cpu::Isa::portable);
  std::mt19937 random(5);
  const auto blocks = cpu::random_blocks(WeightType::q8_0, kSize * kSize, random);
  const auto split = upload(backend, WeightType::q8_0, kSize, kSize, blocks);
  const auto plain = upload(backend, WeightType::q8_0, kSize, kSize, blocks);
  backend.reserve(1, 1, kSize, kSize);
  const std::vector<float> ones(kSize, 1.0F);
  const Norm norm{ones.data(), 1e-6F};
  backend.screen_head(*split, norm);
  PlainStep step(1, kSize);
  backend.begin(step.rows(), {});
  std::vector<float> values(kSize, 1.0F);
  std::vector<float> other(kSize, 1.0F);
  const Tensor x{values.data(), kSize};
  const Tensor y{other.data(), kSize};
  const Projection projection{split.get(), y};
  EXPECT_THROW(backend.project(x, nullptr, std::span(&projection, 1)), std::logic_error);
  EXPECT_THROW(backend.project_geglu(x, norm, *split, *plain, y), std::logic_error);
  EXPECT_THROW(backend.project_geglu(x, norm, *plain, *split, y), std::logic_error);
  EXPECT_THROW(backend.project_gelu(x, *split, x, y), std::logic_error);
  EXPECT_THROW(backend.project_add(x, *split, norm, y, 1.0F), std::logic_error);
  SparseHead sparse;
  sparse.weight = split.get();
  EXPECT_THROW(backend.head(x, sparse), std::logic_error);
  sparse.weight = plain.get();
  sparse.centroids = split.get();
  sparse.chosen = 1;
  EXPECT_THROW(backend.head(x, sparse), std::logic_error);
}

INSTANTIATE_TEST_SUITE_P(Isas, ScreenedChoice, testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return std::string(cpu::isa_name(info.param)); });

}  // namespace

namespace cpu {
namespace {

// A head of q8_0 by itself; `scale` [columns] is that of the norm before it.
struct Head {
  Head(const std::vector<std::byte>& blocks, int vocabulary, const std::vector<float>& scale)
      : weight(pack(blocks, vocabulary, static_cast<std::int64_t>(scale.size()), arena)),
        split(weight, scale.data(), arena, pool) {}

  static CpuWeight pack(const std::vector<std::byte>& blocks, int vocabulary, std::int64_t columns,
                        WeightArena& arena) {
    PackedMatrix matrix{WeightType::q8_0, vocabulary, columns, panel_bytes(WeightType::q8_0, columns), nullptr};
    MemorySlice memory = arena.take(static_cast<std::size_t>(panel_count(vocabulary)) * matrix.panel_bytes);
    pack_rows(WeightType::q8_0, columns, vocabulary, WeightType::q8_0, blocks.data(), memory.data);
    matrix.data = memory.data;
    return {WeightType::q8_0, matrix, std::move(memory)};
  }
  [[nodiscard]] std::unique_ptr<ScreenedHead> screened(Isa isa, int outputs, Screening screening = Screening::always) {
    return std::make_unique<ScreenedHead>(split, isa, matmul_kernels(isa), layer_kernels(isa), pool, outputs,
                                          screening);
  }

  WorkerPool pool{2};
  WeightArena arena;
  CpuWeight weight;
  SplitHead split;
};

// The bounds themselves.
class ScreenedBounds : public testing::TestWithParam<Isa> {};

TEST_P(ScreenedBounds, AreNeverBelowTheLogits) {
  std::mt19937 random(3);
  for (int round = 0; round < 20; ++round) {
    const int columns = kBlock * static_cast<int>(1 + random() % 20);
    const int vocabulary = 300 + static_cast<int>(random() % 700);
    const int outputs = 1 + static_cast<int>(random() % 10);
    const MatmulKernels& matmul = matmul_kernels(GetParam());
    const std::vector<std::byte> blocks = random_blocks(WeightType::q8_0, std::int64_t{vocabulary} * columns, random);
    Head head(blocks, vocabulary, random_values(columns, random));
    const auto screened = head.screened(GetParam(), outputs);

    std::vector<float> states = random_values(std::int64_t{outputs} * columns, random);
    // Some are as adverse as can be: along what a row lost, so that the bound is all but reached.
    ActivationScratch scratch;
    scratch.resize(outputs, columns);
    for (int r = 0; r < outputs; ++r) {
      float* state = &states[static_cast<std::size_t>(r * columns)];
      if (r % 2 == 0) {
        const std::size_t row = random() % static_cast<std::size_t>(vocabulary);
        for (int c = 0; c < columns; ++c) {
          const std::size_t at = row * static_cast<std::size_t>(columns) + static_cast<std::size_t>(c);
          const unsigned byte = std::to_integer<unsigned>(blocks[at / kBlock * (2 + kBlock) + 2 + at % kBlock]) + 128U;
          state[c] = static_cast<float>(static_cast<int>(byte & 15U) - 8);
        }
      }
      scratch.quantize(matmul, r, columns, 0, columns, state);
      scratch.split(head.split.columns(), r, columns);
    }
    const int chunks = (vocabulary + kLogitChunk - 1) / kLogitChunk;
    std::vector<float> bounds(static_cast<std::size_t>(outputs * vocabulary));
    std::vector<float> maxima(static_cast<std::size_t>(outputs * chunks));
    const LogitRows rows{bounds.data(), vocabulary, vocabulary, maxima.data(), chunks};
    const Activations x = scratch.view(columns, true, false);
    for (const float softcap : {0.0F, 30.0F, 0.01F}) {
      screened->bound(x, outputs, softcap, rows);
      std::vector<float> logits(bounds.size());
      matmul.matmul(head.weight.matrix(), 0, panel_count(vocabulary), x, outputs, logits.data(), vocabulary);
      for (int r = 0; r < outputs; ++r) {
        layer_kernels(GetParam()).softcap_max(&logits[static_cast<std::size_t>(r * vocabulary)], vocabulary, softcap);
        for (int n = 0; n < vocabulary; ++n) {
          const auto at = static_cast<std::size_t>(r * vocabulary + n);
          ASSERT_GE(bounds[at], logits[at]) << "row " << r << ", token " << n << ", softcap " << softcap;
          ASSERT_GE(maxima[static_cast<std::size_t>(r * chunks + n / kLogitChunk)], bounds[at]);
        }
      }
    }
  }
}

// A head whose last row is the same in every block, up to the order of its columns, and a state to go with it. `entry`
// gives {value, state} for each place of a block, and whether it is whole.
struct AdverseRow {
  static constexpr int kRow = kPanel - 1;

  template <typename Entry>
  AdverseRow(Isa isa, int blocks, std::uint16_t scale_bits, const Entry& entry) : columns(blocks * kBlock) {
    std::vector<float> scale(static_cast<std::size_t>(columns));
    for (std::size_t c = 0; c < scale.size(); ++c) scale[c] = c % kBlock < 8 ? 20.0F : 1.0F;
    std::vector<float> importance = scale;
    for (float& value : importance) value *= value;
    const SplitColumns split = split_columns(importance);
    constexpr std::size_t kBytes = 2 + kBlock;
    std::vector<std::byte> rows(kPanel * static_cast<std::size_t>(blocks) * kBytes);
    std::byte* block = &rows[static_cast<std::size_t>(kRow * blocks) * kBytes];
    std::vector<float> state(scale.size());
    for (std::size_t b = 0; b < split.whole.size(); ++b, block += kBytes) {
      std::memcpy(block, &scale_bits, sizeof scale_bits);
      for (int place = 0; place < kBlock; ++place) {
        const std::size_t column = split.order[b * kBlock + static_cast<std::size_t>(place)];
        const auto [value, x] = entry(place, place < split.whole[b] * kGroupColumns);
        block[2 + column] = static_cast<std::byte>(value);
        state[b * kBlock + column] = x;
      }
    }
    head = std::make_unique<Head>(rows, kPanel, scale);
    const MatmulKernels& matmul = matmul_kernels(isa);
    scratch.resize(1, columns);
    scratch.quantize(matmul, 0, columns, 0, columns, state.data());
    scratch.split(head->split.columns(), 0, columns);
    logits.resize(kPanel);
    matmul.matmul(head->weight.matrix(), 0, 1, scratch.view(columns, true, false), 1, logits.data(), kPanel);
    screened = head->screened(isa, 1);
    bounds.resize(kPanel);
    screened->bound(scratch.view(columns, true, false), 1, 0.0F, {bounds.data(), kPanel, kPanel, &maximum, 1});
  }

  int columns;
  std::unique_ptr<Head> head;
  ActivationScratch scratch;
  std::unique_ptr<ScreenedHead> screened;
  std::vector<float> logits;
  std::vector<float> bounds;
  float maximum = 0.0F;
};

// Nothing but rounding is between a bound and its logit where the state is along what the row lost; and blocks that are
// alike are rounded alike, so that a product goes astray with each.
TEST_P(ScreenedBounds, CoverWhatProductsRound) {
  std::mt19937 random(3);
  for (int round = 0; round < 1000; ++round) {
    int lost[kBlock];
    for (int& one : lost) one = static_cast<int>(random() % 16) - 8;
    const float size = 0.125F + 0x1p-19F * static_cast<float>(random() % 65536);
    const auto scale_bits = static_cast<std::uint16_t>(0x2000 | (random() & 1023U));
    const AdverseRow row(GetParam(), 1 + static_cast<int>(random() % 40), scale_bits, [&](int place, bool whole) {
      const int value = whole ? 127 : lost[place];
      return std::pair(whole ? value : value + 8, size * static_cast<float>(whole ? value : 15 * value));
    });
    ASSERT_GE(row.bounds[AdverseRow::kRow], row.logits[AdverseRow::kRow]) << "round " << round;
  }
}

// Scales whose product overflows make NaN of a coarse part that is zero, which no bound is, and infinity of the row.
TEST_P(ScreenedBounds, AreNoneWhereLogitsMightOverflow) {
  AdverseRow row(GetParam(), 1, 0x7BFF, [&](int place, bool) {
    if (place == kBlock - 2) return std::pair(9, 1e36F);
    if (place == kBlock - 1) return std::pair(-8, 1e36F);
    return std::pair(0, 0.0F);
  });
  EXPECT_EQ(row.logits[AdverseRow::kRow], std::numeric_limits<float>::infinity());
  const SamplingParams greedy;
  VerifyGroup group;
  group.sampling = &greedy;
  EXPECT_FALSE(row.screened->choose(group, 0, {}, 0).has_value());
}

TEST(ScreeningPayoff, PausesWhereWorkIsTooMuchAndTriesAnew) {
  ScreeningPayoff payoff;
  for (int step = 0; step < 100; ++step) {
    EXPECT_TRUE(payoff.next_step());
    payoff.add(0.25);
  }
  // What takes a little too much in the long run, and what takes as much as all logits at once.
  for (const double work : {0.35, 1.0}) {
    int screened = 0;
    int not_screened = 0;
    for (int step = 0; step < 1000; ++step) {
      if (payoff.next_step()) {
        ++screened;
        payoff.add(work);
      } else {
        ++not_screened;
      }
    }
    EXPECT_GE(screened, 10) << work;
    EXPECT_GE(not_screened, 64 * 5) << work;
  }
  // After the pause it costs little again.
  int steps = 0;
  while (!payoff.next_step()) ++steps;
  EXPECT_LT(steps, 64);
  for (int step = 0; step < 1000; ++step) {
    payoff.add(0.1);
    EXPECT_TRUE(payoff.next_step());
  }
}

TEST(ScreenedHead, IsNotWorthItForManySampledSequences) {
  std::mt19937 random(7);
  Head head(random_blocks(WeightType::q8_0, 512 * kBlock, random), 512, std::vector<float>(kBlock, 1.0F));
  SamplingParams sampling;
  std::vector<VerifyGroup> groups(9);
  for (VerifyGroup& group : groups) group.sampling = &sampling;
  const auto always = head.screened(Isa::portable, 9);
  const auto screened = head.screened(Isa::portable, 9, Screening::where_it_pays);
  EXPECT_TRUE(screened->takes(groups, 9));
  sampling.temperature = 1.0F;
  sampling.top_k = 64;
  EXPECT_FALSE(screened->takes(groups, 9));
  EXPECT_TRUE(always->takes(groups, 9));
  groups.pop_back();
  EXPECT_TRUE(screened->takes(groups, 8));
}

TEST(SplitHead, KnowsThatRowsHaveNoBound) {
  std::mt19937 random(7);
  std::vector<std::byte> blocks = random_blocks(WeightType::q8_0, 64 * kBlock, random);
  for (const bool finite : {true, false}) {
    if (!finite) {
      const std::uint16_t infinite = 0x7C00;
      std::memcpy(blocks.data() + 33 * (2 + kBlock), &infinite, sizeof infinite);
    }
    Head head(blocks, 64, std::vector<float>(kBlock, 1.0F));
    EXPECT_EQ(std::isfinite(head.split.longest()), finite);
    const SamplingParams greedy;
    VerifyGroup group;
    group.sampling = &greedy;
    EXPECT_EQ(head.screened(Isa::portable, 1)->takes(std::span(&group, 1), 1), finite);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, ScreenedBounds, testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace cpu
}  // namespace draftwerk
