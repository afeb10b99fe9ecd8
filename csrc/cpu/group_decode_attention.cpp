// Passes, order and bits: group_decode_attention.h.
//
// Why one kernel: eager PyTorch reads a copy of the prefix for every member, and writes the scores
// of all slots.
#include "cpu/group_decode_attention.h"

#include "cpu/attention.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

template <typename F>
Panel<F> open(const VideoAttention& a, int64_t panel, float* scratch) {
  Panel<F> p = panel_at<F>(scratch, a.dim);
  load_queries(p, a, panel * kPanel);
  clear_state(p, a.dim);
  return p;
}

template <typename F>
void prefix(const VideoAttention& a, int64_t panel, int64_t blocks, float* state, float* scratch) {
  Panel<F> p = open<F>(a, panel, scratch);
  attend_blocks(p, a, 0, blocks);
  float* lane = state + panel * kPanel * decode_state(a.dim);
  for (int i = 0; i < p.lanes; ++i, lane += decode_state(a.dim)) {
    lane[0] = p.maximum[i];
    lane[1] = p.l[i];
    for (int64_t d = 0; d < a.dim; ++d) lane[2 + d] = p.sums[d * kPanel + i];
  }
}

template <typename F>
void suffix(const VideoAttention& a, int64_t panel, int64_t blocks, const float* state,
            float* scratch) {
  Panel<F> p = open<F>(a, panel, scratch);
  if (blocks > 0) {
    const float* lane = state + panel * kPanel * decode_state(a.dim);
    for (int i = 0; i < p.lanes; ++i, lane += decode_state(a.dim)) {
      p.maximum[i] = lane[0];
      p.l[i] = lane[1];
      for (int64_t d = 0; d < a.dim; ++d) p.sums[d * kPanel + i] = lane[2 + d];
    }
  }
  attend_blocks(p, a, blocks, INT64_MAX);
  finish(p, a, panel * kPanel);
}

}  // namespace

void decode_prefix(const VideoAttention& a, int64_t panel, int64_t blocks, float* state,
                   void* scratch) {
  float* space = static_cast<float*>(scratch);
  a.bfloat16 ? prefix<BFloat16Words>(a, panel, blocks, state, space)
             : prefix<Plain>(a, panel, blocks, state, space);
}

void decode_suffix(const VideoAttention& a, int64_t panel, int64_t blocks, const float* state,
                   void* scratch) {
  float* space = static_cast<float*>(scratch);
  a.bfloat16 ? suffix<BFloat16Words>(a, panel, blocks, state, space)
             : suffix<Plain>(a, panel, blocks, state, space);
}

}  // namespace rlir::cpu::RLIR_ISA
