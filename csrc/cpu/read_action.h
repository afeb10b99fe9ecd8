// How one frame's logits are read (action_heads.h). Included by files that are compiled once per
// instruction set: everything has internal linkage. Vectors are spelled out, because compilers do
// not make bit masks of comparisons by themselves.
#pragma once

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#include "cpu/action_heads.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

static inline bool finite(float x) {
  return (__builtin_bit_cast(uint32_t, x) & 0x7f800000u) != 0x7f800000u;
}
static inline bool finite(double x) { return x - x == 0.0; }

template <typename T>
inline bool all_finite(const T* x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= finite(x[i]) ? 0 : 1;
  return bad == 0;
}

template <typename T>
inline int64_t first_of_largest(const T* x, int64_t n) {
  int64_t at = 0;
  T best = x[0];
  for (int64_t i = 1; i < n; ++i) {
    const bool more = x[i] > best;
    best = more ? x[i] : best;
    at = more ? i : at;
  }
  return at;
}

#if defined(__AVX512F__)
// The masked forms of intrinsics are used where gcc 12 warns of the plain ones' undefined operand.
constexpr int kNanOrInfinity = 0x01 | 0x80 | 0x08 | 0x10;

inline float largest_of(__m512 v) {
  const __m256 a =
      _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

// `first_of_largest` of at most 16 floats, and -1 if one is not finite.
inline int64_t read_vector16(const float* x, int64_t n) {
  const __mmask16 here = static_cast<__mmask16>((1u << n) - 1u);
  const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), here, x);
  const __m512 most = _mm512_set1_ps(largest_of(v));
  const int64_t at = __builtin_ctz(_mm512_cmp_ps_mask(v, most, _CMP_EQ_OQ) | 0x8000u);
  return _mm512_mask_fpclass_ps_mask(here, v, kNanOrInfinity) == 0 ? at : -1;
}
#endif

// A bit for each pair x[2 b], x[2 b + 1] whose second is larger. `ok`: all are finite.
template <typename T>
inline uint64_t held_buttons(const T* x, int64_t buttons, bool* ok) {
  uint64_t held = 0;
  for (int64_t b = 0; b < buttons; ++b) {
    held |= static_cast<uint64_t>(x[2 * b + 1] > x[2 * b]) << b;
  }
  *ok = all_finite(x, 2 * buttons);
  return held;
}

#if defined(__AVX512F__)
inline uint64_t held_buttons(const float* x, int64_t buttons, bool* ok) {
  uint64_t held = 0;
  unsigned bad = 0;
  for (int64_t b = 0; b < buttons; b += 8) {
    const int64_t left = 2 * (buttons - b);
    const __mmask16 here = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
    const __m512 v = _mm512_maskz_loadu_ps(here, x + 2 * b);
    bad |= _mm512_fpclass_ps_mask(v, kNanOrInfinity);
    const unsigned more = _mm512_cmp_ps_mask(_mm512_maskz_movehdup_ps(0xffff, v), v, _CMP_GT_OQ);
    held |= static_cast<uint64_t>(_pext_u32(more, 0x5555u)) << b;
  }
  *ok = bad == 0;
  return held;
}
#elif defined(__SSE4_1__)
inline uint64_t held_buttons(const float* x, int64_t buttons, bool* ok) {
  const __m128i exponent = _mm_set1_epi32(0x7f800000);
  __m128i bad = _mm_setzero_si128();
  uint64_t held = 0;
  int64_t b = 0;
  for (; b + 4 <= buttons; b += 4) {
    const __m128 low = _mm_loadu_ps(x + 2 * b), high = _mm_loadu_ps(x + 2 * b + 4);
    const __m128i a = _mm_and_si128(_mm_castps_si128(low), exponent);
    const __m128i c = _mm_and_si128(_mm_castps_si128(high), exponent);
    bad = _mm_or_si128(bad, _mm_cmpeq_epi32(a, exponent));
    bad = _mm_or_si128(bad, _mm_cmpeq_epi32(c, exponent));
    const __m128 off = _mm_shuffle_ps(low, high, 0x88), on = _mm_shuffle_ps(low, high, 0xdd);
    held |= static_cast<uint64_t>(_mm_movemask_ps(_mm_cmpgt_ps(on, off))) << b;
  }
  bool rest_ok = true;
  if (b < buttons) held |= held_buttons<float>(x + 2 * b, buttons - b, &rest_ok) << b;
  *ok = rest_ok && _mm_testz_si128(bad, bad) != 0;
  return held;
}
#endif

template <typename From, typename T>
inline void convert(const From* x, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(load(x + i));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(load(x + i * stride));
  }
}

// The logits of a frame side by side: where they lie, or converted into `scratch`. Only float64
// is worked on as double: rounded to float, different logits could become equal.
inline const float* float_row(const LogitRows& rows, int64_t at, double* scratch) {
  float* out = reinterpret_cast<float*>(scratch);
  switch (rows.dtype) {
    case Dtype::kFloat32: {
      const float* x = static_cast<const float*>(rows.data) + at;
      if (rows.class_stride == 1) return x;
      convert(x, rows.class_stride, rows.classes, out);
      return out;
    }
    case Dtype::kBFloat16:
      convert(static_cast<const BFloat16*>(rows.data) + at, rows.class_stride, rows.classes, out);
      return out;
    case Dtype::kFloat16:
      convert(static_cast<const Float16*>(rows.data) + at, rows.class_stride, rows.classes, out);
      return out;
    case Dtype::kFloat64:
      break;
  }
  return out;
}

inline const double* double_row(const LogitRows& rows, int64_t at, double* scratch) {
  const double* x = static_cast<const double*>(rows.data) + at;
  if (rows.class_stride == 1) return x;
  convert(x, rows.class_stride, rows.classes, scratch);
  return scratch;
}

// Classes of consecutive class vectors, kActionBlock apart; -1 for one that is not finite.
template <typename T>
inline bool read_vectors(const T* x, const int64_t* sizes, int64_t n, int64_t classes_in_all,
                         int64_t* out) {
  const bool ok = all_finite(x, classes_in_all);
  for (int64_t i = 0; i < n; x += sizes[i++]) {
    out[i * kActionBlock] = ok || all_finite(x, sizes[i]) ? first_of_largest(x, sizes[i]) : -1;
  }
  return ok;
}

#if defined(__AVX512F__)
inline bool read_vectors(const float* x, const int64_t* sizes, int64_t n, int64_t classes_in_all,
                         int64_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    if (sizes[i] > 16) return read_vectors<float>(x, sizes, n, classes_in_all, out);
  }
  bool ok = true;
  for (int64_t i = 0; i < n; x += sizes[i++]) {
    const int64_t c = read_vector16(x, sizes[i]);
    out[i * kActionBlock] = c;
    ok &= c >= 0;
  }
  return ok;
}
#endif

// Classes of the groups from bits of held buttons, a button and a group at a time over all rows.
inline void classes_of_buttons(const ActionHeads& h, const uint64_t* held, int64_t* out) {
  uint64_t words[kActionBlock] = {};
  for (int64_t b = 0; b < h.buttons; ++b) {
    const uint64_t scope = h.scope[b], bit = h.bit[b], code = h.code[b];
    for (int64_t r = 0; r < kActionBlock; ++r) {
      words[r] |= (held[r] & scope) == bit ? code : 0;
    }
  }
  for (int64_t g = 0; g < h.groups; ++g, out += kActionBlock) {
    const int64_t end = g + 1 < h.groups ? h.field_shift[g + 1] : 64;
    const int64_t up = 64 - end, down = up + h.field_shift[g];
    for (int64_t r = 0; r < kActionBlock; ++r) {
      out[r] = static_cast<int64_t>((words[r] << up) >> down);
    }
  }
}

// A place in the frames of all trajectories.
struct Place {
  int64_t trajectory, frame;
  inline void next(int64_t frames) {
    if (++frame == frames) {
      frame = 0;
      ++trajectory;
    }
  }
};

// Classes of up to kActionBlock consecutive frames, [axes + groups, kActionBlock]. Those where
// `here` is false (if not null) are not read and have any class. False if one cannot be read.
inline bool read_block(const ActionHeads& h, Place at, int64_t rows, int64_t frames,
                       const bool* here, const ActionScratch& scratch) {
  uint64_t held[kActionBlock] = {};
  int64_t* groups = scratch.classes + h.axes * kActionBlock;
  bool unreadable[kActionBlock] = {};
  bool all_ok = true, buttons_ok = true;
  for (int64_t r = 0; r < rows; ++r, at.next(frames)) {
    if (here != nullptr && !here[r]) continue;
    if (h.axes > 0) {
      const int64_t i =
          at.trajectory * h.camera.trajectory_stride + at.frame * h.camera.frame_stride;
      const auto read = [&](const auto* x) {
        return read_vectors(x, h.axis_sizes, h.axes, h.camera.classes, scratch.classes + r);
      };
      all_ok &= h.camera.dtype == Dtype::kFloat64 ? read(double_row(h.camera, i, scratch.camera))
                                                  : read(float_row(h.camera, i, scratch.camera));
    }
    if (h.groups > 0) {
      const int64_t i = at.trajectory * h.keys.trajectory_stride + at.frame * h.keys.frame_stride;
      bool ok = true;
      const auto read = [&](const auto* x) {
        if (h.buttons > 0) {
          held[r] = held_buttons(x, h.buttons, &ok);
        } else {
          ok = read_vectors(x, h.group_sizes, h.groups, h.keys.classes, groups + r);
        }
      };
      if (h.keys.dtype == Dtype::kFloat64) {
        read(double_row(h.keys, i, scratch.keys));
      } else {
        read(float_row(h.keys, i, scratch.keys));
      }
      unreadable[r] = !ok;
      buttons_ok &= ok;
    }
  }
  if (h.buttons > 0) classes_of_buttons(h, held, groups);
  if (h.buttons > 0 && !buttons_ok) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; unreadable[r] && g < h.groups; ++g) groups[g * kActionBlock + r] = -1;
    }
  }
  return all_ok && buttons_ok;
}

}  // namespace
}  // namespace rlir::cpu::RLIR_ISA
