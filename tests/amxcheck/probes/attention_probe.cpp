// Attention of one slot by the cache of the rollout engine and by a panel, in float32, for ctypes.
// Both in the order of cpu/video_attention.h: they must have the same bits.
#include <vector>

#include "core/seen_bits.h"
#include "cpu/attention.h"
#include "cpu/cache_attention.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace rlir::cpu;

// out [queries][d padded to 16] of q, words in rows of as many: whole blocks of `shared` slots by a
// panel from rows (raw [queries][dim], k and v [slots][dim]), the rest, `tail` slots and own ones
// up to `slots`, from caches (cpu/decoder.h) that begin where the whole blocks end.
EXPORT void by_cache(float* out, const uint32_t* q, const uint16_t* raw, int64_t queries,
                     const uint16_t* k, const uint16_t* v, const uint32_t* tail_k,
                     const uint32_t* tail_v, int64_t shared, const uint32_t* own_k,
                     const uint32_t* own_v, int64_t slots, int64_t capacity, int64_t dim,
                     float scale, float* scratch, float* panel) {
  const ProductScope<Pairs> scope;
  const rlir::Reach reach{.low = 0, .high = slots, .own = slots, .tau = 0};
  const int64_t base = shared / kKeyBlock * kKeyBlock, stride = round_up(dim, 16);
  std::vector<uint64_t> seen(round_up(slots - base, kKeyBlock) / 64);
  rlir::seen_bits({}, reach, base, static_cast<int64_t>(seen.size()), seen.data());
  VideoAttention a{};
  a.bfloat16 = true;
  a.dim = dim;
  a.scale = scale;
  a.queries = {raw, 1, 1, queries, {0, 0, dim}, &reach};
  a.keys = {{k, k}, {v, v}, {dim, dim}, {dim, dim}, {base, 0}};
  Panel<Pairs> p = panel_at<Pairs>(panel, dim);
  load_queries(p, a, 0);
  clear_state(p, dim);
  attend_blocks(&p, 1, &a, 1, 0, base / kKeyBlock);
  CacheQuery<Pairs> all[kPanel];
  for (int64_t j = 0; j < queries; ++j) {
    all[j] = {q + j * stride, &reach, seen.data(), out + j * stride, {}};
    begin_query(all[j], nullptr, dim);
    if (base == 0) continue;
    all[j].softmax = {p.maximum[j], p.l[j]};
    for (int64_t d = 0; d < dim; ++d) all[j].sums[d] = p.sums[d * kPanel + j];
  }
  const CacheHead<Pairs> head{tail_k, tail_v, own_k,         own_v,   own_k,
                              own_v,  base,   shared - base, capacity};
  attend_queries<Pairs>(all, queries, head, dim, scale, scratch);
  for (int64_t j = 0; j < queries; ++j) {
    for (int64_t d = 0; d < dim; ++d) out[j * stride + d] *= 1.0f / all[j].softmax.l;
  }
}

EXPORT int64_t cache_scratch(int64_t dim) { return attention_scratch(dim); }

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
  attend_blocks(&p, 1, &a, 1, 0, INT64_MAX);
  for (int64_t i = 0; i < queries; ++i) {
    const float inverse = 1.0f / p.l[i];
    for (int64_t d = 0; d < dim; ++d) out[i * dim + d] = p.sums[d * kPanel + i] * inverse;
  }
}

// The same for some key heads at once: q and out [heads][queries][dim], k and v
// [slots][heads][dim].
EXPORT void by_heads(float* out, const uint16_t* q, int64_t heads, int64_t queries,
                     const uint16_t* k, const uint16_t* v, int64_t slots, int64_t dim, float scale,
                     float* scratch) {
  const ProductScope<Pairs> scope;
  const rlir::Reach reach{.low = 0, .high = slots, .own = slots, .tau = 0};
  VideoAttention calls[kHeadsTogether];
  Panel<Pairs> panels[kHeadsTogether];
  panels_at(panels, static_cast<int>(heads), scratch, dim);
  for (int64_t h = 0; h < heads; ++h) {
    VideoAttention a{};
    a.bfloat16 = true;
    a.dim = dim;
    a.scale = scale;
    a.queries = {q + h * queries * dim, 1, 1, queries, {0, 0, dim}, &reach};
    const void *key = k + h * dim, *value = v + h * dim;
    const int64_t stride = heads * dim;
    a.keys = {{key, key}, {value, value}, {stride, stride}, {stride, stride}, {slots, 0}};
    calls[h] = a;
    load_queries(panels[h], a, 0);
    clear_state(panels[h], dim);
  }
  const KeysAfter after{calls[0].keys, 0, heads};
  const int count = static_cast<int>(heads);
  attend_blocks(panels, count, calls, count, 0, INT64_MAX, &after);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < queries; ++i) {
      const float inverse = 1.0f / panels[h].l[i];
      float* to = out + (h * queries + i) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = panels[h].sums[d * kPanel + i] * inverse;
    }
  }
}

EXPORT int64_t heads_scratch(int64_t dim) {
  return shared_floats<Pairs>(dim) + kHeadsTogether * own_floats<Pairs>(dim);
}

EXPORT int64_t panel_scratch(int64_t dim) { return panel_floats<Pairs>(dim); }
