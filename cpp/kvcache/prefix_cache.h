// Finished blocks of tokens whose keys and values are kept for the next prompt that begins the same way.
//
// A tree per salt: a node is one block of kPageSize tokens below the block before it, and holds one reference to the
// block's page in each table. Token ids are compared one by one; a hash only finds the candidates. Tenants with
// different salts never see each other's nodes, not even by timing.
//
// A page may be evicted when no running sequence holds it. Sliding pages go one by one, in the order in which they
// slid out of the last window; whole nodes go leaf first, so a node's ancestors are always there. Both orders are
// merged by time of last use.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "kvcache/page_pool.h"

namespace draftwerk {

/// The first page that a row at `position` can see: the one of position - window + 1, or page 0 where the window
/// (positions, the row's own included; 0: unlimited) reaches back to the start.
[[nodiscard]] constexpr std::int64_t first_visible_page(std::int64_t position, int window) {
  return window == 0 || position < window ? 0 : (position - window + 1) / kPageSize;
}

/// Single-threaded. A "holder" below is a running sequence; it is known by the node of its last registered block.
class PrefixCache {
 public:
  struct Node;

  /// Keeps pages of `pool`, which must outlive it. `window`: positions that a row sees in table 0; 0: all of them.
  /// `hash_mask`: the bits of the hash that are used; tests pass 0, and every block collides with every other.
  PrefixCache(PagePool& pool, int window, std::uint64_t hash_mask = ~std::uint64_t{0});
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;
  PrefixCache(PrefixCache&&) = delete;
  PrefixCache& operator=(PrefixCache&&) = delete;
  /// Every holder must have left.
  ~PrefixCache();

  /// What a new holder starts from.
  struct Prefix {
    Node* root = nullptr;      ///< where to register the first block
    std::vector<Node*> nodes;  ///< the blocks of the prefix, in order
  };
  /// The longest usable prefix of `tokens`, of at most `limit` positions, in whole blocks: every block has its page in
  /// table 1, and those blocks that the row after the prefix can see through the window have theirs in table 0. Marks
  /// the last node (or the root) as held; the caller then takes the pages that it needs with hold().
  Prefix open(std::string_view salt, std::span<const TokenId> tokens, std::int64_t limit);
  /// Registers the block after `parent`, which the caller must hold, and moves the holder to it. If the block is known
  /// already, `pages` (kNoPage where the caller has none) are exchanged for the node's and freed; pages that the node
  /// lacks are added to it. Afterwards the caller still holds one reference to each page in `pages`.
  Node* extend(Node* parent, std::span<const TokenId, kPageSize> tokens, PerTable<PageId>& pages);
  /// The holder of `node` leaves the tree.
  void close(Node* node);

  /// Takes a reference to the node's page in `table`, which must exist.
  PageId hold(Node* node, int table);
  /// Gives back the reference of a sequence to the page of `node` in `table`; the page becomes evictable with the last.
  void let_go(Node* node, int table);
  /// Notes that the node was used now. Ancestors are to be touched after their descendants, and while held.
  void touch(Node* node);

  /// Gives up the least recently used page, or node with all its pages; false if none can be given up.
  bool evict_one();
  /// Evicts everything that no sequence holds.
  void evict_all();

  [[nodiscard]] std::int64_t nodes() const { return static_cast<std::int64_t>(nodes_.size()); }
  /// Pages that the cache alone holds: what evict_all() would free.
  [[nodiscard]] std::int64_t cached_pages(int table) const { return cached_pages_[table]; }
  [[nodiscard]] std::int64_t evicted_pages() const { return evicted_pages_; }

  struct Node {
    Node* parent = nullptr;  ///< null for a root
    std::array<TokenId, kPageSize> tokens{};
    std::size_t hash = 0;  ///< of parent and tokens
    PerTable<PageId> pages{kNoPage, kNoPage};
    std::int64_t children = 0;
    std::int64_t holders = 0;
    std::uint64_t last_use = 0;
    std::uint64_t slid_out = 0;  ///< when the last sequence let go of the sliding page
    Node* older = nullptr;       ///< neighbours in the list of evictable sliding pages
    Node* newer = nullptr;
    const std::string* salt = nullptr;  ///< of a root
  };

 private:
  struct Key {
    const Node* parent;
    std::span<const TokenId, kPageSize> tokens;
    std::size_t hash;
  };
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(const std::unique_ptr<Node>& node) const { return node->hash; }
    std::size_t operator()(const Key& key) const { return key.hash; }
  };
  struct Equal {
    using is_transparent = void;
    bool operator()(const std::unique_ptr<Node>& a, const std::unique_ptr<Node>& b) const { return a == b; }
    bool operator()(const Key& a, const std::unique_ptr<Node>& b) const;
    bool operator()(const std::unique_ptr<Node>& a, const Key& b) const { return (*this)(b, a); }
  };
  struct Older {
    bool operator()(const Node* a, const Node* b) const { return a->last_use < b->last_use; }
  };

  [[nodiscard]] Key key(const Node* parent, std::span<const TokenId, kPageSize> tokens) const;
  [[nodiscard]] Node* find(const Node* parent, std::span<const TokenId, kPageSize> tokens) const;
  [[nodiscard]] std::int64_t usable_blocks(std::span<Node* const> nodes) const;
  [[nodiscard]] bool evictable(const Node* node) const;
  void remove(Node* leaf);
  void drop_page(Node* node, int table);
  void list_sliding(Node* node);
  void unlist_sliding(Node* node);

  PagePool& pool_;
  int window_;
  std::uint64_t hash_seed_;
  std::uint64_t hash_mask_;
  std::uint64_t clock_ = 0;  // counts uses; no two are alike
  std::map<std::string, Node, std::less<>> roots_;
  std::unordered_set<std::unique_ptr<Node>, Hash, Equal> nodes_;
  std::set<Node*, Older> leaves_;   // nodes without children and holders
  Node* oldest_sliding_ = nullptr;  // sliding pages that the cache alone holds (where there is a window)
  Node* newest_sliding_ = nullptr;
  PerTable<std::int64_t> cached_pages_{};
  std::int64_t evicted_pages_ = 0;
};

}  // namespace draftwerk
