// Passes, order and bits: group_decode_attention.h.
//
// Why one kernel: eager PyTorch reads a copy of the prefix for every member, and writes the scores
// of all slots.
#include "cpu/group_decode_attention.h"

#include "cpu/attention.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

template <typename F>
void open(Panel<F>* panels, int count, const VideoAttention& a, int64_t first, float* scratch) {
  panels_at(panels, count, scratch, a.dim);
  for (int i = 0; i < count; ++i) {
    load_queries(panels[i], a, (first + i) * kPanel);
    clear_state(panels[i], a.dim);
  }
}

template <typename F>
void prefix(const VideoAttention& a, int64_t first, int64_t count, int64_t blocks, float* state,
            float* scratch) {
  const ProductScope<F> scope;
  Panel<F> panels[kPanelsTogether];
  const int some = static_cast<int>(count);
  open<F>(panels, some, a, first, scratch);
  attend_blocks(panels, some, &a, 1, 0, blocks);
  const int64_t size = decode_state(a.dim);
  for (int64_t j = 0; j < count; ++j) {
    const Panel<F>& p = panels[j];
    for (int lane = 0; lane < p.lanes; lane += kWidth) {
      void* rows[kWidth] = {};
      for (int i = lane; i < at_most(lane + kWidth, p.lanes); ++i) {
        float* to = state + ((first + j) * kPanel + i) * size;
        to[0] = p.maximum[i];
        to[1] = p.l[i];
        rows[i - lane] = to + 2;
      }
      store_lanes<false>(rows, p.sums, lane, a.dim, splat(1.0f));
    }
  }
}

template <typename F>
void take_state(Panel<F>& p, const float* state, int64_t dim) {
  const int64_t size = decode_state(dim);
  for (int lane = 0; lane < p.lanes; lane += kWidth) {
    const void* rows[kWidth] = {};
    for (int i = lane; i < at_most(lane + kWidth, p.lanes); ++i) {
      const float* from = state + i * size;
      p.maximum[i] = from[0];
      p.l[i] = from[1];
      rows[i - lane] = from + 2;
    }
    put_lanes<Plain>(p.sums, lane, rows, dim);
  }
}

template <typename F>
void suffix(const MemberHeads& m, int64_t first, int64_t count, int64_t blocks, float* scratch) {
  const ProductScope<F> scope;
  const int64_t dim = m.calls[0].dim;
  const bool several = m.heads > 1;
  Panel<F> panels[kPanelsTogether];
  const int some = static_cast<int>(several ? m.heads : count);
  panels_at(panels, some, scratch, dim);
  const auto call = [&](int i) -> const VideoAttention& { return m.calls[several ? i : 0]; };
  const auto lane = [&](int i) { return several ? 0 : (first + i) * kPanel; };
  for (int i = 0; i < some; ++i) {
    load_queries(panels[i], call(i), lane(i));
    clear_state(panels[i], dim);
    if (blocks == 0) continue;
    take_state(panels[i], m.state + (several ? i * m.state_stride : lane(i) * decode_state(dim)),
               dim);
  }
  attend_blocks(panels, some, m.calls, static_cast<int>(m.heads), blocks, INT64_MAX, m.after);
  for (int i = 0; i < some; ++i) finish(panels[i], call(i), lane(i));
}

}  // namespace

void decode_prefix(const VideoAttention& a, int64_t first, int64_t count, int64_t blocks,
                   float* state, void* scratch) {
  float* space = static_cast<float*>(scratch);
  a.bfloat16 ? prefix<BFloat16Words>(a, first, count, blocks, state, space)
             : prefix<Plain>(a, first, count, blocks, state, space);
}

void decode_suffix(const MemberHeads& m, int64_t first, int64_t count, int64_t blocks,
                   void* scratch) {
  float* space = static_cast<float*>(scratch);
  m.calls[0].bfloat16 ? suffix<BFloat16Words>(m, first, count, blocks, space)
                      : suffix<Plain>(m, first, count, blocks, space);
}

}  // namespace rlir::cpu::RLIR_ISA
