// Formulas, layouts and bits: decoder.h.
//
// Why kernels of our own: eager PyTorch runs some thirty operators a layer and step, each of a few
// microseconds of work and as many of overhead, writes every intermediate, and rounds it.
#include "cpu/decoder.h"

#include "cpu/cache_attention.h"
#include "cpu/group_decode_attention.h"
#include "cpu/rows.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

int64_t qkv_width(const Decoder& m) { return (m.heads + 2 * m.kv_heads) * m.head_dim; }
int64_t keys_words(int64_t capacity, int64_t words) {
  return round_up(capacity, kKeyBlock) * words;
}

template <typename F>
int64_t values_words(int64_t capacity, int64_t dim) {
  return words_of<F>(round_up(capacity, kKeyBlock), F::kSwapped) * round_up(dim, 16);
}

// Queries of a key head that decoder_attend takes at once.
constexpr int64_t kQueries = 64;

template <typename F>
DecoderSizes sizes_of(const Decoder& m, int64_t rows, int64_t capacity) {
  const int64_t padded = round_up(m.head_dim, 16);
  DecoderSizes s;
  s.panel = kPanel;
  s.values_per_word = F::kPerWord;
  s.keys = keys_words(capacity, words_for<F>(m.head_dim));
  s.values = values_words<F>(capacity, m.head_dim);
  s.x = round_up(m.hidden, 16);
  s.h = row_words<F>(m.hidden);
  s.a = row_words<F>(m.mlp);
  s.qkv = round_up(qkv_width(m), 16);
  s.q = m.heads * padded;
  s.state = decode_state(m.head_dim);
  s.row_pad = kRowPad;
  s.product = (2 * round_up(rows, kRowPad) + (m.scales.qkv == nullptr ? 0 : kDepth)) * kPanel;
  s.attend = attention_scratch(m.head_dim) + kQueries * padded;
  return s;
}

// rms(x, weight) as words.
template <typename F>
void norm_rows(const float* x, int64_t begin, int64_t end, int64_t size, const float* weight,
               float eps, typename F::Word* out) {
  const int64_t stride = round_up(size, 16);
  for (int64_t row = begin; row < end; ++row) {
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

// A head of a sequence and layer in a cache.
template <typename F>
struct CachePlace {
  typename F::Word *k, *v;

  CachePlace(const Decoder& m, const DecoderCache& cache, int64_t layer, int64_t sequence,
             int64_t head) {
    const int64_t at = (layer * cache.sequences + sequence) * m.kv_heads + head;
    k = static_cast<typename F::Word*>(cache.k) +
        at * keys_words(cache.capacity, words_for<F>(m.head_dim));
    v = static_cast<typename F::Word*>(cache.v) + at * values_words<F>(cache.capacity, m.head_dim);
  }

  // k, v [d padded to 16] floats, pads zero, of the slot at `index`; v is rounded in place, and
  // words is space. The other half of a pair of values stays.
  void put(int64_t dim, int64_t index, const float* key, float* value,
           typename F::Word* words) const {
    const int64_t padded = round_up(dim, 16), count = words_for<F>(dim);
    put_row<F>(words, key, padded);
    typename F::Word* column = k + index / kKeyGroup * kKeyGroup * count + index % kKeyGroup;
    for (int64_t w = 0; w < count; ++w) column[w * kKeyGroup] = words[w];
    for (int64_t i = 0; i < padded; i += kWidth) {
      store_vector(value + i, F::rounded(load_vector(value + i)));
    }
    put_value(padded, index, value);
  }

  void put_value(int64_t padded, int64_t index, const float* rounded) const {
    for (int64_t i = 0; i < padded; ++i) put_column<F>(v, padded, index, i, rounded[i]);
  }
};

// Raw rows of the policy's dtype.
template <typename F>
constexpr Dtype kRaw = F::kPerWord == 2 || F::kSwapped ? Dtype::kBFloat16 : Dtype::kFloat32;

template <typename F>
void* raw_row(void* rows, int64_t at) {
  return static_cast<char*>(rows) + at * (kRaw<F> == Dtype::kBFloat16 ? 2 : 4);
}

// A position's rotation, and space for a head.
struct Rotation {
  const float *cosine, *sine;
  int64_t dim;

  Rotation(const Decoder& m, int64_t position)
      : cosine(m.rotary + position * m.head_dim),
        sine(cosine + m.positions * m.head_dim),
        dim(m.head_dim) {}
  void operator()(const float* x, float* out) const { rotate(x, cosine, sine, dim, out); }
};

inline void padded_copy(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
  for (int64_t i = n; i < round_up(n, 16); ++i) out[i] = 0.0f;
}

template <typename F>
void append(const Decoder& m, int64_t layer, const DecoderCache& own, const DecoderRow* rows,
            const float* qkv, int64_t begin, int64_t end, typename F::Word* q, void* raw,
            float* scratch) {
  const int64_t dim = m.head_dim, padded = round_up(dim, 16), stride = round_up(qkv_width(m), 16);
  float *key = scratch, *value = scratch + padded;
  auto* words = reinterpret_cast<typename F::Word*>(value + padded);
  for (int64_t row = begin; row < end; ++row) {
    const float* in = qkv + row * stride;
    const Rotation turn(m, rows[row].position);
    for (int64_t h = 0; h < m.heads; ++h) {
      turn(in + h * dim, key);
      put_row<F>(q + (row * m.heads + h) * padded, key, padded);
      if (raw != nullptr) store_row(raw, kRaw<F>, (row * m.heads + h) * dim, key, dim);
    }
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      turn(in + (m.heads + h) * dim, key);
      padded_copy(in + (m.heads + m.kv_heads + h) * dim, dim, value);
      CachePlace<F>(m, own, layer, rows[row].sequence, h)
          .put(dim, rows[row].index, key, value, words);
    }
  }
}

// Where a sequence's head begins in rows [slots][d].
inline int64_t rows_at(const Decoder& m, const DecoderRows& cache, int64_t layer, int64_t sequence,
                       int64_t head, int64_t slot) {
  return (((layer * cache.sequences + sequence) * m.kv_heads + head) * cache.capacity + slot) *
         m.head_dim;
}

template <typename F>
void append_rows(const Decoder& m, int64_t layer, const DecoderRows& cache, int64_t sequence,
                 const int64_t* positions, const int64_t* slots, const float* qkv, int64_t begin,
                 int64_t end, void* raw, float* scratch) {
  const int64_t dim = m.head_dim, stride = round_up(qkv_width(m), 16);
  for (int64_t row = begin; row < end; ++row) {
    const float* in = qkv + row * stride;
    const Rotation turn(m, positions[row]);
    for (int64_t h = 0; h < m.heads; ++h) {
      turn(in + h * dim, scratch);
      store_row(raw, kRaw<F>, (row * m.heads + h) * dim, scratch, dim);
    }
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      const int64_t at = rows_at(m, cache, layer, sequence, h, slots[row]);
      turn(in + (m.heads + h) * dim, scratch);
      store_row(cache.k, kRaw<F>, at, scratch, dim);
      store_row(cache.v, kRaw<F>, at, in + (m.heads + m.kv_heads + h) * dim, dim);
    }
  }
}

template <typename F>
void place(const Decoder& m, const DecoderRows& from, int64_t sequence, int64_t slot,
           const DecoderCache& to, int64_t to_sequence, int64_t to_index) {
  alignas(64) float key[256], value[256];  // ops/decoder.cpp refuses larger heads
  alignas(64) typename F::Word words[256];
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      const int64_t at = rows_at(m, from, layer, sequence, h, slot);
      load_row(key, from.k, kRaw<F>, at, m.head_dim);
      load_row(value, from.v, kRaw<F>, at, m.head_dim);
      CachePlace<F>(m, to, layer, to_sequence, h).put(m.head_dim, to_index, key, value, words);
    }
  }
}

template <typename F>
void clear(const Decoder& m, const DecoderCache& own, int64_t sequence, int64_t index,
           int64_t count) {
  const int64_t padded = round_up(m.head_dim, 16);
  alignas(64) const float zeros[256] = {};
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      const CachePlace<F> head(m, own, layer, sequence, h);
      for (int64_t i = 0; i < count;) {
        const int64_t at = (index + i) % own.capacity;
        if (at % 2 == 0 && i + 1 < count) {
          const int64_t first = words_of<F>(at, F::kSwapped), last = words_for<F>(at + 2);
          __builtin_memset(head.v + first * padded, 0,
                           sizeof(float) * static_cast<uint64_t>((last - first) * padded));
          i += 2;
        } else {
          head.put_value(padded, at, zeros);
          ++i;
        }
      }
    }
  }
}

template <typename F>
void attend(const Decoder& m, int64_t layer, const DecoderCache& tails, const DecoderCache& own,
            const DecoderMember& member, int64_t head, const typename F::Word* q,
            const float* state, float* merged, float* scratch) {
  const ProductScope<F> scope;
  const int64_t dim = m.head_dim, padded = round_up(dim, 16), group = m.heads / m.kv_heads;
  const double root = __builtin_sqrt(static_cast<double>(dim));
  const float scale = static_cast<float>(0x1.71547652b82fep+0 * (1.0 / root));
  const CachePlace<F> mine(m, own, layer, member.sequence, head);
  const bool last = head + 1 == m.kv_heads;
  const CachePlace<F> next(m, own, layer, last ? member.next : member.sequence,
                           last ? 0 : head + 1);
  CacheHead<F> keys{nullptr, nullptr,     mine.k,      mine.v,      next.k,
                    next.v,  member.base, member.tail, own.capacity};
  if (member.tail > 0) {
    const CachePlace<F> tail(m, tails, layer, member.prompt, head);
    keys.tail_k = tail.k;
    keys.tail_v = tail.v;
  }
  float* sums = scratch + attention_scratch(dim);
  const int64_t total = member.count * group;  // queries, of a row next to each other
  for (int64_t begin = 0; begin < total; begin += kQueries) {
    CacheQuery<F> queries[kQueries];
    const int64_t count = at_most(kQueries, total - begin);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (begin + i) / group, h = head * group + (begin + i) % group;
      queries[i].q = q + ((member.first + row) * m.heads + h) * padded;
      queries[i].reach = member.reach + row;
      queries[i].seen = member.seen + row * member.words;
      queries[i].sums = sums + i * padded;
      const float* before = state == nullptr ? nullptr : state + (begin + i) * decode_state(dim);
      begin_query(queries[i], before, dim);
    }
    attend_queries<F>(queries, count, keys, dim, scale, scratch);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (begin + i) / group, h = head * group + (begin + i) % group;
      float* to = merged + (member.first + row) * round_up(m.hidden, 16) + h * dim;
      const float inverse = 1.0f / queries[i].softmax.l;
      for (int64_t d = 0; d < dim; ++d) to[d] = queries[i].sums[d] * inverse;
    }
  }
}

template <typename F>
void round_rows(const Decoder& m, const float* merged, int64_t begin, int64_t end,
                typename F::Word* h) {
  const int64_t stride = round_up(m.hidden, 16);
  for (int64_t row = begin; row < end; ++row) {
    put_row<F>(h + row * row_words<F>(m.hidden), merged + row * stride, stride);
  }
}

template <typename F>
void words_of_rows(const Decoder& m, const void* raw, int64_t begin, int64_t end,
                   typename F::Word* h, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    load_row(scratch, raw, kRaw<F>, row * m.hidden, m.hidden);
    put_row<F>(h + row * row_words<F>(m.hidden), scratch, round_up(m.hidden, 16));
  }
}

}  // namespace

DecoderSizes decoder_sizes(const Decoder& m, int64_t rows, int64_t capacity) {
  return m.bfloat16 ? sizes_of<BFloat16Words>(m, rows, capacity)
                    : sizes_of<Plain>(m, rows, capacity);
}

void decoder_norm(const Decoder& m, const float* weight, const float* x, int64_t begin, int64_t end,
                  void* h) {
  m.bfloat16 ? norm_rows<BFloat16Words>(x, begin, end, m.hidden, weight, m.eps,
                                        static_cast<BFloat16Words::Word*>(h))
             : norm_rows<Plain>(x, begin, end, m.hidden, weight, m.eps, static_cast<float*>(h));
}

void decoder_append(const Decoder& m, int64_t layer, const DecoderCache& own,
                    const DecoderRow* rows, const float* qkv, int64_t begin, int64_t end, void* q,
                    void* raw, void* scratch) {
  float* space = static_cast<float*>(scratch);
  m.bfloat16
      ? append<BFloat16Words>(m, layer, own, rows, qkv, begin, end,
                              static_cast<BFloat16Words::Word*>(q), raw, space)
      : append<Plain>(m, layer, own, rows, qkv, begin, end, static_cast<float*>(q), raw, space);
}

void decoder_append_rows(const Decoder& m, int64_t layer, const DecoderRows& cache,
                         int64_t sequence, const int64_t* positions, const int64_t* slots,
                         const float* qkv, int64_t begin, int64_t end, void* raw, void* scratch) {
  (m.bfloat16 ? append_rows<BFloat16Words> : append_rows<Plain>)(m, layer, cache, sequence,
                                                                 positions, slots, qkv, begin, end,
                                                                 raw, static_cast<float*>(scratch));
}

void decoder_place(const Decoder& m, const DecoderRows& from, int64_t sequence, int64_t slot,
                   const DecoderCache& to, int64_t to_sequence, int64_t to_index) {
  (m.bfloat16 ? place<BFloat16Words> : place<Plain>)(m, from, sequence, slot, to, to_sequence,
                                                     to_index);
}

void decoder_clear(const Decoder& m, const DecoderCache& own, int64_t sequence, int64_t index,
                   int64_t count) {
  (m.bfloat16 ? clear<BFloat16Words> : clear<Plain>)(m, own, sequence, index, count);
}

void decoder_attend(const Decoder& m, int64_t layer, const DecoderCache& tails,
                    const DecoderCache& own, const DecoderMember& member, int64_t head,
                    const void* q, const float* state, float* merged, void* scratch) {
  float* space = static_cast<float*>(scratch);
  m.bfloat16
      ? attend<BFloat16Words>(m, layer, tails, own, member, head,
                              static_cast<const BFloat16Words::Word*>(q), state, merged, space)
      : attend<Plain>(m, layer, tails, own, member, head, static_cast<const float*>(q), state,
                      merged, space);
}

void decoder_round(const Decoder& m, const float* merged, int64_t begin, int64_t end, void* h) {
  m.bfloat16
      ? round_rows<BFloat16Words>(m, merged, begin, end, static_cast<BFloat16Words::Word*>(h))
      : round_rows<Plain>(m, merged, begin, end, static_cast<float*>(h));
}

void decoder_words(const Decoder& m, const void* raw, int64_t begin, int64_t end, void* h,
                   void* scratch) {
  float* space = static_cast<float*>(scratch);
  m.bfloat16 ? words_of_rows<BFloat16Words>(m, raw, begin, end,
                                            static_cast<BFloat16Words::Word*>(h), space)
             : words_of_rows<Plain>(m, raw, begin, end, static_cast<float*>(h), space);
}

}  // namespace rlir::cpu::RLIR_ISA
