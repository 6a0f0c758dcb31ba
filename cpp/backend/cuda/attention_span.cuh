// What a block of attention.cu does: spans of positions for a few rows of a sequence that share a key/value head.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "backend/cuda/attention_parts.cuh"
#include "backend/cuda/device.cuh"
#include "backend/cuda/operands.cuh"

namespace draftwerk::cuda {

/// Up to kTiles * 16 queries and their running result. All members but the results are the same in each thread.
template <int kHeadDim, int kTiles, typename Element>
class AttentionBlock {
 public:
  using Shared = AttentionShared<kHeadDim, kTiles>;

  __device__ __forceinline__ explicit AttentionBlock(const Attend& a)
      : a_(a), shared_(*reinterpret_cast<Shared*>(dynamic_shared())) {}

  /// Finds the rows of block x: those of segment s are divided among the blocks from first_row / block_rows + s on,
  /// which leaves enough of them for each, and some without work.
  __device__ __forceinline__ bool find_rows() {
    const int x = static_cast<int>(blockIdx.x);
    int begun = 0;  // segments that begin at or before this block
    for (int first = 0; first < a_.step.segment_count; first += kAttentionThreads) {
      const int s = first + thread();
      const bool begins = s < a_.step.segment_count && a_.step.segments[s].first_row / a_.block_rows + s <= x;
      begun += __syncthreads_count(begins ? 1 : 0);
    }
    if (begun == 0) return false;
    const StepSegment& segment = a_.step.segments[begun - 1];
    const int before = (x - (segment.first_row / a_.block_rows + begun - 1)) * a_.block_rows;
    const int rows = min(segment.rows - before, a_.block_rows);
    if (rows <= 0) return false;
    tiles_ = (rows * a_.group + kTileQueries - 1) / kTileQueries;
    tree_ = segment.tree != 0;
    if (thread() == 0) {
      shared_.table = a_.step.pages + segment.pages[a_.table];
      shared_.first_row = segment.first_row + before;
      shared_.paths = a_.step.paths + static_cast<std::int64_t>(shared_.first_row) * kMaxPath;
      shared_.rows = rows;
      shared_.query_count = rows * a_.group;
      shared_.first_position = segment.first_position;
      shared_.from = shared_.part = INT_MAX;
      shared_.to = 0;
    }
    __syncthreads();
    return true;
  }

  /// Finds what they see.
  __device__ __forceinline__ void find_positions() {
    for (int q = thread(); q < Shared::kQueries; q += kAttentionThreads) {
      const int row = shared_.first_row + q / a_.group;
      shared_.begin[q] = q < shared_.query_count ? a_.begin(row) : 0;
      shared_.end[q] = q < shared_.query_count ? a_.end(row) : 0;
      if (q >= shared_.query_count) continue;
      atomicMin(&shared_.from, shared_.begin[q]);
      atomicMax(&shared_.to, shared_.end[q]);
    }
    for (int i = thread(); tree_ && i < shared_.rows * kMaxPath; i += kAttentionThreads) {
      const int position = shared_.first_position + i % kMaxPath;
      if (position < a_.end(shared_.first_row + i / kMaxPath) && shared_.paths[i] != i % kMaxPath)
        atomicMin(&shared_.part, position);
    }
    __syncthreads();
  }
  [[nodiscard]] __device__ int from() const { return shared_.from; }
  [[nodiscard]] __device__ int to() const { return shared_.to; }

  /// Puts the queries, as float16, to shared memory, and takes up chunk `chunk`.
  __device__ __forceinline__ void begin(int chunk) {
    if (thread() < kAttentionWarps) shared_.pages[0][thread()] = page(chunk, thread());
    for (int i = thread(); i < tiles_ * kSteps * kWarp; i += kAttentionThreads) {
      const int of_lane = i % kWarp;
      const int step = i / kWarp % kSteps;
      const int component = step / 2 * 32 + of_lane % 4 * 8 + step % 2 * 4;  // as key_index() has it
      std::uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = i / kWarp / kSteps * kTileQueries + of_lane / 4 + half * 8;
        float2 low{0.0F, 0.0F};
        float2 high{0.0F, 0.0F};
        if (q < shared_.query_count) {
          const float* from = a_.query + static_cast<std::int64_t>(shared_.first_row + q / a_.group) * a_.query_stride +
                              head(q) * kHeadDim + component;
          low = *reinterpret_cast<const float2*>(from);
          high = *reinterpret_cast<const float2*>(from + 2);
        }
        words[half] = f16_pair(finite_f16(low.x), finite_f16(low.y));
        words[half + 2] = f16_pair(finite_f16(high.x), finite_f16(high.y));
      }
      (&shared_.queries[0][0][0])[i] = {words[0], words[1], words[2], words[3]};
    }
    parity_ = 0;
    clear();
    __syncthreads();
  }

  /// Forgets the result so far.
  __device__ __forceinline__ void clear() {
    maximum_ = kNoScore;
    sum_ = 0.0F;
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) total_[c][m][i / 4][i % 4] = 0.0F;
      }
    }
  }

  /// Adds chunk `chunk` to the result. The one after it is next, if there is one before `past_chunk`.
  __device__ __forceinline__ void add_chunk(int chunk, int past_chunk) {
    const int base = chunk * kAttentionChunk;
    const int first = base + warp() * kPageSize;  // of this warp's page
    const bool has_next = thread() < kAttentionWarps && chunk + 1 < past_chunk;
    const PageId next = has_next ? page(chunk + 1, thread()) : kNoPage;

    float score[kTiles][2][4] = {};
    if (const PageId own = shared_.pages[parity_][warp()]; own != kNoPage) {
      if (first + kPageSize <= shared_.part) {
        score_page(own, score);
      } else {
        score_paths(first, score);
      }
    }
    // The first values are on their way while scores become weights.
    const int shared_pages = min(max((shared_.part - base) / kPageSize, 0), kAttentionWarps);
    uint4 values[kAttentionWarps];
#pragma unroll
    for (int p = 0; p < kAttentionWarps; ++p) values[p] = load_values(p, shared_pages, first_column());

    find_maxima(first, score);
    __syncthreads();  // everybody is done with the chunk before this one
    if (thread() < kAttentionWarps) shared_.pages[1 - parity_][thread()] = next;
    const float chunk_maximum = largest_of_chunk(thread());
    find_weights(score);
    __syncthreads();
    if (thread() < Shared::kQueries) {
      const float* const sums = shared_.warp_sum[thread()];
      float sum = sums[0];
#pragma unroll
      for (int w = 1; w < kAttentionWarps; ++w) sum = __fadd_rn(sum, sums[w]);
      merge_state(maximum_, sum_, chunk_maximum, sum);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
      const int column = first_column() + c;
      if (column >= kColumns) break;
      float product[kTiles][2][4] = {};
#pragma unroll
      for (int p = 0; p < kAttentionWarps; ++p) {
        const uint4 of_page = values[p];
        if (c + 1 < kOwnColumns) values[p] = load_values(p, shared_pages, column + 1);
        if (p < shared_pages && shared_.pages[parity_][p] != kNoPage) {
          multiply_values(p, visible(of_page, base + p * kPageSize), product);
        }
      }
      for (int p = shared_pages; p < kAttentionWarps; ++p) {
        if (shared_.pages[parity_][p] != kNoPage) multiply_path_values(p, base + p * kPageSize, column, product);
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const MergeFactors f = factors(m * kTileQueries + group() + half * 8);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = half * 2; i < half * 2 + 2; ++i) {
              total_[c][m][n][i] = merged(total_[c][m][n][i], product[m][n][i], f);
            }
          }
        }
      }
    }
    parity_ = 1 - parity_;
  }

  /// Puts the result so far aside, its values to the rows of the output, and begins another.
  __device__ __forceinline__ void park() {
    parked_maximum_ = maximum_;
    parked_sum_ = sum_;
    for_each_query([&](int q, int m, int half) {
      float* to = output(q);
      for_each_pair([&](int c, int n, int component) {
        const float* pair = &total_[c][m][n][half * 2];
        *reinterpret_cast<float2*>(to + component) = {pair[0], pair[1]};
      });
    });
    clear();
  }
  /// Adds the result so far to the one that was put aside before it.
  __device__ __forceinline__ void merge_parked() {
    __syncthreads();  // everybody is done with the factors of the last chunk
    if (thread() < Shared::kQueries) {
      merge_state(parked_maximum_, parked_sum_, maximum_, sum_);
      maximum_ = parked_maximum_;
      sum_ = parked_sum_;
    }
    __syncthreads();
    for_each_query([&](int q, int m, int half) {
      const MergeFactors f = factors(q);
      const float* from = output(q);
      for_each_pair([&](int c, int n, int component) {
        const float2 old = *reinterpret_cast<const float2*>(from + component);
        float* pair = &total_[c][m][n][half * 2];
        pair[0] = merged(old.x, pair[0], f);
        pair[1] = merged(old.y, pair[1], f);
      });
    });
  }

  /// Writes what all positions gave.
  __device__ __forceinline__ void store() {
    __syncthreads();  // as in merge_parked()
    if (thread() < Shared::kQueries) shared_.factors[thread()].x = 1.0F / sum_;
    __syncthreads();
    for_each_query([&](int q, int m, int half) {
      const float factor = shared_.factors[q].x;
      float* to = output(q);
      for_each_pair([&](int c, int n, int component) {
        const float* pair = &total_[c][m][n][half * 2];
        const float2 result{pair[0] * factor, pair[1] * factor};
        *reinterpret_cast<float2*>(to + component) = result;
        if (a_.left.data == nullptr) return;
        leave_pair(a_.left, shared_.first_row + q / a_.group, head(q) * kHeadDim + component, result.x, result.y);
      });
    });
  }
  /// Writes a partial result, which is nothing to look at for queries that see nothing of the span.
  __device__ __forceinline__ void store_partial(int slot) {
    if (thread() < shared_.query_count) a_.partial_states[partial(slot, thread())] = {maximum_, sum_};
    for_each_query([&](int q, int m, int half) {
      float* to = a_.partial_values + partial(slot, q) * kHeadDim;
      for_each_pair([&](int c, int n, int component) {
        const float* pair = &total_[c][m][n][half * 2];
        *reinterpret_cast<float2*>(to + component) = {pair[0], pair[1]};
      });
    });
  }

 private:
  static constexpr int kSteps = kHeadDim / 16;            // of k16 in a score
  static constexpr int kReads = kHeadDim / 32;            // of a key by a lane, for two steps each
  static constexpr int kAhead = kReads < 4 ? kReads : 4;  // of them under way
  static constexpr int kColumns = kHeadDim / 16;          // blocks of 16 components of a value
  static constexpr int kOwnColumns = (kColumns + kAttentionWarps - 1) / kAttentionWarps;  // of a warp
  static constexpr std::size_t kHeadBytes = kHeadDim * kPageSize * sizeof(Element);

  // A warp's lanes have groups and places in them as mma.m16n8k16 has it: what belongs to queries has those of `group`
  // and `group` + 8 of each tile, and of eight columns those of 2 * quarter and the one behind.
  static __device__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ int group() { return lane() / 4; }
  static __device__ int quarter() { return lane() % 4; }
  static __device__ int kv_head() { return static_cast<int>(blockIdx.y); }
  static __device__ int first_column() { return warp() * kOwnColumns; }

  [[nodiscard]] __device__ int head(int q) const { return kv_head() * a_.group + q % a_.group; }
  [[nodiscard]] __device__ float* output(int q) const {
    return a_.output + static_cast<std::int64_t>(shared_.first_row + q / a_.group) * a_.output_stride +
           head(q) * kHeadDim;
  }
  [[nodiscard]] __device__ std::int64_t partial(int slot, int q) const {
    return (std::int64_t{slot} * a_.step.rows + shared_.first_row + q / a_.group) * a_.query_heads + head(q);
  }
  [[nodiscard]] __device__ MergeFactors factors(int q) const {
    const float2 f = shared_.factors[q];
    return {f.x, f.y};
  }
  /// Adds a state of query `thread` to another, and says by which factors all threads add the values.
  __device__ __forceinline__ void merge_state(float& maximum, float& sum, float fresh_maximum, float fresh_sum) const {
    const MergeFactors f = merge_factors(maximum, fresh_maximum);
    maximum = fmaxf(maximum, fresh_maximum);
    sum = merged(sum, fresh_sum, f);
    shared_.factors[thread()] = {f.old, f.fresh};
  }
  [[nodiscard]] __device__ bool sees(int q, int position) const {
    return position >= shared_.begin[q] && position < shared_.end[q];
  }
  /// A chunk's page; kNoPage where nobody sees anything of it.
  [[nodiscard]] __device__ PageId page(int chunk, int of_chunk) const {
    const int first = chunk * kAttentionChunk + of_chunk * kPageSize;
    return first < shared_.to && first + kPageSize > shared_.from ? shared_.table[first / kPageSize] : kNoPage;
  }
  [[nodiscard]] __device__ const std::byte* keys(PageId id) const {
    return a_.step.arena + std::size_t{id} * kPageUnit + a_.key_offset +
           static_cast<std::size_t>(kv_head()) * kHeadBytes;
  }
  [[nodiscard]] __device__ const std::byte* values(PageId id) const {
    return a_.step.arena + std::size_t{id} * kPageUnit + a_.value_offset +
           static_cast<std::size_t>(kv_head()) * kHeadBytes;
  }
  /// Where a row of this block has the key and value of a position that it sees.
  [[nodiscard]] __device__ int slot(int row, int position) const {
    const int path = position - shared_.first_position;
    return path < 0 ? position : shared_.first_position + shared_.paths[row * kMaxPath + path];
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each_query(Visit&& visit) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = m * kTileQueries + group() + half * 8;
        if (q < shared_.query_count) visit(q, m, half);
      }
    }
  }
  /// The pairs of components that this lane has of a query.
  template <typename Visit>
  __device__ __forceinline__ void for_each_pair(Visit&& visit) const {
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
      if (first_column() + c >= kColumns) break;
#pragma unroll
      for (int n = 0; n < 2; ++n) visit(c, n, (first_column() + c) * 16 + n * 8 + quarter() * 2);
    }
  }
  /// The rows of this block of which tile m has queries.
  template <typename Visit>
  __device__ __forceinline__ void for_each_row(int m, Visit&& visit) const {
    const int last = min((m * kTileQueries + kTileQueries - 1) / a_.group, shared_.rows - 1);
    for (int row = m * kTileQueries / a_.group; row <= last; ++row) visit(row);
  }
  /// Takes a row's own elements of an operand D from `fresh`.
  __device__ __forceinline__ void take_row(int m, int row, const float (&fresh)[2][4], float (&d)[2][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int q = m * kTileQueries + group() + half * 8 - row * a_.group;
      if (q < 0 || q >= a_.group) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        d[n][half * 2] = fresh[n][half * 2];
        d[n][half * 2 + 1] = fresh[n][half * 2 + 1];
      }
    }
  }

  /// Adds the products of queries and two times eight positions of components 32 j to 32 j + 31.
  __device__ __forceinline__ void multiply_keys(int m, int j, const uint4& low, const uint4& high,
                                                float (&score)[2][4]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint4 q = shared_.queries[m][j * 2 + step][lane()];
      const std::uint32_t a[4] = {q.x, q.y, q.z, q.w};
      const std::uint32_t of_low[2] = {step == 0 ? low.x : low.z, step == 0 ? low.y : low.w};
      const std::uint32_t of_high[2] = {step == 0 ? high.x : high.z, step == 0 ? high.y : high.w};
      mma_f16(score[0], a, of_low);
      mma_f16(score[1], a, of_high);
    }
  }
  /// Scores of a page: [n][half * 2 + i] of query `group` + 8 half at its position 8 n + 2 quarter + i.
  __device__ __forceinline__ void score_page(PageId id, float (&score)[kTiles][2][4]) const {
    const std::byte* const from = keys(id);
    uint4 low[kAhead];
    uint4 high[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      low[j] = load_eight<Element>(from, key_index(j * 32 + quarter() * 8, group()));
      high[j] = load_eight<Element>(from, key_index(j * 32 + quarter() * 8, group() + 8));
    }
    // Unrolled no further: ptxas would read everything at once, and spill.
#pragma unroll 1
    for (int j = 0; j < kReads; j += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint4 own_low = low[i];
        const uint4 own_high = high[i];
        if (j + kAhead < kReads) {
          low[i] = load_eight<Element>(from, key_index((j + i + kAhead) * 32 + quarter() * 8, group()));
          high[i] = load_eight<Element>(from, key_index((j + i + kAhead) * 32 + quarter() * 8, group() + 8));
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          if (m < tiles_) multiply_keys(m, j + i, own_low, own_high, score[m]);
        }
      }
    }
  }
  /// Where a row has a key of its own: in what page, null where it does not see the position, and from which index on.
  struct PathKey {
    const std::byte* head;
    int index;
  };
  [[nodiscard]] __device__ PathKey path_key(int row, int position) const {
    if (!sees(row * a_.group, position)) return {nullptr, 0};
    const int own_slot = slot(row, position);
    return {keys(shared_.table[own_slot / kPageSize]), key_index(quarter() * 8, own_slot % kPageSize)};
  }
  static __device__ uint4 load_key(const PathKey& key, int j) {
    return key.head == nullptr ? uint4{0, 0, 0, 0} : load_eight<Element>(key.head, key.index + key_index(j * 32, 0));
  }
  /// The same of a page in which paths part, row by row.
  __device__ __forceinline__ void score_paths(int first, float (&score)[kTiles][2][4]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      for_each_row(m, [&](int row) {
        const PathKey low = path_key(row, first + group());
        const PathKey high = path_key(row, first + group() + 8);
        float fresh[2][4] = {};
#pragma unroll 1
        for (int j = 0; j < kReads; ++j) multiply_keys(m, j, load_key(low, j), load_key(high, j), fresh);
        take_row(m, row, fresh, score[m]);
      });
    }
  }

  /// Scales the scores of a warp's page, which become kNoScore where a query does not see a position, and finds the
  /// largest of each query.
  __device__ __forceinline__ void find_maxima(int first, float (&score)[kTiles][2][4]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = m * kTileQueries + group() + half * 8;
        float largest = kNoScore;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& s = score[m][i / 2][half * 2 + i % 2];
          s = sees(q, first + i / 2 * 8 + quarter() * 2 + i % 2) ? __fmul_rn(s, a_.scale) : kNoScore;
          largest = fmaxf(largest, s);
        }
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        if (quarter() == 0) shared_.warp_maximum[q][warp()] = largest;
      }
    }
  }
  [[nodiscard]] __device__ __forceinline__ float largest_of_chunk(int q) const {
    if (q >= Shared::kQueries) return kNoScore;
    const float* const maxima = shared_.warp_maximum[q];
    float largest = maxima[0];
#pragma unroll
    for (int w = 1; w < kAttentionWarps; ++w) largest = fmaxf(largest, maxima[w]);
    return largest;
  }
  /// Turns scores into weights, in shared memory, and adds those of a warp's page up.
  __device__ __forceinline__ void find_weights(const float (&score)[kTiles][2][4]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      std::uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = m * kTileQueries + group() + half * 8;
        const float largest = largest_of_chunk(q);
        float sum = 0.0F;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float low = score[m][n][half * 2];
          const float high = score[m][n][half * 2 + 1];
          const std::uint32_t pair = f16_pair(low == kNoScore ? 0.0F : exp2f(__fsub_rn(low, largest)),
                                              high == kNoScore ? 0.0F : exp2f(__fsub_rn(high, largest)));
          words[n * 2 + half] = pair;
          // What is summed is what values are multiplied by.
          sum = __fadd_rn(sum, f16_to_float(static_cast<std::uint16_t>(pair)));
          sum = __fadd_rn(sum, f16_to_float(static_cast<std::uint16_t>(pair >> 16)));
        }
        sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 1));
        sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 2));
        if (quarter() == 0) shared_.warp_sum[q][warp()] = sum;
      }
      shared_.weights[m][warp()][lane()] = {words[0], words[1], words[2], words[3]};
    }
  }

  /// A lane's values of page p of the chunk, both n-tiles; nothing where there is no page, or paths part in it.
  __device__ __forceinline__ uint4 load_values(int p, int shared_pages, int column) const {
    const PageId id = p < shared_pages && column < kColumns ? shared_.pages[parity_][p] : kNoPage;
    return id == kNoPage ? uint4{0, 0, 0, 0} : load_eight<Element>(values(id), column * (16 * kPageSize) + lane() * 8);
  }
  /// Zeros in place of what lies at positions that nobody sees: anything, NaN included.
  [[nodiscard]] __device__ __forceinline__ uint4 visible(uint4 v, int first) const {
    if (first >= shared_.from && first + kPageSize <= shared_.to) return v;
    std::uint32_t mask[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = first + h * 8 + quarter() * 2;
      mask[h] = (position >= shared_.from && position < shared_.to ? 0xFFFFU : 0U) |
                (position + 1 >= shared_.from && position + 1 < shared_.to ? 0xFFFF0000U : 0U);
    }
    return {v.x & mask[0], v.y & mask[1], v.z & mask[0], v.w & mask[1]};
  }
  __device__ __forceinline__ void multiply_values(int p, const uint4& v, float (&product)[kTiles][2][4]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (m < tiles_) multiply_tile(m, p, v, product[m]);
    }
  }
  __device__ __forceinline__ void multiply_tile(int m, int p, const uint4& v, float (&product)[2][4]) const {
    const uint4 w = shared_.weights[m][p][lane()];
    const std::uint32_t a[4] = {w.x, w.y, w.z, w.w};
    const std::uint32_t left[2] = {v.x, v.y};
    const std::uint32_t right[2] = {v.z, v.w};
    mma_f16(product[0], a, left);
    mma_f16(product[1], a, right);
  }
  /// A page in which paths part, row by row.
  __device__ __forceinline__ void multiply_path_values(int p, int first, int column,
                                                       float (&product)[kTiles][2][4]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      for_each_row(m, [&](int row) {
        std::uint32_t words[4] = {0, 0, 0, 0};  // [n][h]
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int position = first + i / 2 * 8 + quarter() * 2 + i % 2;
          if (!sees(row * a_.group, position)) continue;
          const int own_slot = slot(row, position);
          const std::byte* const from = values(shared_.table[own_slot / kPageSize]);
          const int index = value_index(column * 16 + group(), own_slot % kPageSize);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            words[n * 2 + i / 2] |= load_one<Element>(from, index + value_index(n * 8, 0)) << i % 2 * 16;
          }
        }
        float fresh[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) fresh[i / 4][i % 4] = product[m][i / 4][i % 4];
        multiply_tile(m, p, {words[0], words[1], words[2], words[3]}, fresh);
        take_row(m, row, fresh, product[m]);
      });
    }
  }

  const Attend& a_;
  Shared& shared_;
  int tiles_ = 0;         ///< that have queries
  bool tree_ = false;     ///< whether rows have paths
  int parity_ = 0;        ///< which of the shared page ids are the chunk's
  float maximum_ = 0.0F;  ///< of query `thread`, as the next three: the largest score
  float sum_ = 0.0F;      ///< of weights
  float parked_maximum_ = 0.0F;
  float parked_sum_ = 0.0F;
  float total_[kOwnColumns][kTiles][2][4];
};

}  // namespace draftwerk::cuda
