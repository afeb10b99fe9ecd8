// Queries' rows become lanes of a panel, and lanes of its sums become rows again: a square of
// kWidth at a time, turned in registers. cpu/attention.h has the panel.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/pack.h"
#include "cpu/words.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

inline float float_of(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

// Word w of a row of `dim` elements; beyond the end are zeros.
template <typename F>
inline typename F::Word row_word(const void* row, int64_t w, int64_t dim) {
  if constexpr (F::kPerWord == 2) {
    const auto* x = static_cast<const uint16_t*>(row);
    const uint32_t low = x[2 * w];
    return 2 * w + 1 < dim ? low | static_cast<uint32_t>(x[2 * w + 1]) << 16 : low;
  } else if constexpr (F::kSwapped) {
    const int64_t d = w ^ 1;
    return d < dim ? float_of(static_cast<const uint16_t*>(row)[d]) : 0.0f;
  } else {
    return static_cast<const float*>(row)[w];
  }
}

// panel [words][kPanel]: kWidth rows go to lanes from `lane` on; null is a row of zeros.
template <typename F>
inline void put_lanes(typename F::Word* panel, int lane, const void* const* rows, int64_t dim) {
  const int64_t words = words_for<F>(dim);
  int64_t w = 0;
  if constexpr (!F::kSwapped) {
    for (; w + kWidth <= dim / F::kPerWord; w += kWidth) {
      Vf square[kWidth];
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) {
        square[j] = Vf{};
        if (rows[j] != nullptr) {
          __builtin_memcpy(&square[j], static_cast<const char*>(rows[j]) + 4 * w, sizeof(Vf));
        }
      }
      transpose(square);
      for (int i = 0; i < kWidth; ++i) {
        store_vector(reinterpret_cast<float*>(panel) + (w + i) * kPanel + lane, square[i]);
      }
    }
  }
  for (int j = 0; j < kWidth; ++j) {
    for (int64_t i = w; i < words; ++i) {
      panel[i * kPanel + lane + j] = rows[j] == nullptr ? 0 : row_word<F>(rows[j], i, dim);
    }
  }
}

// Lanes from `lane` on of sums [dim][kPanel], each times its own of `factors` and rounded once, to
// the rows at `to`; null is left out. Sums have room up to a multiple of kWidth.
template <bool kBFloat16>
inline void store_lanes(void* const* to, const float* sums, int lane, int64_t dim, Vf factors) {
  constexpr Dtype kDtype = kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  for (int64_t d = 0; d < dim; d += kWidth) {
    Vf square[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      square[i] = load_vector(sums + (d + i) * kPanel + lane) * factors;
    }
    transpose(square);
    for (int j = 0; j < kWidth; ++j) {
      if (to[j] == nullptr) continue;
      if (d + kWidth <= dim) {
        store_values(to[j], kDtype, d, square[j]);
        continue;
      }
      alignas(64) char part[kWidth * 4];
      store_values(part, kDtype, 0, square[j]);
      const int64_t size = kBFloat16 ? 2 : 4;
      __builtin_memcpy(static_cast<char*>(to[j]) + d * size, part,
                       static_cast<uint64_t>((dim - d) * size));
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
