#include "kvcache/prefix_cache.h"

#include <algorithm>
#include <cassert>
#include <random>

namespace draftwerk {

namespace {

std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

}  // namespace

// The seed keeps a client from choosing tokens that all fall into one bucket.
PrefixCache::PrefixCache(PagePool& pool, int window, std::uint64_t hash_mask)
    : pool_(pool), window_(window), hash_seed_(random_seed()), hash_mask_(hash_mask) {}

PrefixCache::~PrefixCache() {
  evict_all();
  assert(nodes_.empty() && roots_.empty());
}

PrefixCache::Prefix PrefixCache::open(std::string_view salt, std::span<const TokenId> tokens, std::int64_t limit) {
  auto found = roots_.find(salt);
  if (found == roots_.end()) {
    found = roots_.try_emplace(std::string(salt)).first;
    found->second.salt = &found->first;
  }
  Prefix prefix;
  prefix.root = &found->second;

  const std::int64_t most = std::min(limit, static_cast<std::int64_t>(tokens.size())) / kPageSize;
  const Node* parent = prefix.root;
  for (std::int64_t block = 0; block < most; ++block) {
    Node* node = find(parent, tokens.subspan(block * kPageSize).first<kPageSize>());
    if (node == nullptr) break;
    prefix.nodes.push_back(node);
    parent = node;
  }
  prefix.nodes.resize(usable_blocks(prefix.nodes));

  Node* last = prefix.nodes.empty() ? prefix.root : prefix.nodes.back();
  leaves_.erase(last);
  ++last->holders;
  return prefix;
}

// One pass over all candidates P: `run` is where the unbroken run of sliding pages that ends with block P - 1 began.
std::int64_t PrefixCache::usable_blocks(std::span<Node* const> nodes) const {
  const auto blocks = static_cast<std::int64_t>(nodes.size());
  if (!pool_.has_table(0)) return blocks;
  std::int64_t usable = 0;
  std::int64_t run = 0;
  for (std::int64_t p = 1; p <= blocks; ++p) {
    if (nodes[p - 1]->pages[0] == kNoPage) run = p;
    if (run <= first_visible_page(p * kPageSize, window_)) usable = p;
  }
  return usable;
}

PrefixCache::Node* PrefixCache::extend(Node* parent, std::span<const TokenId, kPageSize> tokens,
                                       PerTable<PageId>& pages) {
  assert(parent->holders > 0);
  Node* node = find(parent, tokens);
  if (node == nullptr) {
    auto fresh = std::make_unique<Node>();
    node = fresh.get();
    node->parent = parent;
    std::copy(tokens.begin(), tokens.end(), node->tokens.begin());
    node->hash = key(parent, tokens).hash;
    node->last_use = ++clock_;
    nodes_.insert(std::move(fresh));
    ++parent->children;
  } else {
    leaves_.erase(node);
  }
  ++node->holders;
  --parent->holders;  // has a child: no leaf

  for (int t = 0; t < kPageTables; ++t) {
    if (pages[t] == kNoPage) continue;
    if (node->pages[t] == kNoPage) {
      node->pages[t] = pages[t];
      pool_.retain(pages[t]);
    } else {
      pool_.release(pages[t]);
      pages[t] = hold(node, t);
    }
  }
  return node;
}

void PrefixCache::close(Node* node) {
  assert(node->holders > 0);
  --node->holders;
  if (!evictable(node)) return;
  if (node->parent == nullptr) {
    roots_.erase(roots_.find(*node->salt));
    return;
  }
  leaves_.insert(node);
  if (node->pages[0] == kNoPage && node->pages[1] == kNoPage) remove(node);
}

PageId PrefixCache::hold(Node* node, int table) {
  const PageId page = node->pages[table];
  assert(page != kNoPage);
  if (pool_.references(page) == 1) {
    --cached_pages_[table];
    if (table == 0) unlist_sliding(node);
  }
  pool_.retain(page);
  return page;
}

void PrefixCache::let_go(Node* node, int table) {
  const PageId page = node->pages[table];
  pool_.release(page);
  if (pool_.references(page) > 1) return;
  ++cached_pages_[table];
  if (table == 0) list_sliding(node);
}

void PrefixCache::touch(Node* node) {
  assert(!evictable(node));  // its place among the leaves would change
  node->last_use = ++clock_;
}

bool PrefixCache::evict_one() {
  Node* sliding = oldest_sliding_;
  Node* leaf = leaves_.empty() ? nullptr : *leaves_.begin();
  if (sliding != nullptr && (leaf == nullptr || sliding->slid_out < leaf->last_use)) {
    drop_page(sliding, 0);
    if (evictable(sliding) && sliding->pages[1] == kNoPage) remove(sliding);
    return true;
  }
  if (leaf == nullptr) return false;
  remove(leaf);
  return true;
}

void PrefixCache::evict_all() {
  while (evict_one()) {
  }
}

PrefixCache::Key PrefixCache::key(const Node* parent, std::span<const TokenId, kPageSize> tokens) const {
  std::uint64_t hash = hash_seed_ ^ reinterpret_cast<std::uintptr_t>(parent);
  for (const TokenId token : tokens) {
    hash = (hash ^ static_cast<std::uint32_t>(token)) * 0x9E3779B97F4A7C15ULL;
    hash ^= hash >> 32;
  }
  return {parent, tokens, hash & hash_mask_};
}

PrefixCache::Node* PrefixCache::find(const Node* parent, std::span<const TokenId, kPageSize> tokens) const {
  const auto found = nodes_.find(key(parent, tokens));
  return found == nodes_.end() ? nullptr : found->get();
}

bool PrefixCache::Equal::operator()(const Key& a, const std::unique_ptr<Node>& b) const {
  return a.parent == b->parent && std::equal(a.tokens.begin(), a.tokens.end(), b->tokens.begin());
}

bool PrefixCache::evictable(const Node* node) const { return node->children == 0 && node->holders == 0; }

// With the leaf go its ancestors that have become leaves and hold no page any more (models without full layers).
void PrefixCache::remove(Node* leaf) {
  while (true) {
    assert(evictable(leaf));
    for (int t = 0; t < kPageTables; ++t) {
      if (leaf->pages[t] != kNoPage) drop_page(leaf, t);
    }
    Node* parent = leaf->parent;
    leaves_.erase(leaf);
    nodes_.erase(nodes_.find(key(parent, leaf->tokens)));
    --parent->children;
    if (!evictable(parent)) return;
    if (parent->parent == nullptr) {
      roots_.erase(roots_.find(*parent->salt));
      return;
    }
    leaves_.insert(parent);
    if (parent->pages[0] != kNoPage || parent->pages[1] != kNoPage) return;
    leaf = parent;
  }
}

void PrefixCache::drop_page(Node* node, int table) {
  assert(pool_.references(node->pages[table]) == 1);
  if (table == 0) unlist_sliding(node);
  --cached_pages_[table];
  ++evicted_pages_;
  pool_.release(node->pages[table]);
  node->pages[table] = kNoPage;
}

// Without a window a page of table 0 is needed as long as its node, and goes with it.
void PrefixCache::list_sliding(Node* node) {
  if (window_ == 0) return;
  node->slid_out = ++clock_;
  node->older = newest_sliding_;
  node->newer = nullptr;
  (newest_sliding_ == nullptr ? oldest_sliding_ : newest_sliding_->newer) = node;
  newest_sliding_ = node;
}

void PrefixCache::unlist_sliding(Node* node) {
  if (window_ == 0) return;
  (node->older == nullptr ? oldest_sliding_ : node->older->newer) = node->newer;
  (node->newer == nullptr ? newest_sliding_ : node->newer->older) = node->older;
  node->older = nullptr;
  node->newer = nullptr;
}

}  // namespace draftwerk
