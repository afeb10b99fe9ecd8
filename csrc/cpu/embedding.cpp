// Formulas and order of sums: embedding.h.
//
// Why a kernel: the order in which torch adds up the gradients of equal ids is that of its threads
// and version; here it is a promise.
#include "cpu/embedding.h"

#include "cpu/rows.h"

namespace rlir::cpu::RLIR_ISA {

void embedding(const Embedding& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t from = a.ids[n] * a.weight_stride, to = n * a.size;
    int64_t i = 0;
    for (; i + kWidth <= a.size; i += kWidth) {
      store_values(a.out, a.out_dtype, to + i, load_values(a.weight, a.dtype, from + i));
    }
    for (; i < a.size; ++i) {
      const float value = value_of(a.weight, a.dtype, from + i);
      store_row(a.out, a.out_dtype, to + i, &value, 1);
    }
  }
}

void embedding_backward(const EmbeddingBackward& a, int64_t begin, int64_t end, float* sum) {
  const int64_t padded = (a.size + 15) / 16 * 16;
  float* row = sum + padded;
  for (int64_t v = begin; v < end; ++v) {
    for (int64_t i = 0; i < padded; i += kWidth) store_vector(sum + i, Vf{});
    for (int64_t j = a.starts[v]; j < a.starts[v + 1]; ++j) {
      load_row(row, a.dy, a.dtype, a.order[j] * a.dy_stride, a.size);
      for (int64_t i = 0; i < padded; i += kWidth) {
        store_vector(sum + i, load_vector(sum + i) + load_vector(row + i));
      }
    }
    store_row(a.dw, a.dw_dtype, v * a.size, sum, a.size);
  }
}

}  // namespace rlir::cpu::RLIR_ISA
