// rlir::embedding and its backward: schemas, checks and CPU dispatch. Formulas: cpu/embedding.h.
#include "cpu/embedding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "ops/row_args.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int64_t* ids_of(const Tensor& ids, int64_t count) {
  RLIR_CHECK(ids.is_cpu() && ids.is_contiguous() && ids.dim() == 1 &&
                 ids.scalar_type() == ScalarType::Long,
             "embedding: ids must be contiguous int64 [N] on the CPU, got otherwise");
  const int64_t* at = ids.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < ids.size(0); ++n) {
    RLIR_CHECK(at[n] >= 0 && at[n] < count, "embedding: ids must be from 0 and below ", count,
               ", got ", at[n]);
  }
  return at;
}

Tensor embedding_cpu(const Tensor& ids, const Tensor& table, bool to_bfloat16) {
  const Tensor weight = rows_of("embedding: weight", table);
  const int64_t n = ids.numel(), size = weight.size(1);
  const ScalarType dtype = to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  cpu::Embedding a{};
  a.ids = ids_of(ids, weight.size(0));
  Tensor out = torch::stable::new_empty(weight, {n, size}, dtype);
  a.weight = weight.const_data_ptr();
  a.dtype = float_dtype("embedding: weight", weight);
  a.out_dtype = to_bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  a.weight_stride = weight.stride(0);
  a.size = size;
  a.out = out.mutable_data_ptr();
  const auto kernel = RLIR_CPU_KERNEL(embedding);
  torch::stable::parallel_for(0, n, rows_per_task(size),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

// Of the weight only size and dtype matter.
Tensor embedding_backward_cpu(const Tensor& grad, const Tensor& ids, const Tensor& weight) {
  const Tensor dy = rows_of("embedding: the gradient", grad);
  RLIR_CHECK(weight.dim() == 2, "embedding: weight must be [V, D], got ", weight.dim(),
             " dimensions");
  const int64_t n = ids.numel(), count = weight.size(0), size = weight.size(1);
  RLIR_CHECK(dy.size(0) == n && dy.size(1) == size, "embedding: the gradient must be [", n, ", ",
             size, "], got [", dy.size(0), ", ", dy.size(1), "]");
  const int64_t* id = ids_of(ids, count);
  // The places of each id, in order: a counting sort.
  std::vector<int64_t> starts(count + 1), next(count), order(n);
  for (int64_t i = 0; i < n; ++i) ++starts[id[i] + 1];
  for (int64_t v = 0; v < count; ++v) {
    starts[v + 1] += starts[v];
    next[v] = starts[v];
  }
  for (int64_t i = 0; i < n; ++i) order[next[id[i]]++] = i;
  Tensor dw = torch::stable::new_empty(weight, {count, size});
  cpu::EmbeddingBackward a{};
  a.dy = dy.const_data_ptr();
  a.dtype = float_dtype("embedding: the gradient", dy);
  a.dw_dtype = float_dtype("embedding: weight", dw);
  RLIR_CHECK(a.dw_dtype == Dtype::kFloat32 || a.dw_dtype == Dtype::kBFloat16,
             "embedding: weight must be float32 or bfloat16, got dtype ",
             static_cast<int>(weight.scalar_type()));
  a.dy_stride = dy.stride(0);
  a.size = size;
  a.order = order.data();
  a.starts = starts.data();
  a.dw = dw.mutable_data_ptr();
  const auto kernel = RLIR_CPU_KERNEL(embedding_backward);
  torch::stable::parallel_for(0, count, rows_per_task(size), [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * ((size + 15) / 16 * 16) * int64_t{sizeof(float)});
    kernel(a, begin, end, scratch.get<float>());
  });
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("embedding(Tensor ids, Tensor weight, *, bool to_bfloat16) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("embedding_backward(Tensor grad, Tensor ids, Tensor weight) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("embedding", TORCH_BOX(&embedding_cpu));
  m.impl("embedding_backward", TORCH_BOX(&embedding_backward_cpu));
}

}  // namespace rlir
