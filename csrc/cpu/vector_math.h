// core/exp.h's exp and log over an array, so that tests can look at them. No op uses this.
#pragma once

#include <stdint.h>

namespace rlir::cpu {

using VectorExp = void(const float* x, float* out, int64_t n);
using VectorLog = void(const double* x, double* out, int64_t n);

namespace baseline {
VectorExp vector_exp;
VectorLog vector_log;
}  // namespace baseline
namespace avx2 {
VectorExp vector_exp;
VectorLog vector_log;
}  // namespace avx2
namespace avx512 {
VectorExp vector_exp;
VectorLog vector_log;
}  // namespace avx512

}  // namespace rlir::cpu
