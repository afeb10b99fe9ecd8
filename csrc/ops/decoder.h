// What the ops of the rollout engine share: tensors checked and handed on as pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "cpu/decoder.h"

namespace rlir {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline const float* floats(const char* name, const Tensor& x, int64_t count) {
  RLIR_CHECK(
      x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.numel() == count,
      "decoder: ", name, " must be ", count, " contiguous float32 on the CPU, got ", x.numel(),
      " of dtype ", static_cast<int>(x.scalar_type()));
  return x.const_data_ptr<float>();
}

inline const int64_t* integers(const char* name, const Tensor& x, int64_t count) {
  RLIR_CHECK(
      x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Long && x.numel() == count,
      "decoder: ", name, " must be ", count, " contiguous int64 on the CPU, got ", x.numel(),
      " of dtype ", static_cast<int>(x.scalar_type()));
  return x.const_data_ptr<int64_t>();
}

inline void check_below(const char* name, const int64_t* x, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    RLIR_CHECK(x[i] >= 0 && x[i] < limit, "decoder: ", name, " must be from 0 and below ", limit,
               ", got ", x[i]);
  }
}

// What a packed weight looks like in the build in use.
struct PackedFormat {
  int64_t panel, values_per_word;
  bool bfloat16;

  explicit PackedFormat(bool rounds) : bfloat16(rounds) {
    cpu::Decoder any{};
    any.bfloat16 = rounds;
    any.head_dim = any.hidden = 2;
    any.heads = any.kv_heads = 1;
    const cpu::DecoderSizes sizes = RLIR_CPU_KERNEL_AMX(decoder_sizes)(any, 1, 1);
    panel = sizes.panel;
    values_per_word = sizes.values_per_word;
  }

  int64_t words(int64_t depth) const {
    return bfloat16 ? round_up(depth, 2) / values_per_word : depth;
  }
  ScalarType dtype() const { return values_per_word == 2 ? ScalarType::Int : ScalarType::Float; }

  // `count` weights [outputs][depth], packed.
  const void* operator()(const char* name, const Tensor& x, int64_t count, int64_t outputs,
                         int64_t depth) const {
    RLIR_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype() && x.dim() == 4 &&
                   x.size(3) == panel &&
                   x.numel() == count * round_up(outputs, panel) * words(depth),
               "decoder: ", name, " must be packed for the instruction set in use, got other");
    return x.const_data_ptr();
  }
  // The same as int8 values.
  const void* values(const char* name, const Tensor& x, int64_t count, int64_t outputs,
                     int64_t depth) const {
    RLIR_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Char &&
                   x.dim() == 4 && x.size(3) == panel * values_per_word &&
                   x.numel() == count * round_up(outputs, panel) * words(depth) * values_per_word,
               "decoder: ", name, " must be packed for the instruction set in use, got other");
    return x.const_data_ptr();
  }
};

}  // namespace rlir
