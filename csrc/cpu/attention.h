// What the kernels of the attention ops are made of: panels of queries (cpu/attention_panel.h) go
// over blocks of keys, by themselves or a few together; panels of few queries have a way of their
// own (cpu/attention_few.h). Formulas, order and bits: cpu/video_attention.h.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/attention_few.h"
#include "cpu/attention_panel.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// A block of PackedKeys: keys lie together (as they are, their rows may fall on a few lines of the
// first level cache), values are turned, and it is said whether these are finite.
template <typename F>
struct PackedBlock {
  using Word = typename F::Word;
  Word *k, *v, *finite;

  PackedBlock(char* at, int64_t dim)
      : k(reinterpret_cast<Word*>(at)), v(k + key_words(dim)), finite(v + value_words(dim)) {}
  static int64_t key_words(int64_t dim) { return round_up(kKeyBlock * words_for<F>(dim), 16); }
  static int64_t value_words(int64_t dim) { return kKeyBlock / F::kPerWord * round_up(dim, 16); }
  static int64_t bytes(int64_t dim) { return 4 * (key_words(dim) + value_words(dim) + 16); }
};

template <typename F>
inline void pack_block(const VideoAttention& a, int64_t block, char* to) {
  const PackedBlock<F> packed(to, a.dim);
  const int64_t start = block * kKeyBlock;
  const int64_t count = at_most(a.keys.count[0] + a.keys.count[1] - start, kKeyBlock);
  const Rows<F> keys = block_rows<F>(a.keys, false, start, count, a.dim, true, packed.k);
  if (keys.first != packed.k) {
    __builtin_memcpy(packed.k, keys.first,
                     static_cast<uint64_t>(count * words_for<F>(a.dim)) * sizeof *packed.k);
  }
  bool everything[kKeyBlock];
  for (bool& x : everything) x = true;
  *packed.finite = pack_rows_of<F>(a, true, start, count, everything, packed.v) ? 1 : 0;
}

// What panels that go over a block one after the other share of it.
template <typename F>
struct SharedBlock {
  using Word = typename F::Word;
  Rows<F> keys;
  const Word* values = nullptr;
  bool finite = false;

  SharedBlock(const VideoAttention& a, int64_t block, int64_t count, bool several, Word* copy) {
    if (a.packed.part[0] == nullptr) {
      keys = block_rows<F>(a.keys, false, block * kKeyBlock, count, a.dim, several, copy);
      return;
    }
    const int part = block < a.packed.border ? 0 : 1;
    const int64_t at = part == 0 ? block : block - a.packed.border;
    const PackedBlock<F> packed(
        const_cast<char*>(a.packed.part[part]) + at * PackedBlock<F>::bytes(a.dim), a.dim);
    keys = {packed.k, words_for<F>(a.dim)};
    values = packed.v;
    finite = *packed.finite != 0;
  }
};

// A block for panels that go over it one after the other; `ahead` is asked for meanwhile.
template <typename F>
inline void attend_block(Panel<F>* panels, int panel_count, const VideoAttention& a, int64_t block,
                         RowsAhead ahead) {
  constexpr int64_t kTimes = (kKeyBlock + kRowsOf<F> - 1) / kRowsOf<F>;
  const int64_t words = words_for<F>(a.dim), stride = round_up(a.dim, 16);
  const int64_t start = block * kKeyBlock;
  int64_t most = 0;
  for (int i = 0; i < panel_count; ++i) {
    const int64_t count = at_most(panels[i].reach.most_high - start, kKeyBlock);
    most = count > most ? count : most;
  }
  SharedBlock<F> shared(a, block, most, panel_count > 1, panels[0].copy);
  const int64_t pace = ahead.pace(panel_count * kTimes);
  const auto ask = [&] { ahead.ask(pace); };
  for (int i = 0; i < panel_count; ++i) {
    Panel<F>& p = panels[i];
    if (block < p.reach.first_block() || block >= p.reach.last_block()) continue;
    const int64_t count = at_most(p.reach.most_high - start, kKeyBlock);
    panel_product<F>(p.scores, shared.keys.first, shared.keys.stride, count, p.q, words,
                     static_cast<int>(p.lanes), false, nullptr, ask);
    bool seen[kKeyBlock];
    const bool all = !mask_scores(a.mask, p.reach, start, count, p.used, p.scores, seen);
    softmax_block<F>(p, count, a.dim, a.scale);
    if (shared.values == nullptr && panel_count > 1) {
      bool everything[kKeyBlock];
      for (bool& x : everything) x = true;
      shared.finite = pack_rows_of<F>(a, true, start, most, everything, p.values);
      shared.values = p.values;
    }
    const typename F::Word* values = shared.values;
    if (!shared.finite) {
      // Rows that nobody sees are left out: they may be anything.
      const bool finite = pack_rows_of<F>(a, true, start, count, all ? nullptr : seen, p.values);
      if (!finite) {
        add_values_apart<F>(p, a, start, count);
        continue;
      }
      values = p.values;
    }
    add_columns<F>(p.sums, reinterpret_cast<const typename F::Word*>(p.scores), values, stride,
                   words_of<F>(count, true), a.dim, p.used);
  }
}

// Blocks [first, last) of those that the panels see, one after the other: panels of one key head
// that go together, or of some key heads one each, with a call each. Then `after`, if not null, is
// what the caller goes on with.
template <typename F>
inline void attend_blocks(Panel<F>* panels, int panel_count, const VideoAttention* calls, int heads,
                          int64_t first, int64_t last, const KeysAfter* after = nullptr) {
  int64_t begin = INT64_MAX, end = 0;
  for (int i = 0; i < panel_count; ++i) {
    const PanelReach& r = panels[i].reach;
    begin = r.first_block() < begin ? r.first_block() : begin;
    end = r.last_block() > end ? r.last_block() : end;
  }
  begin = first > begin ? first : begin;
  end = at_most(last, end);
  const VideoAttention& a = calls[0];
  const bool packed = a.packed.part[0] != nullptr;
  const auto ahead = [&](int64_t block, int head) -> RowsAhead {
    const bool more = block + 1 < end;
    if (packed || (!more && after == nullptr)) return {};
    if (more) {
      return {Panel<F>::kBFloat16, a.keys, heads * a.dim, (block + 1) * kKeyBlock, head, heads};
    }
    return {Panel<F>::kBFloat16, after->keys, after->heads * a.dim, after->start, head, heads};
  };
  if (panel_count == heads && !packed && are_few(panels[0], a.dim)) {
    FewSpace<F> space;
    FewQueries<F> few[kHeadsTogether];
    for (int h = 0; h < heads; ++h) few[h].begin(panels[h], a.dim, space);
    for (int64_t block = begin; block < end; ++block) {
      for (int h = 0; h < heads; ++h) {
        attend_few<F>(few[h], panels[h], calls[h], block, ahead(block, h));
      }
    }
    for (int h = 0; h < heads; ++h) few[h].give_sums(panels[h]);
    return;
  }
  const int each = panel_count / heads;
  for (int64_t block = begin; block < end; ++block) {
    for (int h = 0; h < heads; ++h) {
      attend_block(panels + h * each, each, calls[h], block, ahead(block, h));
    }
  }
}

template <typename F>
inline void finish(const Panel<F>& p, const VideoAttention& a, int64_t first) {
  constexpr bool kBFloat16 = Panel<F>::kBFloat16;
  for (int lane = 0; lane < p.lanes; lane += kWidth) {
    void* rows[kWidth] = {};
    for (int i = lane; i < at_most(lane + kWidth, p.lanes); ++i) {
      const LanePlace place = lane_place(a.queries, first + i);
      rows[i - lane] = element(kBFloat16, a.out, place.at(a.out_stride));
      if (a.lse == nullptr) continue;
      const double natural = 0x1.62e42fefa39efp-1 * static_cast<double>(p.maximum[i]);
      a.lse[place.at(a.lse_stride)] =
          p.l[i] == 0.0f ? minus_infinity()  // it saw nothing
                         : static_cast<float>(natural + log(static_cast<double>(p.l[i])));
    }
    const Vf l = load_vector(p.l + lane);
    const Vf factors = select(l == Vf{}, Vf{}, splat(1.0f) / l);
    store_lanes<kBFloat16>(rows, p.sums, lane, a.dim, factors);
  }
}

}  // namespace
}  // namespace rlir::cpu