// Formulas: swiglu.h.
//
// Why one kernel: eager PyTorch writes silu(gate) and reads it again, and its backward makes five
// passes over what here is read once.
#include "cpu/swiglu.h"

#include "core/exp.h"
#include "cpu/rows.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

inline Vf silu(Vf x) { return x / (splat(1.0f) + exp(-x)); }

// The last vector of a row may be shorter: it goes through a buffer.
struct Tail {
  alignas(64) float values[16] = {};
};

inline Vf load_part(const void* x, Dtype dtype, int64_t at, int64_t n) {
  if (n >= kWidth) return load_values(x, dtype, at);
  Tail tail;
  for (int64_t i = 0; i < n; ++i) tail.values[i] = value_of(x, dtype, at + i);
  return load_vector(tail.values);
}

inline void store_part(void* x, Dtype dtype, int64_t at, int64_t n, Vf value) {
  if (n >= kWidth) return store_values(x, dtype, at, value);
  Tail tail;
  store_vector(tail.values, value);
  store_row(x, dtype, at, tail.values, n);
}

}  // namespace

void swiglu(const Swiglu& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < a.size; i += kWidth) {
      const int64_t n = a.size - i;
      const Vf gate = load_part(a.gate, a.dtype, row * a.gate_stride + i, n);
      const Vf up = load_part(a.up, a.dtype, row * a.up_stride + i, n);
      store_part(a.out, a.out_dtype, row * a.size + i, n, silu(gate) * up);
    }
  }
}

void swiglu_backward(const SwigluBackward& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < a.size; i += kWidth) {
      const int64_t n = a.size - i;
      const Vf g = load_part(a.gate, a.dtype, row * a.gate_stride + i, n);
      const Vf u = load_part(a.up, a.dtype, row * a.up_stride + i, n);
      const Vf dy = load_part(a.dy, a.dy_dtype, row * a.dy_stride + i, n);
      // Of -g where g > 0, so that exp stays finite and 1 - sigma keeps its digits.
      const Vf below = exp(select(g > Vf{}, -g, g));
      const Vf whole = splat(1.0f) + below, small = below / whole, large = splat(1.0f) / whole;
      const Vf sigma = select(g > Vf{}, large, small), other = select(g > Vf{}, small, large);
      const Vf slope = sigma * fma(g, other, splat(1.0f));
      store_part(a.dgate, a.dtype, row * a.dgate_stride + i, n, dy * u * slope);
      store_part(a.dup, a.dtype, row * a.dup_stride + i, n, dy * (g * sigma));
    }
  }
}

}  // namespace rlir::cpu::RLIR_ISA
