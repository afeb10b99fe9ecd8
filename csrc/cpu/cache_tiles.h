// Attention of one row over the cache of cpu/decoder.h by AMX tiles: cpu/cache_attention.h, which
// includes this, for pairs of bfloat16 in files compiled for AMX.
//
// Layout. Queries of a key head are rows of A, at most 16; positions, or the values' d, are lanes
// of B, which is read where it lies in the cache. Weights, scores and sums are scratch of some 30
// KiB.
//
// Order. That of panels (cpu/attention.h): a group of tdpbf16ps is 32 d, or 32 positions from the
// start of a block of 128, and its sums do not tell A from B. A group on the border of the two
// segments is put together in a copy; positions beyond the last one are zeros there.
//
// Internal linkage.
#pragma once

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kScoreRow = kKeyBlock + 4 * kTile;  // a block's scores, and some of the next
constexpr int64_t kPairs = kKeyBlock / 2;             // words of a block's weights
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

// Values of 32 positions, and what is asked for meanwhile.
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
  int64_t scores = 0, weights, q, out, copies, total;

  explicit TileSpace(int64_t dim)
      : words(round_up((dim + 1) / 2, kTile)),
        padded(round_up(dim, 16)),
        weights(kTile * kScoreRow),
        q(weights + kTile * kPairs),
        out(q + kTile * words),
        copies(out + kTile * padded),
        total(copies + 2 * kGroupPairs * padded) {}
};

// A block's groups of values; a copy where one is not whole: at the border and at the end.
template <typename F>
inline int64_t value_groups(ValueGroup* groups, const Segment<F>& shared, const Segment<F>& own,
                            int64_t start, int64_t end, int64_t padded, uint32_t* copies) {
  int64_t count = 0;
  for (int64_t slot = start; slot < end; slot += 2 * kGroupPairs, ++count) {
    const int64_t last = slot + 2 * kGroupPairs, at = slot - shared.count;
    if (last <= shared.count) {
      groups[count] = {shared.v + slot / 2 * padded, shared.next_v + slot / 2 * padded};
    } else if (at >= 0 && last <= shared.count + own.count) {
      groups[count] = {own.v + at / 2 * padded, own.next_v + at / 2 * padded};
    } else {
      for (int64_t i = 0; i < kGroupPairs; ++i) {
        const int64_t here = slot + 2 * i;
#if defined(RLIR_FAULT_TILE_BORDER)
        const bool prompt = slot < shared.count;
#else
        const bool prompt = here < shared.count;
#endif
        const Segment<F>& part = prompt ? shared : own;
        const int64_t pair = (here - (prompt ? 0 : shared.count)) / 2;
        const auto bytes = sizeof(uint32_t) * static_cast<uint64_t>(padded);
        uint32_t* to = copies + i * padded;
        if (here < shared.count + own.count) {
          __builtin_memcpy(to, part.v + pair * padded, bytes);
        } else {
          __builtin_memset(to, 0, bytes);
        }
      }
      groups[count] = {copies, copies};
      copies += kGroupPairs * padded;
    }
  }
  return count;
}

// attend for up to 16 queries, q and out [queries][d padded].
template <typename F>
inline void attend_tiles(float* out, const uint32_t* q, int64_t queries, const Segment<F>& shared,
                         const Segment<F>& own, int64_t dim, float scale, float* scratch) {
  const TileSpace space(dim);
  const int64_t padded = space.padded, words = words_for<F>(dim), total = shared.count + own.count;
  float *scores = scratch + space.scores, *sums = scratch + space.out;
  auto *weights = reinterpret_cast<uint32_t*>(scratch + space.weights),
       *rows = reinterpret_cast<uint32_t*>(scratch + space.q),
       *copies = reinterpret_cast<uint32_t*>(scratch + space.copies);
  // Rows without a query are zeros, and so are q and weights where a tile goes on.
  __builtin_memset(weights, 0, sizeof(float) * static_cast<uint64_t>(space.copies - space.weights));
  RunningSoftmax softmax[kTile];
  for (int64_t j = 0; j < queries; ++j) {
    softmax[j] = {minus_infinity(), 0.0f};
    __builtin_memcpy(rows + j * space.words, q + j * padded,
                     sizeof(uint32_t) * static_cast<uint64_t>(words));
  }
  memory_is_written();
  int64_t known = 0;  // scores of the block that are there
  for (int64_t start = 0; start < total; start += kKeyBlock) {
    const int64_t count = at_most(kKeyBlock, total - start);
    while (known < count) {
      const bool prompt = start + known < shared.count;
      const Segment<F>& part = prompt ? shared : own;
      const int64_t at = start + known - (prompt ? 0 : shared.count);  // a multiple of 16
      const int64_t in_group = (kKeyGroup - at % kKeyGroup) / kTile;
      const int64_t left = (at_most(part.count - at, count - known) + kTile - 1) / kTile;
      const int64_t from = at / kKeyGroup * kKeyGroup * words + at % kKeyGroup;
      int64_t tiles = 1;
      if (in_group >= 4 && left >= 4) {
        score_tiles<4>(scores + known, rows, part.k + from, part.next_k + from, words);
        tiles = 4;
      } else {
        score_tiles<1>(scores + known, rows, part.k + from, part.next_k + from, words);
      }
      known += at_most(tiles * kTile, part.count - at);
    }
    memory_is_written();
    const int64_t whole = round_up(count, 16);
    for (int64_t j = 0; j < queries; ++j) {
      float *row = scores + j * kScoreRow, *sum = sums + j * padded;
      for (int64_t i = count; i < whole; ++i) row[i] = minus_infinity();
      uint32_t* to = weights + j * kPairs;
      const float factor = weights_of<F>(to, row, whole, scale, softmax[j]);
      for (int64_t i = whole / 2; i % kGroupPairs != 0; ++i) to[i] = 0;
      if (factor != 1.0f && start > 0) {
        for (int64_t i = 0; i < padded; i += kWidth) {
          store_vector(sum + i, load_vector(sum + i) * splat(factor));
        }
      }
#if !defined(RLIR_FAULT_TILE_CARRY)
      for (int64_t i = kKeyBlock; i < known; ++i) row[i - kKeyBlock] = row[i];
#endif
    }
    known -= kKeyBlock;
    ValueGroup groups[kKeyBlock / (2 * kGroupPairs)];
    const int64_t n = value_groups(groups, shared, own, start, start + count, padded, copies);
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
  }
  for (int64_t j = 0; j < queries; ++j) {
    const float inverse = 1.0f / softmax[j].l;
    for (int64_t i = 0; i < padded; i += kWidth) {
      store_vector(out + j * padded + i, load_vector(sums + j * padded + i) * splat(inverse));
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
