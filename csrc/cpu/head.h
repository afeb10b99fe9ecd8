// What the forward and the backward kernels of selected_logprob share: formats and the tile of z.
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/product.h"
#include "cpu/selected_logprob.h"
#include "cpu/softmax.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

static_assert(kHeadBlock == kSoftmaxBlock);
static_assert(kHeadGroup % kPanel == 0 && kPanel % kSoftmaxLanes == 0);

inline bool both_bfloat16(const Head& a) {
  return a.hidden.dtype == Dtype::kBFloat16 && a.weight.dtype == Dtype::kBFloat16;
}

#if defined(__AVX512BF16__)
inline bool uses_pairs(const Head& a) { return both_bfloat16(a); }
inline bool swaps(const Head&) { return false; }
#define RLIR_WITH_FORMAT(head, call) (uses_pairs(head) ? call<PairFormat> : call<FloatFormat>)
#else
inline bool uses_pairs(const Head&) { return false; }
inline bool swaps(const Head& a) { return both_bfloat16(a); }
#define RLIR_WITH_FORMAT(head, call) (call<FloatFormat>)
#endif

inline int64_t padded_rows(const Head& a) { return round_up(a.rows, kPanel); }

template <typename Format>
inline int64_t depth_words(const Head& a) {
  return words_of<Format>(a.depth, swaps(a));
}

// Bytes of a tile of z; rows of columns past the last one are written and not read.
inline int64_t tile_bytes() { return (kHeadBlock + kRowPad) * kPanel * sizeof(float); }

// The weight's rows of a block, as the product wants them: where they lie, or a copy.
template <typename Format>
struct WeightRows {
  const typename Format::Word* first;
  int64_t stride;
};

template <typename Format>
inline WeightRows<Format> weight_rows(const Head& a, int64_t begin, int64_t end, void* copy) {
  using Word = typename Format::Word;
  const Matrix& w = a.weight;
  constexpr int64_t kPer = Format::kPerWord;
  const int64_t size = sizeof(Word) / kPer;
  const char* start = static_cast<const char*>(w.data) + begin * w.major_stride * size;
  const bool as_it_is = w.minor_stride == 1 && !swaps(a) &&
                        (w.dtype == Dtype::kFloat32) == (kPer == 1) && a.depth % kPer == 0 &&
                        w.major_stride % kPer == 0 &&
                        reinterpret_cast<uintptr_t>(start) % sizeof(Word) == 0;
  if (as_it_is) return {reinterpret_cast<const Word*>(start), w.major_stride / kPer};
  const int64_t stride = depth_words<Format>(a);
  pack_rows<Format>(static_cast<Word*>(copy), stride, w, true, begin, end, a.depth, swaps(a));
  return {static_cast<const Word*>(copy), stride};
}

// Columns of a block that are in vocab_range, relative to the block.
struct Columns {
  int64_t begin, end;
};

inline Columns columns_of(const Head& a, int64_t block) {
  const int64_t start = block * kHeadBlock;
  return {a.low > start ? a.low - start : 0, at_most(a.high - start, kHeadBlock)};
}

// logits [256][kPanel] of a block and a panel: columns in vocab_range are written, no others.
template <typename Format>
inline void logits_tile(const Head& a, int64_t panel, int64_t block, const Columns& columns,
                        const WeightRows<Format>& weight, float* logits) {
  const int64_t words = depth_words<Format>(a);
  const auto* packed = static_cast<const typename Format::Word*>(a.panels) + panel * words * kPanel;
  const int lanes = static_cast<int>(at_most(a.rows - panel * kPanel, kPanel));
  panel_product<Format>(logits + columns.begin * kPanel, weight.first, weight.stride,
                        columns.end - columns.begin, packed, words, lanes, false);
  if (a.bias == nullptr) return;
  for (int64_t v = columns.begin; v < columns.end; ++v) {
    const float* bias = a.bias + block * kHeadBlock;
    for (int i = 0; i < kPanel; i += kWidth) {
      float* at = logits + v * kPanel + i;
      store_vector(at, load_vector(at) + splat(bias[v]));
    }
  }
}

// logits / temperature; -infinity outside the support.
inline void scale_and_mask(const Head& a, int64_t panel, int64_t block, const Columns& columns,
                           float* z) {
  if (a.temperature != 1.0f) {
    for (int64_t i = columns.begin * kPanel; i < columns.end * kPanel; i += kWidth) {
      store_vector(z + i, load_vector(z + i) / splat(a.temperature));
    }
  }
  if (a.support == nullptr) return;
  const int64_t first = panel * kPanel, bytes = kHeadBlock / 8;
  for (int64_t lane = 0; lane < at_most(a.rows - first, kPanel); ++lane) {
    const uint8_t* mask = a.support + (first + lane) * a.support_stride + block * bytes;
    for (int64_t v = columns.begin; v < columns.end; ++v) {
      if ((mask[v / 8] >> (v % 8) & 1) == 0) z[v * kPanel + lane] = minus_infinity();
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
