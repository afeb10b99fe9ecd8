// The tables of an inverse dynamics model's heads as CUDA kernels take them
// (cuda/action_heads.cuh).
#pragma once

#include <string>

#include "cuda/action_heads.cuh"
#include "ops/action_heads.h"
#include "ops/cuda_call.h"

namespace rlir {

// Fills `out`; `keys` and `camera` are the tensors that `tables` was made of.
inline void fill_heads(const std::string& op, const HeadTables& tables, CudaCall& call,
                       const torch::stable::Tensor& keys, const torch::stable::Tensor& camera,
                       cuda::ActionHeads* out) {
  const cpu::ActionHeads& h = tables.heads();
  RLIR_CHECK(tables.factors() <= cuda::kMaxFactors, op, ": heads must have at most ",
             cuda::kMaxFactors, " factors on CUDA, got ", tables.factors());
  RLIR_CHECK(h.camera.classes <= cuda::kMaxBins, op, ": camera_logits must have at most ",
             cuda::kMaxBins, " bins on CUDA, got ", h.camera.classes);
  out->keys = h.keys;
  out->keys.data = call.in(keys, "button_logits");
  out->camera = h.camera;
  out->camera.data = call.in(camera, "camera_logits");
  out->axes = static_cast<int32_t>(h.axes);
  out->groups = static_cast<int32_t>(h.groups);
  out->buttons = static_cast<int32_t>(h.buttons);
  int64_t start = 0;
  for (int64_t f = 0; f < tables.factors(); ++f) {
    if (f == h.axes) start = 0;
    out->sizes[f] = static_cast<int32_t>(tables.size(f));
    out->starts[f] = static_cast<int32_t>(start);
    start += tables.size(f);
  }
  for (int64_t b = 0; b < h.buttons; ++b) {
    out->scope[b] = h.scope[b];
    out->bit[b] = h.bit[b];
    out->code[b] = h.code[b];
  }
  for (int64_t g = 0; h.buttons > 0 && g < h.groups; ++g) {
    out->field_shift[g] = static_cast<int32_t>(h.field_shift[g]);
    out->field_shift[g + 1] = 64;
  }
}

}  // namespace rlir
