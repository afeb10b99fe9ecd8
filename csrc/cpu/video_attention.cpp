// Formulas, panels, order and bits: video_attention.h.
//
// Why one kernel: eager PyTorch writes scores and weights of all pairs, and takes the mask as one
// more tensor of that size; its fused kernels know no mask but the causal one.
#include "cpu/video_attention.h"

#include "cpu/attention.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

template <typename F>
AttentionSizes sizes_of(int64_t dim) {
  return {kPanel, panel_floats<F>(dim) * 4};
}

template <typename F>
void whole(const VideoAttention& a, int64_t panel, float* scratch) {
  Panel<F> p = panel_at<F>(scratch, a.dim);
  load_queries(p, a, panel * kPanel);
  clear_state(p, a.dim);
  attend_blocks(p, a, 0, INT64_MAX);
  finish(p, a, panel * kPanel);
}

}  // namespace

AttentionSizes attention_sizes(bool bfloat16, int64_t dim) {
  return bfloat16 ? sizes_of<BFloat16Words>(dim) : sizes_of<Plain>(dim);
}

void attend(const VideoAttention& a, int64_t panel, void* scratch) {
  float* space = static_cast<float*>(scratch);
  a.bfloat16 ? whole<BFloat16Words>(a, panel, space) : whole<Plain>(a, panel, space);
}

}  // namespace rlir::cpu::RLIR_ISA
