// Formulas, layouts and bits: decoder.h.
//
// Why one kernel: eager PyTorch runs some thirty operators a layer and position, each of a few
// microseconds of work and as many of overhead, writes every intermediate, and rounds it. Here the
// rows of a chunk go through all layers with their intermediates in the second level cache.
#include "cpu/decoder.h"

#include "cpu/cache_attention.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

// Work space of a chunk of rows, in words of 4 bytes; parts begin at multiples of 16.
struct Space {
  int64_t tile, h, a, qkv, q, heads, attention, total;
};

int64_t qkv_width(const Decoder& m) { return (m.heads + 2 * m.kv_heads) * m.head_dim; }

Space space_of(const Decoder& m, int64_t rows, int64_t seen) {
  const int64_t padded = round_up(rows, kRows), dim = round_up(m.head_dim, 16);
  Space s;
  s.tile = 0;
  s.h = s.tile + 2 * padded * kPanel;
  s.a = s.h + padded * round_up(m.hidden, 16);
  s.qkv = s.a + padded * round_up(m.mlp, 16);
  s.q = s.qkv + rows * round_up(qkv_width(m), 16);
  s.heads = s.q + m.heads * dim;
  s.attention = s.heads + (m.heads + 2) * dim + round_up(m.hidden, 16);
  s.total = s.attention + 2 * query_scratch(seen);
  return s;
}

template <typename F>
DecoderSizes sizes_of(const Decoder& m, int64_t rows, int64_t capacity, int64_t seen) {
  DecoderSizes s;
  s.panel = kPanel;
  s.values_per_word = F::kPerWord;
  s.keys = round_up(capacity, kKeyGroup) * words_for<F>(m.head_dim);
  s.values = words_of<F>(capacity, F::kSwapped) * round_up(m.head_dim, 16);
  s.scratch = space_of(m, rows, seen).total;
  s.stride = round_up(m.hidden, 16);
  return s;
}

template <typename F>
void pack(const Matrix& weight, int64_t outputs, int64_t depth, void* packed) {
  using Word = typename F::Word;
  const int64_t words = words_for<F>(depth);
  for (int64_t first = 0; first < outputs; first += kPanel) {
    pack_panel<F>(static_cast<Word*>(packed) + first * words, weight, true, first,
                  at_most(outputs - first, kPanel), depth, F::kSwapped);
  }
}

// rms(x, weight) as words.
template <typename F>
void norm_rows(const float* x, int64_t count, int64_t size, const float* weight, float eps,
               typename F::Word* out) {
  const int64_t stride = round_up(size, 16);
  for (int64_t row = 0; row < count; ++row) {
    const float* in = x + row * stride;
    Vf sums[kPer16] = {};
    for (int64_t k = 0; k < stride; k += 16) {
#pragma GCC unroll 4
      for (int part = 0; part < kPer16; ++part) {
        const Vf value = load_vector(in + k + part * kWidth);
        sums[part] = fma(value, value, sums[part]);
      }
    }
    const float scale = 1.0f / __builtin_sqrtf(fold_sums(sums) / static_cast<float>(size) + eps);
    typename F::Word* to = out + row * row_words<F>(size);
    for (int64_t k = 0; k < stride; k += kWidth) {
      F::put(to, k, F::rounded(load_vector(in + k) * splat(scale) * load_vector(weight + k)));
    }
  }
}

// Calls done(first, lanes, c) for each panel of rows [count] of `depth` against a packed weight:
// c [count][kPanel] are outputs first .. first + lanes - 1, lanes a multiple of 16.
template <typename F, typename Done>
void product(const typename F::Word* rows, int64_t count, int64_t depth, const void* weight,
             int64_t outputs, float* c, const Done& done) {
  const int64_t words = words_for<F>(depth);
  const auto* panels = static_cast<const typename F::Word*>(weight);
  for (int64_t first = 0; first < outputs; first += kPanel) {
    const int64_t lanes = at_most(round_up(outputs - first, 16), kPanel);
    const auto* panel = panels + first * words;
    panel_product<F>(c, rows, row_words<F>(depth), count, panel, words, static_cast<int>(lanes),
                     false, panel + kPanel * words);
    done(first, lanes, c);
  }
}

// Words of a weight [outputs][depth], packed.
template <typename F>
int64_t packed_words(int64_t outputs, int64_t depth) {
  return round_up(outputs, kPanel) * words_for<F>(depth);
}

// x += rows weight^T.
template <typename F>
void add_product(const typename F::Word* rows, int64_t count, int64_t depth, const void* weight,
                 int64_t outputs, float* c, float* x) {
  const int64_t stride = round_up(outputs, 16);
  product<F>(rows, count, depth, weight, outputs, c,
             [&](int64_t first, int64_t lanes, const float* tile) {
               for (int64_t row = 0; row < count; ++row) {
                 float* to = x + row * stride + first;
                 for (int64_t i = 0; i < lanes; i += kWidth) {
                   store_vector(to + i, load_vector(to + i) + load_vector(tile + row * kPanel + i));
                 }
               }
             });
}

inline Vf silu(Vf x) { return x / (splat(1.0f) + exp(-x)); }

template <typename F>
void mlp(const Decoder& m, const typename F::Word* h, int64_t count, const void* gate,
         const void* up, float* c, typename F::Word* out) {
  const int64_t words = words_for<F>(m.hidden), stride = row_words<F>(m.mlp);
  const auto* g = static_cast<const typename F::Word*>(gate);
  float* other = c + round_up(count, kRows) * kPanel;
  product<F>(h, count, m.hidden, up, m.mlp, c,
             [&](int64_t first, int64_t lanes, const float* tile) {
               const auto* panel = g + first * words;
               panel_product<F>(other, h, row_words<F>(m.hidden), count, panel, words,
                                static_cast<int>(lanes), false, panel + kPanel * words);
               for (int64_t row = 0; row < count; ++row) {
                 for (int64_t i = 0; i < lanes; i += kWidth) {
                   const int64_t at = row * kPanel + i;
                   const Vf value = silu(load_vector(other + at)) * load_vector(tile + at);
                   F::put(out + row * stride, first + i, F::rounded(value));
                 }
               }
             });
}

// out [d padded to 16, pads zero] = x [d] at a position (half-rotation layout).
void rotate(const float* x, const float* cosine, const float* sine, int64_t dim, float* out) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    out[i] = low * cosine[i] - high * sine[i];
    out[i + half] = high * cosine[i + half] + low * sine[i + half];
  }
  for (int64_t i = dim; i < round_up(dim, 16); ++i) out[i] = 0.0f;
}

// Keys or values of a head of a sequence and layer.
template <typename F>
typename F::Word* keys_of(const Decoder& m, const DecoderCache& cache, int64_t layer,
                          int64_t sequence, int64_t head) {
  const int64_t size = round_up(cache.capacity, kKeyGroup) * words_for<F>(m.head_dim);
  return static_cast<typename F::Word*>(cache.k) +
         ((layer * cache.sequences + sequence) * m.kv_heads + head) * size;
}
template <typename F>
typename F::Word* values_of(const Decoder& m, const DecoderCache& cache, int64_t layer,
                            int64_t sequence, int64_t head) {
  const int64_t size = words_for<F>(cache.capacity) * round_up(m.head_dim, 16);
  return static_cast<typename F::Word*>(cache.v) +
         ((layer * cache.sequences + sequence) * m.kv_heads + head) * size;
}

// What put_column wrote.
template <typename F>
float column_value(const typename F::Word* words, int64_t stride, int64_t n, int64_t lane) {
  if constexpr (F::kPerWord == 2) {
    const uint32_t word = words[n / 2 * stride + lane];
    return __builtin_bit_cast(float, n % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return words[(F::kSwapped ? n ^ 1 : n) * stride + lane];
  }
}

template <typename F>
void copy_position(const Decoder& m, const DecoderCache& from, int64_t sequence, int64_t position,
                   const DecoderCache& to, int64_t to_sequence, int64_t to_position) {
  const int64_t words = words_for<F>(m.head_dim), padded = round_up(m.head_dim, 16);
  const auto column = [&](typename F::Word* keys, int64_t n) {
    return keys + n / kKeyGroup * kKeyGroup * words + n % kKeyGroup;
  };
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    for (int64_t head = 0; head < m.kv_heads; ++head) {
      const auto* k = column(keys_of<F>(m, from, layer, sequence, head), position);
      auto* to_k = column(keys_of<F>(m, to, layer, to_sequence, head), to_position);
      for (int64_t w = 0; w < words; ++w) to_k[w * kKeyGroup] = k[w * kKeyGroup];
      const auto* v = values_of<F>(m, from, layer, sequence, head);
      auto* to_v = values_of<F>(m, to, layer, to_sequence, head);
      for (int64_t i = 0; i < padded; ++i) {
        put_column<F>(to_v, padded, to_position, i, column_value<F>(v, padded, position, i));
      }
    }
  }
}

template <typename F>
class Attention {
 public:
  using Word = typename F::Word;

  Attention(const Decoder& m, const DecoderCache& shared, const DecoderCache& own, int64_t layer)
      : m_(m), shared_(shared), own_(own), layer_(layer) {}

  // One row: its key and value go to its cache; out [D] words are what its queries find. `next` is
  // the row that comes after.
  void row(const DecoderRow& row, const DecoderRow& next, const float* qkv, Word* q, float* heads,
           float* scratch, Word* out) const {
    const int64_t dim = m_.head_dim, padded = round_up(dim, 16), group = m_.heads / m_.kv_heads;
    const float* cosine = m_.rotary + row.position * dim;
    const float* sine = cosine + m_.positions * dim;
    float* spare = heads + m_.heads * padded;
    for (int64_t h = 0; h < m_.heads; ++h) {
      rotate(qkv + h * dim, cosine, sine, dim, spare);
      put_row<F>(q + h * padded, spare, padded);
    }
    const double root = __builtin_sqrt(static_cast<double>(dim));
    const float scale = static_cast<float>(0x1.71547652b82fep+0 * (1.0 / root));
    for (int64_t h = 0; h < m_.kv_heads; ++h) {
      rotate(qkv + (m_.heads + h) * dim, cosine, sine, dim, spare);
      append(row, h, spare, qkv + (m_.heads + m_.kv_heads + h) * dim, spare + padded);
      const Segment<F> shared = segment(shared_, row.shared, h, row.shared_count);
      Segment<F> own = segment(own_, row.own, h, row.own_count);
      const bool last = h + 1 == m_.kv_heads;
      own.next_k = keys(own_, last ? next.own : row.own, last ? 0 : h + 1);
      own.next_v = values(own_, last ? next.own : row.own, last ? 0 : h + 1);
      float* to[2];
      const Word* from[2];
      for (int64_t j = 0; j < group; j += 2) {
        for (int i = 0; i < 2; ++i) {
          to[i] = heads + (h * group + j + i) * padded;
          from[i] = q + (h * group + j + i) * padded;
        }
        if (j + 1 < group) {
          attend<F, 2>(to, from, shared, own, dim, scale, scratch);
        } else {
          attend<F, 1>(to, from, shared, own, dim, scale, scratch);
        }
      }
    }
    // Heads side by side, without their pads.
    float* merged = spare + 2 * padded;
    for (int64_t h = 0; h < m_.heads; ++h) {
      for (int64_t i = 0; i < dim; ++i) merged[h * dim + i] = heads[h * padded + i];
    }
    for (int64_t i = m_.hidden; i < round_up(m_.hidden, 16); ++i) merged[i] = 0.0f;
    put_row<F>(out, merged, round_up(m_.hidden, 16));
  }

 private:
  Word* keys(const DecoderCache& cache, int64_t sequence, int64_t head) const {
    return keys_of<F>(m_, cache, layer_, sequence, head);
  }

  Word* values(const DecoderCache& cache, int64_t sequence, int64_t head) const {
    return values_of<F>(m_, cache, layer_, sequence, head);
  }

  Segment<F> segment(const DecoderCache& cache, int64_t sequence, int64_t head,
                     int64_t count) const {
    if (count == 0) return {nullptr, nullptr, 0, nullptr, nullptr};
    const Word *k = keys(cache, sequence, head), *v = values(cache, sequence, head);
    return {k, v, count, k, v};
  }

  void append(const DecoderRow& row, int64_t head, const float* k, const float* v,
              float* spare) const {
    const int64_t dim = m_.head_dim, padded = round_up(dim, 16), n = row.own_count - 1;
    Word* words = reinterpret_cast<Word*>(spare);
    put_row<F>(words, k, padded);
    const int64_t count = words_for<F>(dim);
    Word* column = keys(own_, row.own, head) + n / kKeyGroup * kKeyGroup * count + n % kKeyGroup;
    for (int64_t w = 0; w < count; ++w) column[w * kKeyGroup] = words[w];
    Word* to = values(own_, row.own, head);
    for (int64_t i = 0; i < dim; ++i) spare[i] = v[i];
    for (int64_t i = dim; i < padded; ++i) spare[i] = 0.0f;
    for (int64_t i = 0; i < padded; i += kWidth) {
      store_vector(spare + i, F::rounded(load_vector(spare + i)));
    }
    for (int64_t i = 0; i < padded; ++i) put_column<F>(to, padded, n, i, spare[i]);
  }

  const Decoder& m_;
  const DecoderCache &shared_, &own_;
  int64_t layer_;
};

template <typename F>
void layers(const Decoder& m, const DecoderCache& shared, const DecoderCache& own,
            const DecoderRow* rows, int64_t count, float* x, float* scratch) {
  using Word = typename F::Word;
  const Space s = space_of(m, count, 0);
  float *c = scratch + s.tile, *qkv = scratch + s.qkv;
  Word *h = reinterpret_cast<Word*>(scratch + s.h), *a = reinterpret_cast<Word*>(scratch + s.a);
  const int64_t width = qkv_width(m), stride = round_up(width, 16);
  const int64_t matrix = packed_words<F>(m.hidden, m.hidden);
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    const auto weight = [&](const void* all, int64_t index, int64_t words) {
      return static_cast<const Word*>(all) + index * words;
    };
    const float* norms = m.norms + 2 * layer * round_up(m.hidden, 16);
    norm_rows<F>(x, count, m.hidden, norms, m.eps, h);
    product<F>(h, count, m.hidden, weight(m.qkv, layer, packed_words<F>(width, m.hidden)), width, c,
               [&](int64_t first, int64_t lanes, const float* tile) {
                 for (int64_t row = 0; row < count; ++row) {
                   for (int64_t i = 0; i < lanes; i += kWidth) {
                     store_vector(qkv + row * stride + first + i,
                                  load_vector(tile + row * kPanel + i));
                   }
                 }
               });
    const Attention<F> attention(m, shared, own, layer);
    for (int64_t row = 0; row < count; ++row) {
      attention.row(rows[row], rows[at_most(row + 1, count - 1)], qkv + row * stride,
                    reinterpret_cast<Word*>(scratch + s.q), scratch + s.heads,
                    scratch + s.attention, h + row * row_words<F>(m.hidden));
    }
    add_product<F>(h, count, m.hidden, weight(m.out, layer, matrix), m.hidden, c, x);
    norm_rows<F>(x, count, m.hidden, norms + round_up(m.hidden, 16), m.eps, h);
    const int64_t half = packed_words<F>(m.mlp, m.hidden);
    mlp<F>(m, h, count, weight(m.gate_up, 2 * layer, half), weight(m.gate_up, 2 * layer + 1, half),
           c, a);
    add_product<F>(a, count, m.mlp, weight(m.down, layer, packed_words<F>(m.hidden, m.mlp)),
                   m.hidden, c, x);
  }
}

template <typename F>
void logits(const Decoder& m, const float* x, int64_t count, float* out, float* scratch) {
  const Space s = space_of(m, count, 0);
  auto* h = reinterpret_cast<typename F::Word*>(scratch + s.h);
  norm_rows<F>(x, count, m.hidden, m.last, m.eps, h);
  product<F>(h, count, m.hidden, m.head, m.codes, scratch + s.tile,
             [&](int64_t first, int64_t lanes, const float* tile) {
               const uint64_t bytes = 4 * static_cast<uint64_t>(at_most(lanes, m.codes - first));
               for (int64_t row = 0; row < count; ++row) {
                 __builtin_memcpy(out + row * m.codes + first, tile + row * kPanel, bytes);
               }
             });
}

}  // namespace

DecoderSizes decoder_sizes(const Decoder& m, int64_t rows, int64_t capacity, int64_t seen) {
  return m.bfloat16 ? sizes_of<BFloat16Words>(m, rows, capacity, seen)
                    : sizes_of<Plain>(m, rows, capacity, seen);
}

void decoder_pack(const Matrix& weight, int64_t outputs, int64_t depth, bool bfloat16,
                  void* packed) {
  bfloat16 ? pack<BFloat16Words>(weight, outputs, depth, packed)
           : pack<Plain>(weight, outputs, depth, packed);
}

void decoder_copy(const Decoder& m, const DecoderCache& from, int64_t sequence, int64_t position,
                  const DecoderCache& to, int64_t to_sequence, int64_t to_position) {
  (m.bfloat16 ? copy_position<BFloat16Words> : copy_position<Plain>)(m, from, sequence, position,
                                                                     to, to_sequence, to_position);
}

void decoder_layers(const Decoder& m, const DecoderCache& shared, const DecoderCache& own,
                    const DecoderRow* rows, int64_t count, float* x, void* scratch) {
  float* space = static_cast<float*>(scratch);
  m.bfloat16 ? layers<BFloat16Words>(m, shared, own, rows, count, x, space)
             : layers<Plain>(m, shared, own, rows, count, x, space);
}

void decoder_logits(const Decoder& m, const float* x, int64_t count, float* out, void* scratch) {
  float* space = static_cast<float*>(scratch);
  m.bfloat16 ? logits<BFloat16Words>(m, x, count, out, space)
             : logits<Plain>(m, x, count, out, space);
}

}  // namespace rlir::cpu::RLIR_ISA
