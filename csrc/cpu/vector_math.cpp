#include "cpu/vector_math.h"

#include "core/exp.h"

namespace rlir::cpu::RLIR_ISA {

void vector_exp(const float* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_vector(out + i, exp(load_vector(x + i)));
  for (; i < n; ++i) out[i] = exp(splat(x[i]))[0];
}

void vector_log(const double* x, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = log(x[i]);
}

}  // namespace rlir::cpu::RLIR_ISA
