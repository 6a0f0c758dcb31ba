// Trees of drafts through the CPU backend: a row of a tree gives bit by bit what it gives as a row of a chain that has
// the same tokens at the same positions, and its keys and values, once moved there, are those of that chain.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "random_blocks.h"
#include "tiny_model.h"

namespace draftwerk {
namespace {

using cpu::Isa;

/// Rows of a segment, row i + 1 behind row parents[i] + 1.
struct Tree {
  [[nodiscard]] int rows() const { return static_cast<int>(parents.size()) + 1; }
  /// From row 0 to `row`.
  [[nodiscard]] std::vector<int> path(int row) const {
    std::vector<int> rows = {row};
    for (; row > 0; rows.push_back(row)) row = parents[static_cast<std::size_t>(row) - 1] + 1;
    std::reverse(rows.begin(), rows.end());
    return rows;
  }
  [[nodiscard]] int depth(int row) const { return static_cast<int>(path(row).size()) - 1; }
  [[nodiscard]] std::vector<int> leaves() const {
    std::vector<int> all;
    for (int row = 0; row < rows(); ++row) {
      if (std::find(parents.begin(), parents.end(), row - 1) == parents.end()) all.push_back(row);
    }
    return all;
  }

  std::vector<std::int32_t> parents;
};

Tree random_tree(int rows, std::mt19937& random) {
  Tree tree;
  const unsigned bushy = 1 + random() % 4U;
  for (int i = 0; i < rows - 1; ++i) {
    const bool deeper = random() % 4U >= bushy;
    tree.parents.push_back(deeper ? i - 1 : static_cast<std::int32_t>(random() % static_cast<unsigned>(i + 1)) - 1);
  }
  return tree;
}

struct RowInput {
  std::vector<float> query, key, value;
};

/// Rows of one sequence from slot `first` on; no parents: a chain.
struct Part {
  int sequence = 0;
  std::int64_t first = 0;
  std::vector<const RowInput*> rows;
  std::vector<std::int32_t> parents;
};

/// One attention layer over the pages of a few sequences, which lie in disorder and hold NaN wherever nothing was
/// stored.
class AttentionLayer {
 public:
  static constexpr int kSequences = 4;
  static constexpr int kPages = 24;

  AttentionLayer(int threads, Isa isa, int query_heads, int kv_heads, int head_dim, KvType type, int window,
                 std::mt19937& random)
      : backend_(make_cpu_backend(threads, isa)),
        query_heads_(query_heads),
        window_(window),
        scale_(cpu::random_values(head_dim, random)) {
    backend_->reserve(512, 1, query_heads * head_dim, 16);
    const std::size_t bytes = backend_->kv_bytes(kv_heads, head_dim, type);
    kv_ = {1, bytes, 0, kv_heads, head_dim, type};  // values first: offsets must count
    arena_ = backend_->allocate(2 * bytes * kSequences * kPages);
    std::memset(arena_->data(), 0xFF, arena_->bytes());
    for (std::size_t p = 0; p < pages_.size(); ++p) pages_[p] = static_cast<PageId>(p * 2 * bytes / kPageUnit);
    std::shuffle(pages_.begin(), pages_.end(), random);
    for (int i = 0; i < head_dim / 2; ++i) frequency_.push_back(std::pow(0.97F, static_cast<float>(i)));
    backend_->begin({}, arena());
  }

  RowInput random_input(std::mt19937& random) const {
    const int width = kv_.heads * kv_.head_dim;
    return {cpu::random_values(query_heads_ * kv_.head_dim, random), cpu::random_values(width, random),
            cpu::random_values(width, random)};
  }

  /// What the rows attend to, part after part.
  std::vector<std::vector<float>> run(const std::vector<Part>& parts) {
    std::vector<std::int64_t> positions;
    std::vector<Segment> segments;
    std::vector<std::vector<PageId>> tables;
    RowInput all;
    for (const Part& part : parts) {
      tables.push_back(table(part.sequence));
      // Pages that lie wholly before the window are gone.
      for (std::size_t p = 0; window_ > 0 && p < tables.back().size(); ++p) {
        if (static_cast<std::int64_t>(p + 1) * kPageSize <= part.first - window_ + 1) tables.back()[p] = kNoPage;
      }
      segments.push_back({static_cast<int>(positions.size()),
                          static_cast<int>(part.rows.size()),
                          part.first,
                          {nullptr, tables.back().data()},
                          part.parents});
      const Tree tree{part.parents};
      for (std::size_t r = 0; r < part.rows.size(); ++r) {
        const bool chain = part.parents.empty();
        positions.push_back(part.first + (chain ? static_cast<int>(r) : tree.depth(static_cast<int>(r))));
        const RowInput& input = *part.rows[r];
        all.query.insert(all.query.end(), input.query.begin(), input.query.end());
        all.key.insert(all.key.end(), input.key.begin(), input.key.end());
        all.value.insert(all.value.end(), input.value.begin(), input.value.end());
      }
    }
    const std::vector<TokenId> tokens(positions.size());
    backend_->begin({tokens, positions, segments, {}}, arena());
    const int query_width = query_heads_ * kv_.head_dim;
    const int kv_width = kv_.heads * kv_.head_dim;
    const Norm norm{scale_.data(), 1e-6F};
    std::vector<float> output(all.query.size());
    backend_->append_kv({all.query.data(), query_width}, {all.key.data(), kv_width}, {all.value.data(), kv_width},
                        query_heads_, norm, norm, nullptr, {frequency_.data()}, kv_);
    backend_->attend({all.query.data(), query_width}, query_heads_, kv_, {window_}, 0.3F, {output.data(), query_width});
    std::vector<std::vector<float>> rows;
    for (std::size_t r = 0; r < positions.size(); ++r) {
      const float* row = output.data() + r * static_cast<std::size_t>(query_width);
      rows.emplace_back(row, row + query_width);
    }
    return rows;
  }

  void move(int sequence, const std::vector<std::pair<std::int64_t, std::int64_t>>& from_to) {
    const std::vector<PageId> pages = table(sequence);
    std::vector<KvMove> moves;
    for (const auto& [from, to] : from_to) moves.push_back({{nullptr, pages.data()}, from, to});
    backend_->move_kv({&kv_, 1}, moves);
  }

  [[nodiscard]] std::vector<std::byte> content() const {
    const auto* bytes = static_cast<const std::byte*>(arena_->data());
    return {bytes, bytes + arena_->bytes()};
  }
  void restore(const std::vector<std::byte>& content) { std::copy(content.begin(), content.end(), arena().base); }

  [[nodiscard]] KvArena arena() const { return {static_cast<std::byte*>(arena_->data())}; }
  [[nodiscard]] const KvLayer& kv() const { return kv_; }
  [[nodiscard]] Backend& backend() const { return *backend_; }
  [[nodiscard]] std::vector<PageId> table(int sequence) const {
    return {pages_.begin() + std::ptrdiff_t{sequence} * kPages, pages_.begin() + std::ptrdiff_t{sequence + 1} * kPages};
  }

 private:
  std::unique_ptr<Backend> backend_;
  int query_heads_;
  int window_;
  std::vector<float> scale_;
  std::vector<float> frequency_;
  KvLayer kv_;
  std::unique_ptr<Buffer> arena_;
  std::vector<PageId> pages_ = std::vector<PageId>(kSequences * kPages);
};

class DraftTreeOnIsa : public ::testing::TestWithParam<Isa> {
 protected:
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  std::mt19937 random_{31};
};

TEST_P(DraftTreeOnIsa, RowsAttendAsInAChainOfTheirPath) {
  struct Shape {
    int query_heads, kv_heads, head_dim;
  };
  const Shape shapes[] = {{4, 1, 64}, {4, 2, 32}, {3, 3, 16}, {8, 1, 256}, {2, 2, 48}};
  // The last token's position: at the ends of pages and chunks, and between them.
  const int firsts[] = {0, 1, 9, 15, 16, 60, 118, 124, 126, 127, 128, 143, 200, 252, 255};
  for (int round = 0; round < 60; ++round) {
    const Shape& shape = shapes[round % 5];
    const KvType type = round % 2 == 0 ? KvType::f16 : KvType::f32;
    const int window = std::vector<int>{0, 1, 3, 17, 128, 200}[static_cast<std::size_t>(pick(0, 5))];
    AttentionLayer layer(pick(1, 3), GetParam(), shape.query_heads, shape.kv_heads, shape.head_dim, type, window,
                         random_);
    const int length = round % 10 == 9 ? 100 : pick(2, 17);
    // Three trees, and a prompt of as many rows among them.
    std::vector<Tree> trees;
    std::vector<std::vector<RowInput>> inputs;
    std::vector<Part> parts;
    for (int s = 0; s < AttentionLayer::kSequences; ++s) {
      const std::int64_t first = firsts[pick(0, 14)];
      std::vector<RowInput> context;
      Part before{s, 0, {}, {}};
      for (std::int64_t p = 0; p < first; ++p) context.push_back(layer.random_input(random_));
      for (const RowInput& row : context) before.rows.push_back(&row);
      if (first > 0) layer.run({before});
      trees.push_back(s == 1 ? Tree{} : random_tree(length, random_));
      inputs.emplace_back();
      for (int r = 0; r < (s == 1 ? length : trees.back().rows()); ++r) {
        inputs.back().push_back(layer.random_input(random_));
      }
      parts.push_back({s, first, {}, trees.back().parents});
    }
    // What a leaf of the first tree holds must not show elsewhere.
    const int poisoned = type == KvType::f32 ? trees[0].leaves().back() : -1;
    if (poisoned > 0) {
      std::fill(inputs[0].back().value.begin(), inputs[0].back().value.end(), std::numeric_limits<float>::infinity());
      std::fill(inputs[0].back().key.begin(), inputs[0].back().key.end(), std::numeric_limits<float>::quiet_NaN());
    }
    for (std::size_t s = 0; s < parts.size(); ++s) {
      for (const RowInput& row : inputs[s]) parts[s].rows.push_back(&row);
    }
    const std::vector<std::byte> before = layer.content();
    const std::vector<std::vector<float>> outputs = layer.run(parts);
    const std::vector<std::byte> after = layer.content();

    std::size_t first_row = 0;
    for (std::size_t s = 0; s < parts.size(); first_row += parts[s].rows.size(), ++s) {
      const std::int64_t first = parts[s].first;
      for (const int leaf : trees[s].parents.empty() ? std::vector<int>{static_cast<int>(parts[s].rows.size()) - 1}
                                                     : trees[s].leaves()) {
        std::vector<int> path(parts[s].rows.size());
        std::iota(path.begin(), path.end(), 0);
        if (!trees[s].parents.empty()) path = trees[s].path(leaf);
        if (s == 0 && leaf == poisoned) path.pop_back();
        Part chain{parts[s].sequence, first, {}, {}};
        for (const int row : path) chain.rows.push_back(parts[s].rows[static_cast<std::size_t>(row)]);
        layer.restore(before);
        const std::vector<std::vector<float>> expected = layer.run({chain});
        for (std::size_t i = 0; i < path.size(); ++i) {
          ASSERT_TRUE(std::all_of(expected[i].begin(), expected[i].end(), [](float v) { return std::isfinite(v); }));
          ASSERT_EQ(outputs[first_row + static_cast<std::size_t>(path[i])], expected[i])
              << "round " << round << " sequence " << s << " row " << path[i] << " at " << first + static_cast<int>(i)
              << " window " << window;
        }
        // The next row, behind the chain and behind the path moved to where the chain lies.
        const RowInput next = layer.random_input(random_);
        const Part behind{parts[s].sequence, first + static_cast<std::int64_t>(path.size()), {&next}, {}};
        const std::vector<std::vector<float>> behind_chain = layer.run({behind});
        layer.restore(after);
        std::vector<std::pair<std::int64_t, std::int64_t>> moves;
        for (std::size_t i = 0; i < path.size(); ++i) moves.emplace_back(first + path[i], first + static_cast<int>(i));
        layer.move(parts[s].sequence, moves);
        ASSERT_EQ(layer.run({behind}), behind_chain) << "round " << round << " sequence " << s << " leaf " << leaf;
      }
    }
  }
}

TEST_P(DraftTreeOnIsa, MovesCopyOnePositionExactly) {
  for (const KvType type : {KvType::f16, KvType::f32}) {
    AttentionLayer layer(1, GetParam(), 6, 3, 32, type, 0, random_);
    std::vector<std::byte> expected = layer.content();
    for (std::byte& b : expected) b = static_cast<std::byte>(random_());
    layer.restore(expected);
    const std::vector<PageId> pages = layer.table(2);
    const std::size_t size = type == KvType::f16 ? 2 : 4;
    // Within a page, across pages, onto itself, and one that takes on what another has moved.
    const std::vector<std::pair<std::int64_t, std::int64_t>> moves = {{7, 3}, {40, 15}, {33, 33}, {15, 2}, {380, 16}};
    for (const auto& [from, to] : moves) {
      const auto at = [&](std::int64_t position) {
        return expected.data() + std::size_t{pages[static_cast<std::size_t>(position / 16)]} * kPageUnit;
      };
      for (std::size_t head = 0; head < 3; ++head) {
        for (std::size_t d = 0; d < 32; ++d) {
          const auto key = [&](std::int64_t position) {
            return at(position) + layer.kv().key_offset +
                   ((head * 32 + d) * 16 + static_cast<std::size_t>(position % 16)) * size;
          };
          const auto value = [&](std::int64_t position) {
            return at(position) + layer.kv().value_offset +
                   ((head * 16 + static_cast<std::size_t>(position % 16)) * 32 + d) * size;
          };
          std::copy_n(key(from), size, key(to));
          std::copy_n(value(from), size, value(to));
        }
      }
    }
    layer.move(2, moves);
    EXPECT_EQ(layer.content(), expected);
    EXPECT_THROW(layer.move(2, {{3, 4}}), std::logic_error);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, DraftTreeOnIsa, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST(DraftTree, OnlyTreesAreTaken) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1, Isa::portable);
  backend->reserve(8, 8, 32, 16);
  const std::vector<TokenId> tokens(4);
  const auto begin = [&](const std::vector<std::int64_t>& positions, const std::vector<std::int32_t>& parents) {
    const Segment segment{0, 4, 5, {nullptr, nullptr}, parents};
    backend->begin({tokens, positions, std::span(&segment, 1), {}}, {});
  };
  EXPECT_NO_THROW(begin({5, 6, 6, 7}, {-1, -1, 1}));
  EXPECT_THROW(begin({5, 6, 6, 7}, {-1, -1}), std::logic_error) << "a row without a parent";
  EXPECT_THROW(begin({5, 6, 6, 7}, {-1, -1, 2}), std::logic_error) << "a row behind itself";
  EXPECT_THROW(begin({5, 6, 6, 7}, {-2, -1, 1}), std::logic_error) << "a row behind nothing";
  EXPECT_THROW(begin({5, 6, 7, 7}, {-1, -1, 1}), std::logic_error) << "not at the position behind its parent";
  EXPECT_THROW(begin({4, 5, 5, 6}, {-1, -1, 1}), std::logic_error) << "not where the segment begins";
}

// --- whole models ----------------------------------------------------------------------------------------------------

/// The pages of one sequence of a model.
class ModelPages {
 public:
  explicit ModelPages(Gemma& model, int positions) : model_(model) {
    std::size_t offset = 0;
    for (int t = 0; t < kPageTables; ++t) {
      const std::size_t bytes = model.kv_page_shape().page_bytes[t];
      for (int p = 0; p < positions; p += kPageSize, offset += (bytes + kPageUnit - 1) / kPageUnit * kPageUnit) {
        tables_[t].push_back(static_cast<PageId>(offset / kPageUnit));
      }
    }
    arena_ = model.backend().allocate(offset);
    std::memset(arena_->data(), 0xFF, offset);
  }

  /// Logits of all rows.
  std::vector<std::vector<float>> run(std::int64_t first, const std::vector<TokenId>& tokens, const Tree& tree = {}) {
    std::vector<std::int64_t> positions;
    std::vector<int> outputs;
    for (int r = 0; r < static_cast<int>(tokens.size()); ++r) {
      positions.push_back(first + (tree.parents.empty() ? r : tree.depth(r)));
      outputs.push_back(r);
    }
    const Segment segment{
        0, static_cast<int>(tokens.size()), first, {tables_[0].data(), tables_[1].data()}, tree.parents};
    model_.forward({tokens, positions, std::span(&segment, 1), outputs}, {static_cast<std::byte*>(arena_->data())});
    const auto width = static_cast<std::size_t>(model_.config().vocabulary);
    std::vector<float> logits(tokens.size() * width);
    model_.backend().read_logits(logits);
    std::vector<std::vector<float>> rows;
    for (std::size_t r = 0; r < tokens.size(); ++r) {
      rows.emplace_back(logits.begin() + static_cast<std::ptrdiff_t>(r * width),
                        logits.begin() + static_cast<std::ptrdiff_t>((r + 1) * width));
    }
    return rows;
  }

 private:
  Gemma& model_;
  std::vector<PageId> tables_[kPageTables];
  std::unique_ptr<Buffer> arena_;
};

class DraftTreeOfModel : public ::testing::TestWithParam<std::tuple<ModelConfig (*)(), WeightType>> {};

TEST_P(DraftTreeOfModel, LogitsAreThoseOfAChain) {
  const auto& [config, type] = GetParam();
  std::mt19937 random(3);
  testing::TinyModel tiny(type, 2, 128, config());
  for (const int context : {3, 40, 125}) {
    const std::vector<TokenId> prompt = testing::random_prompt(random, context, 300);
    ModelPages pages(tiny.model(), context + 20);
    pages.run(0, prompt);
    const Tree tree = random_tree(12, random);
    const std::vector<TokenId> tokens = testing::random_prompt(random, tree.rows(), 300);
    const std::vector<std::vector<float>> logits = pages.run(context, tokens, tree);
    for (const int leaf : tree.leaves()) {
      std::vector<TokenId> chain;
      for (const int row : tree.path(leaf)) chain.push_back(tokens[static_cast<std::size_t>(row)]);
      const std::vector<std::vector<float>> expected = pages.run(context, chain);
      for (const int row : tree.path(leaf)) {
        ASSERT_EQ(logits[static_cast<std::size_t>(row)], expected[static_cast<std::size_t>(tree.depth(row))])
            << "context " << context << " row " << row;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryKind, DraftTreeOfModel,
                         ::testing::Combine(::testing::Values(&testing::tiny_config, &testing::tiny_edge_config,
                                                              &testing::tiny_dense_config,
                                                              &testing::tiny_experts_config),
                                            ::testing::Values(WeightType::f32, WeightType::q8_0)));

}  // namespace
}  // namespace draftwerk
