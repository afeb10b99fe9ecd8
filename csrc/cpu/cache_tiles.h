// Attention of a block over the cache of cpu/decoder.h by AMX tiles: cpu/cache_attention.h, which
// includes this, for pairs of bfloat16 in files compiled for AMX.
//
// Layout. Queries of a key head are rows of A, at most 16; slots, or the values' d, are lanes of B,
// which is read where it lies in the cache. Weights, scores and sums are scratch of some 30 KiB.
//
// Order. That of panels (cpu/attention.h): a group of tdpbf16ps is 32 d, or 32 slots from the start
// of a block of 128, and its sums do not tell A from B. A group on the border of the prompt's tail
// and a rollout's own slots is put together in a copy; slots beyond the last one are zeros there.
//
// Internal linkage.
#pragma once

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kPairs = kKeyBlock / 2;  // words of a block's weights
constexpr int64_t kGroupPairs = kTile;

// scores [16][kScoreRow] of kTiles times 16 positions of a group of keys; q [16][words padded].
template <int kTiles>
__attribute__((noinline)) void score_tiles(float* scores, const uint32_t* q, const uint32_t* k,
                                           const uint32_t* next, int64_t words) {
  constexpr int64_t kWord = sizeof(uint32_t);
  const int64_t stride = round_up(words, kTile);
  alignas(64) uint32_t copy[kTile * kTile];
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  if constexpr (kTiles > 3) _tile_zero(3);
  for (int64_t w = 0; w < words; w += kTile) {
    const int64_t here = at_most(kTile, words - w);
    const auto source = [&](int64_t lane) -> TileSource {
      const int64_t at = w * kKeyGroup + lane;
      for (int64_t i = 0; i < here; ++i) ask_for<1>(next + at + i * kKeyGroup);
      if (here == kTile) return {k + at, kKeyGroup * kWord};
      return padded(copy, k + at, kKeyGroup, here, kTile);
    };
    _tile_loadd(6, q + w, stride * kWord);
    TileSource lanes = source(0);
    _tile_loadd(7, lanes.data, lanes.stride);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (kTiles > 1) {
      lanes = source(kTile);
      _tile_loadd(7, lanes.data, lanes.stride);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (kTiles > 2) {
      lanes = source(2 * kTile);
      _tile_loadd(7, lanes.data, lanes.stride);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (kTiles > 3) {
      lanes = source(3 * kTile);
      _tile_loadd(7, lanes.data, lanes.stride);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, scores, kScoreRow * kWord);
  if constexpr (kTiles > 1) _tile_stored(1, scores + kTile, kScoreRow * kWord);
  if constexpr (kTiles > 2) _tile_stored(2, scores + 2 * kTile, kScoreRow * kWord);
  if constexpr (kTiles > 3) _tile_stored(3, scores + 3 * kTile, kScoreRow * kWord);
}

// Values of 32 slots, and what is asked for meanwhile.
struct ValueGroup {
  const uint32_t *v, *next;
};

// out [16][stride] += weights [16][kPairs] v, kTiles times 16 lanes of d; v [16][stride] a group.
template <int kTiles>
__attribute__((noinline)) void value_tiles(float* out, const uint32_t* weights,
                                           const ValueGroup* groups, int64_t count, int64_t lane,
                                           int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(uint32_t));
  _tile_loadd(0, out, bytes);
  if constexpr (kTiles > 1) _tile_loadd(1, out + kTile, bytes);
  if constexpr (kTiles > 2) _tile_loadd(2, out + 2 * kTile, bytes);
  if constexpr (kTiles > 3) _tile_loadd(3, out + 3 * kTile, bytes);
  for (int64_t g = 0; g < count; ++g) {
    const uint32_t* v = groups[g].v + lane;
    for (int64_t i = 0; i < kGroupPairs; ++i) ask_for<kTiles>(groups[g].next + lane + i * stride);
    _tile_loadd(6, weights + g * kGroupPairs, kPairs * sizeof(uint32_t));
    _tile_loadd(7, v, bytes);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (kTiles > 1) {
      _tile_loadd(7, v + kTile, bytes);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(7, v + 2 * kTile, bytes);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (kTiles > 3) {
      _tile_loadd(7, v + 3 * kTile, bytes);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, out, bytes);
  if constexpr (kTiles > 1) _tile_stored(1, out + kTile, bytes);
  if constexpr (kTiles > 2) _tile_stored(2, out + 2 * kTile, bytes);
  if constexpr (kTiles > 3) _tile_stored(3, out + 3 * kTile, bytes);
}

// Work space of attend_tiles, in words of 4 bytes.
struct TileSpace {
  int64_t words, padded;  // of q, and d
  int64_t scores = 0, weights, q, sums, copies, total;

  explicit TileSpace(int64_t dim)
      : words(round_up((dim + 1) / 2, kTile)),
        padded(round_up(dim, 16)),
        weights(kTile * kScoreRow),
        q(weights + kTile * kPairs),
        sums(q + kTile * words),
        copies(sums + kTile * padded),
        total(copies + 2 * kGroupPairs * padded) {}
};

// A block's groups of values; a copy where one is not whole: at the border and at the end.
template <typename F>
inline int64_t value_groups(ValueGroup* groups, const CacheBlock<F>& block, int64_t padded,
                            uint32_t* copies) {
  int64_t n = 0;
  for (int64_t slot = 0; slot < block.count; slot += 2 * kGroupPairs, ++n) {
    const int64_t last = slot + 2 * kGroupPairs, at = slot / 2 * padded;
    if (last <= block.tail) {
      groups[n] = {block.tail_keys.v + at, block.tail_keys.next_v + at};
    } else if (slot >= block.tail && last <= block.count) {
      groups[n] = {block.own_keys.v + at, block.own_keys.next_v + at};
    } else {
      for (int64_t i = 0; i < kGroupPairs; ++i) {
        const int64_t here = slot + 2 * i;
#if defined(RLIR_FAULT_TILE_BORDER)
        const bool prompt = slot < block.tail;
#else
        const bool prompt = here < block.tail;
#endif
        const KeyBlock<F>& part = prompt ? block.tail_keys : block.own_keys;
        const auto bytes = sizeof(uint32_t) * static_cast<uint64_t>(padded);
        uint32_t* to = copies + i * padded;
        if (here < block.count) {
          __builtin_memcpy(to, part.v + here / 2 * padded, bytes);
        } else {
          __builtin_memset(to, 0, bytes);
        }
      }
      groups[n] = {copies, copies};
      copies += kGroupPairs * padded;
    }
  }
  return n;
}

// scores [16][kScoreRow] of a block's slots [from, to rounded up to 16); `from` is a multiple of
// 16.
template <typename F>
inline void tile_scores(float* scores, const uint32_t* q, const KeyBlock<F>& keys, int64_t from,
                        int64_t to, int64_t words) {
  for (int64_t i = from; i < round_up(to, kTile);) {
    const int64_t at = i / kKeyGroup * kKeyGroup * words + i % kKeyGroup;
    if (i % kKeyGroup == 0 && i + kKeyGroup <= round_up(to, kTile)) {
      score_tiles<4>(scores + i, q, keys.k + at, keys.next_k + at, words);
      i += 4 * kTile;
    } else {
      score_tiles<1>(scores + i, q, keys.k + at, keys.next_k + at, words);
      i += kTile;
    }
  }
  memory_is_written();
}

// attend_block for up to 16 queries of one key head.
template <typename F>
inline void attend_tiles(CacheQuery<F>* const* queries, int64_t count, const CacheBlock<F>& block,
                         int64_t dim, float scale, float* scratch) {
  const TileSpace space(dim);
  const int64_t padded = space.padded, words = words_for<F>(dim);
  float *scores = scratch + space.scores, *sums = scratch + space.sums;
  auto *weights = reinterpret_cast<uint32_t*>(scratch + space.weights),
       *rows = reinterpret_cast<uint32_t*>(scratch + space.q),
       *copies = reinterpret_cast<uint32_t*>(scratch + space.copies);
  // Zeros where a tile goes on. What is in rows without a query gets into no other.
  __builtin_memset(weights, 0, sizeof(uint32_t) * static_cast<uint64_t>(count * kPairs));
  float* row[kTile];
  for (int64_t j = 0; j < count; ++j) {
    uint32_t* to = rows + j * space.words;
    __builtin_memset(to + words, 0, sizeof(uint32_t) * static_cast<uint64_t>(space.words - words));
    __builtin_memcpy(to, queries[j]->q, sizeof(uint32_t) * static_cast<uint64_t>(words));
    row[j] = scores + j * kScoreRow;
  }
  memory_is_written();
  const int64_t border = block.tail / kTile * kTile;
  if (block.tail > 0) tile_scores(scores, rows, block.tail_keys, 0, block.tail, words);
#if defined(RLIR_FAULT_TILE_KEEP)
  const int64_t keep = 0;
#else
  const int64_t keep = block.tail - border;
#endif
  keep_first(row, static_cast<int>(count), border, keep,
             [&] { tile_scores(scores, rows, block.own_keys, border, block.count, words); });
  const int64_t whole = round_up(block.count, 16);
  for (int64_t j = 0; j < count; ++j) {
    CacheQuery<F>& query = *queries[j];
    mask_row(query.seen, block, row[j]);
    const float factor = weights_of<F>(weights + j * kPairs, row[j], whole, scale, query.softmax);
    rescale(query.sums, factor, padded);
    __builtin_memcpy(sums + j * padded, query.sums, sizeof(float) * static_cast<uint64_t>(padded));
  }
  ValueGroup groups[kKeyBlock / (2 * kGroupPairs)];
  const int64_t n = value_groups(groups, block, padded, copies);
  memory_is_written();
  for (int64_t lane = 0; lane < padded;) {
    if (padded - lane >= 4 * kTile) {
      value_tiles<4>(sums + lane, weights, groups, n, lane, padded);
      lane += 4 * kTile;
    } else {
      value_tiles<1>(sums + lane, weights, groups, n, lane, padded);
      lane += kTile;
    }
  }
  memory_is_written();
  for (int64_t j = 0; j < count; ++j) {
    __builtin_memcpy(queries[j]->sums, sums + j * padded,
                     sizeof(float) * static_cast<uint64_t>(padded));
  }
}

}  // namespace
}  // namespace rlir::cpu
