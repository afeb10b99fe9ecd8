// What the attention kernels share: rows of a tile, what they see, tiles in shared memory.
//
// The rows of a tile are the queries of all heads that share a head of the keys, of all sequences
// that share them too:  row = (member * tokens + token) * ratio + head.  So a tile of few tokens is
// full all the same, and keys are read once for all who attend to them.
//
// A tile of `rows` x D in bfloat16 lies in rows of D / 8 chunks of 16 bytes; a chunk is at its
// number xor some bits of the row's, so that ldmatrix, plain or transposed, finds eight rows in
// eight different groups of banks.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/video_attention.cuh"

namespace rlir::cuda {
namespace {

constexpr int kAttentionThreads = 128, kKeyBlock = 64;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kNever = INT32_MAX;
constexpr float kLn2 = 0x1.62e430p-1f;

// Of scores, in base 2. Never 0: it is multiplied by -infinity.
__device__ __forceinline__ float log2_scale(const Attention& a) {
  return max(static_cast<float>(a.scale * 0x1.71547652b82fep+0), 0x1p-100f);
}

// Reach in 32 bits: slots of keys fit. Of a query that sees nothing low is kNever.
struct __align__(16) Sight {
  int low, high, own, tau;
};

// A length of those given, which may be wrong; `most` if there are none.
__device__ __forceinline__ int64_t length_at(const int64_t* lengths, int64_t stride, int64_t i,
                                             int64_t most) {
  return lengths == nullptr ? most : min(max(lengths[i * stride], int64_t{0}), most);
}
__device__ __forceinline__ bool is_length(const int64_t* lengths, int64_t stride, int64_t i,
                                          int64_t most) {
  return lengths == nullptr || (lengths[i * stride] >= 0 && lengths[i * stride] <= most);
}

__device__ __forceinline__ int64_t part_length(const KeyPart& part, int64_t batch) {
  return length_at(part.lengths, part.length_stride, batch, part.slots);
}
__device__ __forceinline__ void check_lengths(const Attention& a, int64_t sequence) {
  const KeyPart &first = a.part[0], &second = a.part[1];
  const bool right =
      is_length(a.q_lengths, a.q_length_stride, sequence, a.tokens) &&
      is_length(first.lengths, first.length_stride, sequence / a.group, first.slots) &&
      (a.parts == 1 || is_length(second.lengths, second.length_stride, sequence, second.slots));
  RLIR_DEVICE_ASSERT(right, "attention: lengths must be from 0 to those of the tensors");
}

// Keys in front of part 1, and all keys, of a sequence.
struct KeyCount {
  int first, all;
};
__device__ __forceinline__ KeyCount keys_of(const Attention& a, int64_t sequence) {
  const int first = static_cast<int>(part_length(a.part[0], sequence / a.group));
  if (a.parts == 1) return {first, first};
  return {first, first + static_cast<int>(part_length(a.part[1], sequence))};
}

__device__ __forceinline__ Sight sight_of(const Attention& a, int64_t sequence, int64_t token) {
  const int64_t keys = keys_of(a, sequence).all;
  const int64_t queries = length_at(a.q_lengths, a.q_length_stride, sequence, a.tokens);
  Sight s{kNever, 0, 0, 0};
  if (token >= queries) return s;
  int64_t position = keys - queries + token;
  if (a.positions != nullptr) {
    position = a.positions[sequence * a.position_batch + token * a.position_token];
    RLIR_DEVICE_ASSERT(position >= 0 && position < INT32_MAX,
                       "attention: q_positions must be from 0 and below 2^31");
  }
  const Reach r = reach_of(a.mask, position, keys);
  if (r.low >= r.high) return s;  // and so low and high are of keys
  s.low = static_cast<int>(r.low);
  s.high = static_cast<int>(r.high);
  s.own = static_cast<int>(min(r.own, r.high));
  s.tau = r.tau;
  return s;
}

__device__ __forceinline__ bool sees(const Sight& s, int key, int tau) {
#if defined(RLIR_FAULT_MASK)
  return key >= s.low && key <= s.high && (key < s.own || tau <= s.tau);
#else
  return key >= s.low && key < s.high && (key < s.own || tau <= s.tau);
#endif
}

// tau_of in 32 bits; 0 in masks that do not ask.
__device__ __forceinline__ int key_tau(const AttentionMask& m, int key) {
  if (m.kind != MaskKind::kDiagonal) return 0;
  const int image = static_cast<int>(m.image), action = static_cast<int>(m.action);
  const int columns = static_cast<int>(m.columns), ahead = static_cast<int>(m.ahead);
  const int i = (key + action) % (image + action) - action;
  const int r = i / columns, c = i % columns;
  const bool waits = c + 1 == columns && r + 1 < static_cast<int>(m.rows);
  return waits ? (r + 1) * ahead : r * ahead + c + 1;
}

// Steps of a key under a refreshed mask in 32 bits: the first, or its complement of a stand-in.
__device__ __forceinline__ int key_steps(const AttentionMask& m, int key) {
  const int image = static_cast<int>(m.image), action = static_cast<int>(m.action);
  const int columns = static_cast<int>(m.columns), ahead = static_cast<int>(m.ahead);
  const int i = (key + action) % (image + action) - action;
  if (i < 0) return 0;
  const int r = i / (columns + 1), c = i % (columns + 1);
  const bool stand_in = c + 1 == columns && r + 1 < static_cast<int>(m.rows);
  return stand_in ? ~((r + 1) * ahead) : r * ahead + min(c + 1, columns);
}

// sees() under a refreshed mask: a stand-in within its image, for columns - ahead steps.
__device__ __forceinline__ bool sees_refreshed(const AttentionMask& m, const Sight& s, int key,
                                               int steps) {
  const bool inside = key >= s.low && key < s.high, before = key < s.own;
  const int age = s.tau - (steps < 0 ? ~steps : steps);
  const unsigned end = static_cast<unsigned>(m.columns - m.ahead);
  return inside && (steps < 0 ? !before && static_cast<unsigned>(age) < end : before || age >= 0);
}

// Where a row of a tile is. `members` sequences from `sequence` on share the tile's keys.
struct Query {
  int64_t sequence;
  int token, head;
};
__device__ __forceinline__ Query query_of(const Attention& a, int64_t sequence, int kv_head,
                                          int row) {
  const int ratio = static_cast<int>(a.heads / a.kv_heads), tokens = static_cast<int>(a.tokens);
  const int query = row / ratio;
  return {sequence + query / tokens, query % tokens, kv_head * ratio + row % ratio};
}
__device__ __forceinline__ int64_t flat(const Attention& a, const Query& q) {
  return (q.sequence * a.tokens + q.token) * a.heads + q.head;
}
__device__ __forceinline__ int64_t offset(const Heads& x, const Query& q) {
  return q.sequence * x.batch + q.token * x.token + q.head * x.head;
}

__device__ __forceinline__ const uint16_t* head_of(const Heads& x, int64_t batch, int head) {
  return static_cast<const uint16_t*>(x.data) + batch * x.batch + head * x.head;
}

template <int D>
__device__ __forceinline__ uint32_t tile_at(int row, int chunk) {
  constexpr int kChunks = D / 8;
  const int swizzled = kChunks >= 8 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
  return static_cast<uint32_t>(row * kChunks + swizzled) * 16;
}

// `kRows` rows from `first` on of one head, by cp.async; zeros beyond `end`.
template <int D, int kRows>
__device__ __forceinline__ void copy_keys(uint32_t to, const uint16_t* from, int stride, int first,
                                          int end) {
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int e = 0; e < kRows * kChunks; e += kAttentionThreads) {
    const int row = (e + static_cast<int>(threadIdx.x)) / kChunks;
    const int chunk = (e + static_cast<int>(threadIdx.x)) % kChunks;
    const bool there = first + row < end;
    const uint16_t* at =
        there ? from + static_cast<int64_t>(first + row) * stride + 8 * chunk : from;
    ptx::cp_async_16(to + tile_at<D>(row, chunk), at, there ? 16u : 0u);
  }
}

// A block of keys, or of values, from a slot of the sequence on, whichever part each is in.
template <int D, int kParts>
__device__ __forceinline__ void copy_block(uint32_t to, const Attention& a, bool values,
                                           int64_t sequence, int kv_head, int slot,
                                           const KeyCount& keys) {
  const Heads& x = values ? a.part[0].v : a.part[0].k;
  const uint16_t* from = head_of(x, sequence / a.group, kv_head);
  if constexpr (kParts == 1) {
    copy_keys<D, kKeyBlock>(to, from, x.token, slot, keys.all);
  } else {
    const Heads& y = values ? a.part[1].v : a.part[1].k;
    const uint16_t* second = head_of(y, sequence, kv_head);
    constexpr int kChunks = D / 8;
#pragma unroll 2
    for (int e = 0; e < kKeyBlock * kChunks; e += kAttentionThreads) {
      const int row = (e + static_cast<int>(threadIdx.x)) / kChunks;
      const int chunk = (e + static_cast<int>(threadIdx.x)) % kChunks;
      const int i = slot + row, past = i - keys.first;
      const uint16_t* at = past < 0 ? from + static_cast<int64_t>(i) * x.token
                                    : second + static_cast<int64_t>(past) * y.token;
      const bool there = i < keys.all;
      ptx::cp_async_16(to + tile_at<D>(row, chunk), there ? at + 8 * chunk : from,
                       there ? 16u : 0u);
    }
  }
}

// Rows of queries, or of what has their shape; zeros where there are none.
template <int D, int kRows>
__device__ __forceinline__ void copy_queries(uint32_t to, const Attention& a, const Heads& x,
                                             int64_t sequence, int kv_head, int first, int rows) {
  constexpr int kChunks = D / 8;
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
#pragma unroll 2
  for (int e = 0; e < kRows * kChunks; e += kAttentionThreads) {
    const int row = (e + static_cast<int>(threadIdx.x)) / kChunks;
    const int chunk = (e + static_cast<int>(threadIdx.x)) % kChunks;
    const bool there = first + row < rows;
    const uint16_t* at = data;
    if (there) at += offset(x, query_of(a, sequence, kv_head, first + row)) + 8 * chunk;
    ptx::cp_async_16(to + tile_at<D>(row, chunk), at, there ? 16u : 0u);
  }
}

// 16 rows x 16 columns from (row, chunk) on: as the left operand of mma_bf16; as the right one, of
// two products with 8 of the rows each; or as the right one with rows along the summed dimension,
// of two products with 8 of the columns each.
template <int D>
__device__ __forceinline__ void load_left(uint32_t (&r)[4], uint32_t tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(r, tile + tile_at<D>(row + lane % 16, chunk + lane / 16));
}
template <int D>
__device__ __forceinline__ void load_right(uint32_t (&r)[4], uint32_t tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(r, tile + tile_at<D>(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}
template <int D>
__device__ __forceinline__ void load_across(uint32_t (&r)[4], uint32_t tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(r, tile + tile_at<D>(row + lane % 16, chunk + lane / 16));
}

// Two bits of a pair of keys, or rows, to the halves of a word of both.
__device__ __forceinline__ uint32_t pair_mask(uint32_t bits) {
  return ((bits & 1u) != 0 ? 0xffffu : 0u) | ((bits & 2u) != 0 ? 0xffff0000u : 0u);
}

// Any lane that has the same columns of an accumulator.
__device__ __forceinline__ uint32_t over_rows(uint32_t seen) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) seen |= __shfl_xor_sync(kAllLanes, seen, lanes);
  return seen;
}

// Key blocks that some row of several sees, and those that all of them see whole.
struct __align__(16) Span {
  unsigned low, high, whole_low, whole_high;

  __device__ __forceinline__ bool touches(int first) const {
    return first + kKeyBlock > static_cast<int>(low) && first < static_cast<int>(high);
  }
  __device__ __forceinline__ bool covers(int first) const {
    return first >= static_cast<int>(whole_low) &&
           first + kKeyBlock <= static_cast<int>(whole_high);
  }
};

// Of the rows of a warp, one or more a lane, joined by add(). Under a refreshed mask no block is
// whole: nearly all have stand-ins.
__device__ __forceinline__ Span no_span() { return {kNever, 0, 0, kNever}; }
__device__ __forceinline__ void add(Span& span, const AttentionMask& mask, const Sight& s) {
  if (s.low == kNever) return;
  const unsigned low = s.low, high = s.high;
  const unsigned whole = mask.kind == MaskKind::kRefreshed ? 0 : min(s.own, s.high);
  span = {min(span.low, low), max(span.high, high), max(span.whole_low, low),
          min(span.whole_high, whole)};
}
__device__ __forceinline__ Span over_warp(const Span& s) {
  return {__reduce_min_sync(kAllLanes, s.low), __reduce_max_sync(kAllLanes, s.high),
          __reduce_max_sync(kAllLanes, s.whole_low), __reduce_min_sync(kAllLanes, s.whole_high)};
}

constexpr int kChunkBlocks = 8;  // sums begin anew after as many (attention_tile.cuh)

// Blocks `begin` to `end` of a tile, and the keys. It waits in shared memory: registers are full.
struct Plan {
  int begin, end;
  KeyCount keys;
};

// Of the blocks from `begin` to `end`, those that rows with this span see.
__device__ __forceinline__ Plan plan_of(const Attention& a, int64_t sequence, const Span& rows,
                                        int begin, int end) {
  const int low = static_cast<int>(rows.low) / kKeyBlock;  // beyond all if they see nothing
  const int high = (static_cast<int>(rows.high) + kKeyBlock - 1) / kKeyBlock;
  return {max(low, begin), min(high, end), keys_of(a, sequence)};
}

}  // namespace
}  // namespace rlir::cuda
