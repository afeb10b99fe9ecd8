// Rotary embedding of queries and keys (cpu/rotary.h), the keys and values written to their cache.
// One build per instruction set; raw pointers.
//
//   q'[n] = rotate(q[n], p)    cache_k[b, p] = rotate(k[n], p)    cache_v[b, p] = v[n]
//
// for token n of batch row b at position p = positions[n]. q, k and v are float32 or bfloat16
// alike; q' and the caches are too, or bfloat16 where q is float32: rounded once then, after the
// rotation. All are contiguous in D.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

struct RotaryRows {
  int64_t batch, token, head;  // strides; `token` is that of a slot in a cache
};

struct RotaryAppend {
  const void *q, *k, *v;  // [B, T, heads or kv_heads, D]
  RotaryRows q_at, k_at, v_at;
  Dtype dtype, to;             // of q, k and v; of q' and the caches
  const float *cosine, *sine;  // [P, D] contiguous
  const int64_t* positions;    // [B T], each below P and the capacity, different within a row
  void* out;                   // [B, T, heads, D] contiguous
  void *cache_k, *cache_v;     // [B, capacity, kv_heads, D]
  RotaryRows cache_k_at, cache_v_at;
  int64_t tokens, heads, kv_heads, dim;
  bool interleaved;
};

// Tokens [begin, end) of all B T.
using RotaryAppendKernel = void(const RotaryAppend& args, int64_t begin, int64_t end);

#define RLIR_ROTARY_APPEND_BUILD(isa) \
  namespace isa {                     \
  RotaryAppendKernel rotary_append;   \
  }
RLIR_ROTARY_APPEND_BUILD(baseline)
RLIR_ROTARY_APPEND_BUILD(avx2)
RLIR_ROTARY_APPEND_BUILD(avx512)
#undef RLIR_ROTARY_APPEND_BUILD

}  // namespace rlir::cpu
