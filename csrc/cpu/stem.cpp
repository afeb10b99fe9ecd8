// Formula, layout and bits: stem.h.
#include "cpu/stem.h"

#include "core/exp.h"
#include "cpu/words.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

int64_t padded(int64_t n) { return round_up(n, 16); }

// Work space, in words of 4 bytes.
struct Space {
  int64_t first, later, x, film, tile, row, total;
};

int64_t image_words(const Stem& m, int64_t width, int64_t channels) {
  return (m.rows + 2) * (m.columns + width - 1) * padded(channels);
}

Space space_of(const Stem& m) {
  Space s;
  s.first = 0;
  s.later = s.first + image_words(m, m.input_width, m.embedding);
  s.x = s.later + image_words(m, m.block_width, m.channels);
  s.film = s.x + m.rows * m.columns * padded(m.channels);
  s.tile = s.film + (m.blocks + 1) * 2 * padded(m.channels);
  const int64_t width = m.input_width > m.block_width ? m.input_width : m.block_width;
  s.row = s.tile + round_up(m.rows * (m.columns + width - 1), kRowPad) * kPanel;
  s.total = s.row + m.rows * m.columns * padded(m.channels);
  return s;
}

Vf gelu(Vf x) {
  const Vf z = max(x, -x) * splat(0.70710678118654752f);
  const Vf t = splat(1.0f) / fma(splat(0.3275911f), z, splat(1.0f));
  constexpr float kA[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  Vf p = splat(1.061405429f);
  for (const float a : kA) p = fma(p, t, splat(a));
  const Vf tail = p * t * exp(-(z * z));  // 1 - erf(z)
  return splat(0.5f) * x * select(x < Vf{}, tail, splat(2.0f) - tail);
}

// Calls done(position, first, lanes, values) with `lanes` outputs of each position. Tiles take
// positions in order, across the image's lines: these are shorter than a few tiles.
template <typename F, typename Done>
void convolve(const Stem& m, const typename F::Word* image, int64_t width, int64_t channels,
              const typename F::Word* weight, float* c, const Done& done) {
  const int64_t depth = width * padded(channels), words = words_for<F>(depth);
  const int64_t pixel = row_words<F>(channels), line = (m.columns + width - 1) * pixel;
  const int64_t row_of_kernel = round_up(m.channels, kPanel) * words, count = m.rows * m.columns;
  // AMX's tiles want rows at one distance, and take what lies between two lines along.
  const int64_t across = kTiled<F> ? m.columns + width - 1 : m.columns;
  for (int64_t first = 0; first < m.channels; first += kPanel) {
    const int64_t lanes = at_most(padded(m.channels - first), kPanel);
    for (int64_t dy = 0; dy < 3; ++dy) {
      const auto* panel = weight + dy * row_of_kernel + first * words;
      if constexpr (kTiled<F>) {
        panel_product<F>(c, image + dy * line, pixel, (m.rows - 1) * across + m.columns, panel,
                         words, static_cast<int>(lanes), dy > 0);
        continue;
      }
      for (int64_t at = 0; at < count; at += kRows) {
        for (int64_t k = 0; k < words; k += kDepth) {
          const typename F::Word* rows[kRows];
          for (int i = 0; i < kRows; ++i) {  // past the end: the last again, into unused space
            const int64_t position = at_most(at + i, count - 1);
            const int64_t y = position / m.columns, x = position % m.columns;
            rows[i] = image + (y + dy) * line + x * pixel + k;
          }
          tile<F>(static_cast<int>(lanes), c + at * kPanel, rows, panel + k * kPanel,
                  at_most(kDepth, words - k), dy > 0 || k > 0, {nullptr, 0});
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      done(i, first, lanes, c + (i / m.columns * across + i % m.columns) * kPanel);
    }
  }
}

template <typename F>
void rollout(const Stem& m, const int64_t* previous, const int64_t* tokens, float* out,
             float* saved, float* space) {
  using Word = typename F::Word;
  const ProductScope<F> scope;
  const Space s = space_of(m);
  const int64_t channels = padded(m.channels), count = m.rows * m.columns;
  float *film = space + s.film, *x = space + s.x, *c = space + s.tile;
  for (int64_t i = 0; i < (m.blocks + 1) * 2 * channels; i += kWidth) {
    Vf sum = {};
    for (int64_t t = 0; t < m.action; ++t) {
      sum += load_vector(m.film + tokens[t] * (m.blocks + 1) * 2 * channels + i);
    }
    store_vector(film + i, sum);
  }
  // A convolution's output at a position, and what it adds to x.
  const auto modulated = [&](int64_t block, int64_t position, int64_t at, Vf value,
                             const float* bias) {
    const float* scale = film + block * 2 * channels + at;
    const Vf grown = splat(1.0f) + load_vector(scale), biased = value + load_vector(bias + at);
    if (saved != nullptr) {
      store_vector(saved + (2 * block * count + position) * channels + at, biased);
    }
    return gelu(fma(biased, grown, load_vector(scale + channels)));
  };
  const auto keep = [&](int64_t block) {
    if (saved == nullptr) return;
    __builtin_memcpy(saved + (2 * block + 1) * count * channels, x, 4 * count * channels);
  };
  // A position's place in an image with a border.
  const auto place = [&](Word* image, int64_t width, int64_t size, int64_t position) {
    const int64_t y = position / m.columns, column = position % m.columns;
    const int64_t line = m.columns + width - 1;
    return image + ((y + 1) * line + column + width / 2) * row_words<F>(size);
  };
  Word* image = reinterpret_cast<Word*>(space + s.first);
  __builtin_memset(image, 0, 4 * image_words(m, m.input_width, m.embedding));
  for (int64_t i = 0; i < count; ++i) {
    const float* code = m.codes + previous[i] * padded(m.embedding);
    put_row<F>(place(image, m.input_width, m.embedding, i), code, padded(m.embedding));
  }
  convolve<F>(m, image, m.input_width, m.embedding, static_cast<const Word*>(m.input), c,
              [&](int64_t position, int64_t first, int64_t lanes, const float* values) {
                for (int64_t i = 0; i < lanes; i += kWidth) {
                  store_vector(
                      x + position * channels + first + i,
                      modulated(0, position, first + i, load_vector(values + i), m.input_bias));
                }
              });
  keep(0);
  image = reinterpret_cast<Word*>(space + s.later);
  const int64_t kernel = 3 * round_up(m.channels, kPanel) * words_for<F>(m.block_width * channels);
  for (int64_t block = 0; block < m.blocks; ++block) {
    __builtin_memset(image, 0, 4 * image_words(m, m.block_width, m.channels));
    for (int64_t i = 0; i < count; ++i) {
      put_row<F>(place(image, m.block_width, m.channels, i), x + i * channels, channels);
    }
    const float* bias = m.block_bias + block * channels;
    convolve<F>(m, image, m.block_width, m.channels,
                static_cast<const Word*>(m.block) + block * kernel, c,
                [&](int64_t position, int64_t first, int64_t lanes, const float* values) {
                  for (int64_t i = 0; i < lanes; i += kWidth) {
                    float* to = x + position * channels + first + i;
                    store_vector(to, load_vector(to) + modulated(block + 1, position, first + i,
                                                                 load_vector(values + i), bias));
                  }
                });
    keep(block + 1);
  }
  Word* rows = reinterpret_cast<Word*>(space + s.row);
  for (int64_t i = 0; i < count; ++i) {
    put_row<F>(rows + i * row_words<F>(m.channels), x + i * channels, channels);
  }
  const int64_t words = words_for<F>(channels);
  for (int64_t first = 0; first < m.hidden; first += kPanel) {
    const int64_t lanes = at_most(padded(m.hidden - first), kPanel);
    panel_product<F>(c, rows, row_words<F>(m.channels), count,
                     static_cast<const Word*>(m.output) + first * words, words,
                     static_cast<int>(lanes), false);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < at_most(lanes, m.hidden - first); ++j) {
        out[i * m.hidden + first + j] = c[i * kPanel + j] + m.output_bias[first + j];
      }
    }
  }
}

}  // namespace

int64_t stem_scratch(const Stem& m) { return 4 * space_of(m).total; }

void stem_rollout(const Stem& m, const int64_t* previous, const int64_t* tokens, float* out,
                  float* saved, void* scratch) {
  float* space = static_cast<float*>(scratch);
  m.bfloat16 ? rollout<BFloat16Words>(m, previous, tokens, out, saved, space)
             : rollout<Plain>(m, previous, tokens, out, saved, space);
}

}  // namespace rlir::cpu::RLIR_ISA
