// Attention of one position by the cache of the rollout engine and by a panel, in float32, for
// ctypes. Both in the order of cpu/video_attention.h: they must have the same bits.
#include "cpu/attention.h"
#include "cpu/cache_attention.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace rlir::cpu;

// out [queries][d padded to 16] of q, words in rows of as many. k and v: caches (cpu/decoder.h) of
// `shared` positions, and then of `own`.
EXPORT void by_cache(float* out, const uint32_t* q, int64_t queries, const uint32_t* shared_k,
                     const uint32_t* shared_v, int64_t shared, const uint32_t* own_k,
                     const uint32_t* own_v, int64_t own, int64_t dim, float scale, float* scratch) {
  const ProductScope<Pairs> scope;
  const Segment<Pairs> first{shared_k, shared_v, shared, shared_k, shared_v},
      second{own_k, own_v, own, own_k, own_v};
  for (int64_t j = 0, stride = round_up(dim, 16); j < queries;) {
    j += attend_some<Pairs>(out + j * stride, q + j * stride, queries - j, first, second, dim,
                            scale, scratch);
  }
}

EXPORT int64_t cache_scratch(int64_t seen, int64_t dim) { return attention_scratch(seen, dim); }

// out [queries][dim], at most a panel of them, of q [queries][dim]; k and v [slots][dim].
EXPORT void by_panel(float* out, const uint16_t* q, int64_t queries, const uint16_t* k,
                     const uint16_t* v, int64_t slots, int64_t dim, float scale, float* scratch) {
  const ProductScope<Pairs> scope;
  const rlir::Reach reach{.low = 0, .high = slots, .own = slots, .tau = 0};
  VideoAttention a{};
  a.bfloat16 = true;
  a.dim = dim;
  a.scale = scale;
  a.queries = {q, 1, 1, queries, {0, 0, dim}, &reach};
  a.keys = {{k, k}, {v, v}, {dim, dim}, {dim, dim}, {slots, 0}};
  Panel<Pairs> p = panel_at<Pairs>(scratch, dim);
  load_queries(p, a, 0);
  clear_state(p, dim);
  attend_blocks(p, a, 0, INT64_MAX);
  for (int64_t i = 0; i < queries; ++i) {
    const float inverse = 1.0f / p.l[i];
    for (int64_t d = 0; d < dim; ++d) out[i * dim + d] = p.sums[d * kPanel + i] * inverse;
  }
}

EXPORT int64_t panel_scratch(int64_t dim) { return panel_floats<Pairs>(dim); }
