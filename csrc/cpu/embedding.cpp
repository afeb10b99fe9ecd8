// Formulas and order of sums: embedding.h.
//
// Why a kernel: the order in which torch adds up the gradients of equal ids is that of its threads
// and version; here it is a promise.
#include "cpu/embedding.h"

#include "cpu/rows.h"

namespace rlir::cpu::RLIR_ISA {

void embedding(const Embedding& a, int64_t begin, int64_t end) {
  if (a.size == 0) return;  // there may be no memory to point to
  for (int64_t n = begin; n < end; ++n) {
    const int64_t from = a.ids[n] * a.weight_stride, to = n * a.size;
    if (a.dtype == a.out_dtype) {
      const int64_t bytes = a.dtype == Dtype::kFloat32 ? 4 : 2;
      __builtin_memcpy(static_cast<char*>(a.out) + to * bytes,
                       static_cast<const char*>(a.weight) + from * bytes,
                       static_cast<uint64_t>(a.size * bytes));
      continue;
    }
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
  if (a.size == 0) return;
  const int64_t bytes = a.dtype == Dtype::kFloat32 ? 4 : 2;
  for (int64_t v = begin; v < end; ++v) {
    for (int64_t i = 0; i < a.size; ++i) sum[i] = 0.0f;
    for (int64_t j = a.starts[v]; j < a.starts[v + 1]; ++j) {
      const int64_t at = a.order[j] * a.dy_stride;
      const int64_t next = a.order[j + 1 < a.starts[end] ? j + 1 : j] * a.dy_stride;
      int64_t i = 0;
      for (; i + kWidth <= a.size; i += kWidth) {
        __builtin_prefetch(static_cast<const char*>(a.dy) + (next + i) * bytes);
        store_vector(sum + i, load_vector(sum + i) + load_values(a.dy, a.dtype, at + i));
      }
      for (; i < a.size; ++i) sum[i] += value_of(a.dy, a.dtype, at + i);
    }
    store_row(a.dw, a.dw_dtype, v * a.size, sum, a.size);
  }
}

}  // namespace rlir::cpu::RLIR_ISA
