// The products of cpu/decoder.h: its weights against the rows of a step.
#include "core/exp.h"
#include "cpu/decoder.h"
#include "cpu/words.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

int64_t qkv_width(const Decoder& m) { return (m.heads + 2 * m.kv_heads) * m.head_dim; }

template <typename F>
void pack(const Matrix& weight, int64_t outputs, int64_t depth, void* packed) {
  using Word = typename F::Word;
  const int64_t words = words_for<F>(depth);
  for (int64_t first = 0; first < outputs; first += kPanel) {
    pack_panel<F>(static_cast<Word*>(packed) + first * words, weight, true, first,
                  at_most(outputs - first, kPanel), depth, F::kSwapped);
  }
}

// Words of a weight [outputs][depth], packed.
template <typename F>
int64_t packed_words(int64_t outputs, int64_t depth) {
  return round_up(outputs, kPanel) * words_for<F>(depth);
}

template <typename F>
const void* panel_at(const void* packed, int64_t panel, int64_t depth) {
  return static_cast<const typename F::Word*>(packed) + panel * kPanel * words_for<F>(depth);
}

// A packed weight [outputs][depth], or int8 values and what they are multiplied by.
struct Weight {
  const void* packed;
  const float* scales;
};

// Words of int8 values in their places.
template <typename F>
void widen(const int8_t* values, int64_t words, typename F::Word* to) {
  for (int64_t i = 0; i < words * kPanel; i += kWidth) {
#if defined(__AVX512BF16__)
    if constexpr (F::kPerWord == 2) {
      const auto half = [&](int64_t at) {
        __m128i bytes;
        __builtin_memcpy(&bytes, values + 2 * i + at, sizeof bytes);
        return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
      };
      const __m512bh pairs = _mm512_cvtne2ps_pbh(half(16), half(0));
      __builtin_memcpy(to + i, &pairs, sizeof pairs);
      continue;
    }
#endif
    for (int64_t j = i; j < i + kWidth; ++j) {
      to[j] = static_cast<typename F::Word>(values[j]);  // a float
    }
  }
}

// c [count][kPanel] = rows against panel number `panel` of a weight; `next`: cpu/product.h.
template <typename F>
void panel_of(const Weight& weight, int64_t panel, const typename F::Word* rows, int64_t count,
              int64_t depth, int64_t lanes, const void* next, float* c, typename F::Word* spare) {
  using Word = typename F::Word;
  const int64_t words = words_for<F>(depth), at = panel * kPanel * words;
  if (weight.scales == nullptr) {
    const Word* from = static_cast<const Word*>(weight.packed) + at;
    return panel_product<F>(c, rows, row_words<F>(depth), count, from, words,
                            static_cast<int>(lanes), false, next);
  }
  const int8_t* values = static_cast<const int8_t*>(weight.packed) + at * F::kPerWord;
  for (int64_t k = 0; k < words; k += kDepth) {
    const int64_t some = at_most(kDepth, words - k);
    widen<F>(values + k * kPanel * F::kPerWord, some, spare);
    panel_product<F>(c, rows + k, row_words<F>(depth), count, spare, some, static_cast<int>(lanes),
                     k > 0);
  }
  const float* scales = weight.scales + panel * kPanel;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < lanes; i += kWidth) {
      float* to = c + row * kPanel + i;
      store_vector(to, load_vector(to) * load_vector(scales + i));
    }
  }
}

// Calls done(first, lanes, c) for panels [begin, end) of rows [count] of `depth` against a weight:
// c [count][kPanel] are outputs first .. first + lanes - 1, lanes a multiple of 16.
template <typename F, typename Done>
void product(const typename F::Word* rows, int64_t count, int64_t depth, const Weight& weight,
             int64_t outputs, int64_t begin, int64_t end, const void* next, float* c,
             typename F::Word* spare, const Done& done) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel, lanes = at_most(round_up(outputs - first, 16), kPanel);
    const bool last = panel + 1 == end && next != nullptr;
    const void* ahead = last ? next : panel_at<F>(weight.packed, panel + 1, depth);
    panel_of<F>(weight, panel, rows, count, depth, lanes, ahead, c, spare);
    done(first, lanes, c);
  }
}

inline Vf silu(Vf x) { return x / (splat(1.0f) + exp(-x)); }

template <typename F>
struct Multiply {
  using Word = typename F::Word;
  const Decoder& m;
  int64_t layer;
  const Word* h;
  int64_t count, begin, end;
  const void* next;
  float* c;
  Word* spare;  // a part of a panel

  // Number `index` of `all`.
  Weight weight(const void* all, const float* scales, int64_t index, int64_t outputs,
                int64_t depth) const {
    const int64_t at = index * packed_words<F>(outputs, depth);
    if (scales == nullptr) return {static_cast<const Word*>(all) + at, nullptr};
    return {static_cast<const int8_t*>(all) + at * F::kPerWord,
            scales + index * round_up(outputs, kPanel)};
  }

  void qkv(float* to) const {
    const int64_t width = qkv_width(m), stride = round_up(width, 16);
    product<F>(h, count, m.hidden, weight(m.qkv, m.scales.qkv, layer, width, m.hidden), width,
               begin, end, next, c, spare, [&](int64_t first, int64_t lanes, const float* tile) {
                 for (int64_t row = 0; row < count; ++row) {
                   for (int64_t i = 0; i < lanes; i += kWidth) {
                     store_vector(to + row * stride + first + i,
                                  load_vector(tile + row * kPanel + i));
                   }
                 }
               });
  }

  // x += h W^T, W [hidden][depth].
  void add(const void* all, const float* scales, int64_t depth, float* x) const {
    const int64_t stride = round_up(m.hidden, 16);
    product<F>(h, count, depth, weight(all, scales, layer, m.hidden, depth), m.hidden, begin, end,
               next, c, spare, [&](int64_t first, int64_t lanes, const float* tile) {
                 for (int64_t row = 0; row < count; ++row) {
                   float* to = x + row * stride + first;
                   for (int64_t i = 0; i < lanes; i += kWidth) {
                     store_vector(to + i,
                                  load_vector(to + i) + load_vector(tile + row * kPanel + i));
                   }
                 }
               });
  }

  void mlp(Word* out) const {
    const int64_t stride = row_words<F>(m.mlp);
    const auto half = [&](int64_t index) {
      return weight(m.gate_up, m.scales.gate_up, 2 * layer + index, m.mlp, m.hidden);
    };
    const Weight gate = half(0);
    float* other = c + round_up(count, kRowPad) * kPanel;
    product<F>(h, count, m.hidden, half(1), m.mlp, begin, end, next, c, spare,
               [&](int64_t first, int64_t lanes, const float* tile) {
                 const int64_t panel = first / kPanel;
                 const bool last = panel + 1 == end && next != nullptr;
                 const void* ahead = last ? panel_at<F>(next, 1, m.hidden)  // after half(1)'s
                                          : panel_at<F>(gate.packed, panel + 1, m.hidden);
                 panel_of<F>(gate, panel, h, count, m.hidden, lanes, ahead, other, spare);
                 for (int64_t row = 0; row < count; ++row) {
                   for (int64_t i = 0; i < lanes; i += kWidth) {
                     const int64_t at = row * kPanel + i;
                     const Vf value = silu(load_vector(other + at)) * load_vector(tile + at);
                     F::put(out + row * stride, first + i, F::rounded(value));
                   }
                 }
               });
  }

  void head(float* logits) const {
    product<F>(h, count, m.hidden, {m.head, nullptr}, m.codes, begin, end, next, c, spare,
               [&](int64_t first, int64_t lanes, const float* tile) {
                 const auto bytes = 4 * static_cast<uint64_t>(at_most(lanes, m.codes - first));
                 for (int64_t row = 0; row < count; ++row) {
                   __builtin_memcpy(logits + row * m.codes + first, tile + row * kPanel, bytes);
                 }
               });
  }
};

// Of two weights that are read by turns, the one that is read first.
template <typename F>
const void* panel_of_weight(const Decoder& m, DecoderProduct which, int64_t layer, int64_t panel) {
  if (m.scales.qkv != nullptr) return nullptr;
  const auto at = [&](const void* all, int64_t index, int64_t outputs, int64_t depth) {
    const int64_t words = packed_words<F>(outputs, depth);
    return panel_at<F>(static_cast<const typename F::Word*>(all) + index * words, panel, depth);
  };
  switch (which) {
    case DecoderProduct::kQkv:
      return at(m.qkv, layer, qkv_width(m), m.hidden);
    case DecoderProduct::kOut:
      return at(m.out, layer, m.hidden, m.hidden);
    case DecoderProduct::kMlp:
      return at(m.gate_up, 2 * layer + 1, m.mlp, m.hidden);
    case DecoderProduct::kDown:
      return at(m.down, layer, m.hidden, m.mlp);
    case DecoderProduct::kHead:
      return at(m.head, 0, m.codes, m.hidden);
  }
  return nullptr;
}

template <typename F>
void multiply(const Decoder& m, DecoderProduct which, int64_t layer, const void* h, int64_t count,
              int64_t begin, int64_t end, const void* next, void* to, float* scratch) {
  const ProductScope<F> scope;
  const int64_t tiles = 2 * round_up(count, kRowPad) * kPanel;
  const Multiply<F> p{m,     layer,   static_cast<const typename F::Word*>(h),
                      count, begin,   end,
                      next,  scratch, reinterpret_cast<typename F::Word*>(scratch + tiles)};
  switch (which) {
    case DecoderProduct::kQkv:
      return p.qkv(static_cast<float*>(to));
    case DecoderProduct::kOut:
      return p.add(m.out, m.scales.out, m.hidden, static_cast<float*>(to));
    case DecoderProduct::kMlp:
      return p.mlp(static_cast<typename F::Word*>(to));
    case DecoderProduct::kDown:
      return p.add(m.down, m.scales.down, m.mlp, static_cast<float*>(to));
    case DecoderProduct::kHead:
      return p.head(static_cast<float*>(to));
  }
}

}  // namespace

void decoder_pack(const Matrix& weight, int64_t outputs, int64_t depth, bool bfloat16,
                  void* packed) {
  bfloat16 ? pack<BFloat16Words>(weight, outputs, depth, packed)
           : pack<Plain>(weight, outputs, depth, packed);
}

void decoder_multiply(const Decoder& m, DecoderProduct which, int64_t layer, const void* h,
                      int64_t count, int64_t begin, int64_t end, const void* next, void* to,
                      void* scratch) {
  (m.bfloat16 ? multiply<BFloat16Words> : multiply<Plain>)(m, which, layer, h, count, begin, end,
                                                           next, to, static_cast<float*>(scratch));
}

const void* decoder_panel(const Decoder& m, DecoderProduct which, int64_t layer, int64_t panel) {
  return m.bfloat16 ? panel_of_weight<BFloat16Words>(m, which, layer, panel)
                    : panel_of_weight<Plain>(m, which, layer, panel);
}

}  // namespace rlir::cpu::RLIR_ISA
