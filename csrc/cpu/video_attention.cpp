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
  return {kPanel, (shared_floats<F>(dim) + kPanelsTogether * own_floats<F>(dim)) * 4,
          PackedBlock<F>::bytes(dim)};
}

template <typename F>
void whole(const VideoAttention& a, int64_t first, int64_t count, float* scratch) {
  const ProductScope<F> scope;
  Panel<F> panels[kPanelsTogether];
  const int some = static_cast<int>(count);
  panels_at(panels, some, scratch, a.dim);
  for (int i = 0; i < some; ++i) {
    load_queries(panels[i], a, (first + i) * kPanel);
    clear_state(panels[i], a.dim);
  }
  attend_blocks(panels, some, &a, 1, 0, INT64_MAX);
  for (int i = 0; i < some; ++i) finish(panels[i], a, (first + i) * kPanel);
}

template <typename F>
void pack(const VideoAttention& a, int64_t first, int64_t last, char* to) {
  for (int64_t block = first; block < last; ++block, to += PackedBlock<F>::bytes(a.dim)) {
    pack_block<F>(a, block, to);
  }
}

}  // namespace

AttentionSizes attention_sizes(bool bfloat16, int64_t dim) {
  return bfloat16 ? sizes_of<BFloat16Words>(dim) : sizes_of<Plain>(dim);
}

void attend(const VideoAttention& a, int64_t first, int64_t count, void* scratch) {
  float* space = static_cast<float*>(scratch);
  a.bfloat16 ? whole<BFloat16Words>(a, first, count, space) : whole<Plain>(a, first, count, space);
}

void pack_keys(const VideoAttention& a, int64_t first, int64_t last, char* to) {
  (a.bfloat16 ? pack<BFloat16Words> : pack<Plain>)(a, first, last, to);
}

}  // namespace rlir::cpu::RLIR_ISA
