// Formulas: rotary.h.
//
// Why one kernel: eager PyTorch cuts, negates, joins, multiplies twice and adds, a pass over memory
// each, and rounds every one of them in bfloat16.
#include "cpu/rotary.h"

#include "cpu/rotate.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

template <Dtype kDtype, bool kInterleaved, bool kTransposed>
void rotate_tokens(const Rotary& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t b = n / a.tokens, t = n % a.tokens;
    const int64_t at = b * a.x_batch + t * a.x_token, angle = b * a.table_batch + t * a.dim;
    for (int64_t h = 0; h < a.heads; ++h) {
      rotate_head<kDtype, kDtype, kInterleaved, kTransposed>(
          a.x, at + h * a.x_head, a.cosine + angle, a.sine + angle, a.dim, a.out,
          (n * a.heads + h) * a.dim);
    }
  }
}

template <Dtype kDtype>
void rotate_dtype(const Rotary& a, int64_t begin, int64_t end) {
  if (a.interleaved) {
    a.transposed ? rotate_tokens<kDtype, true, true>(a, begin, end)
                 : rotate_tokens<kDtype, true, false>(a, begin, end);
  } else {
    a.transposed ? rotate_tokens<kDtype, false, true>(a, begin, end)
                 : rotate_tokens<kDtype, false, false>(a, begin, end);
  }
}

}  // namespace

void rotary(const Rotary& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::kFloat32 ? rotate_dtype<Dtype::kFloat32>(a, begin, end)
                             : rotate_dtype<Dtype::kBFloat16>(a, begin, end);
}

}  // namespace rlir::cpu::RLIR_ISA
