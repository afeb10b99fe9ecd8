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
  return {kPanel, panel_floats<F>(dim) * 4, dim + 2};
}

template <typename F>
void whole(const VideoAttention& a, int64_t panel, float* scratch) {
  Panel<F> p = panel_at<F>(scratch, a.dim);
  load_queries(p, a, panel * kPanel);
  clear_state(p, a.dim);
  attend_blocks(p, a, 0, INT64_MAX);
  finish(p, a, panel * kPanel);
}

template <typename F>
void part(const VideoAttention& a, int64_t panel, int64_t first, int64_t last, bool begins,
          bool ends, float* state, float* scratch) {
  Panel<F> p = panel_at<F>(scratch, a.dim);
  const int64_t size = a.dim + 2;
  float* lanes = state + panel * kPanel * size;
  load_queries(p, a, panel * kPanel);
  clear_state(p, a.dim);
  for (int i = 0; !begins && i < p.lanes; ++i) {
    p.maximum[i] = lanes[i * size];
    p.l[i] = lanes[i * size + 1];
    for (int64_t d = 0; d < a.dim; ++d) p.sums[d * kPanel + i] = lanes[i * size + 2 + d];
  }
  attend_blocks(p, a, first, last);
  if (ends) return finish(p, a, panel * kPanel);
  for (int i = 0; i < p.lanes; ++i) {
    lanes[i * size] = p.maximum[i];
    lanes[i * size + 1] = p.l[i];
    for (int64_t d = 0; d < a.dim; ++d) lanes[i * size + 2 + d] = p.sums[d * kPanel + i];
  }
}

}  // namespace

AttentionSizes attention_sizes(bool bfloat16, int64_t dim) {
  return bfloat16 ? sizes_of<BFloat16Words>(dim) : sizes_of<Plain>(dim);
}

void attend(const VideoAttention& a, int64_t panel, void* scratch) {
  float* space = static_cast<float*>(scratch);
  a.bfloat16 ? whole<BFloat16Words>(a, panel, space) : whole<Plain>(a, panel, space);
}

void attend_part(const VideoAttention& a, int64_t panel, int64_t first, int64_t last, bool begins,
                 bool ends, float* state, void* scratch) {
  float* space = static_cast<float*>(scratch);
  a.bfloat16 ? part<BFloat16Words>(a, panel, first, last, begins, ends, state, space)
             : part<Plain>(a, panel, first, last, begins, ends, state, space);
}

}  // namespace rlir::cpu::RLIR_ISA
