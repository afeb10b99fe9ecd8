// Attention of video streams: softmax over the key slots that a query's mask lets it see. One
// build per instruction set; raw pointers.
//
//   s_k = q k_k;  t_k = s_k scale log2(e) - m;  e_k = 2^t_k;  out = sum e_k v_k / sum e_k
//   lse = ln sum exp(s_k scale)
//
// Panels. Queries are lanes of the vectors: the tokens and query heads that share a key head stand
// side by side in panels (cpu/product.h), so that a key is read once for all of them and no sum
// over keys needs a horizontal step. Keys come in blocks of 128 slots; scores, weights and outputs
// of a panel and block stay in the caches. Blocks that no query of a panel sees are left out.
//
// Order (bits), for a query: blocks are anchored at multiples of 128 of the absolute slot and
// follow each other. In a block
//
//   s_k   one chain of fused multiply-adds over d, in a bfloat16 call the pairs of vdpbf16ps
//   m'    the larger of m and max s_k times scale log2(e);  f = 2^(m - m')
//   e_k   2^fma(s_k, scale log2(e), -m'), 0 below 2^-100
//   sum   key k goes to accumulator k mod 16; they fold as in cpu/softmax.h; l = fma(l, f, sum)
//   acc_d acc_d f, then a chain over the keys of e_k v_kd; in a bfloat16 call e_k is rounded to it,
//         and the chain goes by pairs of even and odd slot
//
// A key that is not seen has weight 0 and adds exact zeros; what no query of a panel sees is not
// even multiplied by 0 (it may be NaN: memory that was never written). So a query's bits depend on
// what it sees alone: not on other queries, on how many go together, on where a prefix ends and a
// suffix begins, on threads or the instruction set (bfloat16 without subnormals). All attention
// ops share this order.
//
// In the amx build a bfloat16 call has the order of cpu/tiles.h instead: groups of 32 d, and of 32
// slots from the start of a block. Its bits are of its own, and depend on as little.
//
// Backward: P = exp(s scale - lse), dP = dout v, dS = P (dP - delta), delta = sum_d dout out - dlse
//
//   dq = scale dS k    dk = scale dS^T q    dv = P^T dout
//
// P and dS are rounded to bfloat16 in a bfloat16 call; sums are float32. dq of a query is a chain
// over the keys. dk and dv are chains over 48 lanes (by AMX of 32 and of 16); the chains of a share
// of the queries are added up in order, and then the shares. Shares depend on shapes and masks
// alone.
#pragma once

#include <stdint.h>

#include "core/reach.h"

namespace rlir::cpu {

inline constexpr int64_t kKeyBlock = 128;

// Key slots of one sequence and key head: a prefix, then a suffix. Strides in elements.
struct KeySource {
  const void *k[2], *v[2];
  int64_t k_stride[2], v_stride[2];
  int64_t count[2];
};

// A block that may well be read after those of a call: the one at slot `start`, of so many key
// heads beside each other.
struct KeysAfter {
  KeySource keys;
  int64_t start, heads;
};

// Lane (member, token, head) of the queries that share these keys. Strides in elements.
struct LaneStrides {
  int64_t member, token, head;
};
struct Queries {
  const void* q;
  int64_t members, tokens, heads;
  LaneStrides stride;
  const Reach* reach;  // [members][tokens]

  int64_t lanes() const { return members * tokens * heads; }
};

// Blocks of keys and values as the kernels want them, one after the other, made by `pack_keys`:
// blocks below `border` in the first part, the others in the second one. Null where there are none.
struct PackedKeys {
  const char* part[2];
  int64_t border;
};

struct VideoAttention {
  bool bfloat16;
  int64_t dim;
  float scale;  // times log2(e)
  AttentionMask mask;
  Queries queries;
  KeySource keys;
  PackedKeys packed;  // of `keys`
  void* out;          // at the lanes' places by `out_stride`
  LaneStrides out_stride;
  float* lse;  // likewise; or null
  LaneStrides lse_stride;
};

struct AttentionSizes {
  int64_t panel;    // lanes of a panel
  int64_t scratch;  // bytes of a task, aligned to 64
  int64_t packed;   // bytes of a block of keys and values
};
using AttentionSizesOf = AttentionSizes(bool bfloat16, int64_t dim);

// Panels of the lanes from number `first` on, at most kPanelsTogether: they go over the keys
// together, so that a block's values are turned once.
inline constexpr int kPanelsTogether = 4;
using AttendKernel = void(const VideoAttention& args, int64_t first, int64_t count, void* scratch);
// Key heads whose rows lie beside each other, with a panel of queries each: a block after the
// other, and in it a head after the other, so that memory is read in whole rows.
inline constexpr int kHeadsTogether = kPanelsTogether;
// Blocks [first, last) of args.keys to `to`.
using PackKeys = void(const VideoAttention& args, int64_t first, int64_t last, char* to);
// Sums of dk (without the scale) and dv: [slots][attention_stride(dim)] for each segment.
struct KeyGradients {
  float *k[2], *v[2];
};
inline int64_t attention_stride(int64_t dim) { return (dim + 15) / 16 * 16; }

struct AttentionBackward {
  VideoAttention call;  // its results are read
  const void* grad_out;
  LaneStrides grad_stride;
  const float* grad_lse;  // or null
  LaneStrides grad_lse_stride;
  float natural_scale;
  void* dq;
  LaneStrides dq_stride;
  KeyGradients sums;  // are added to
};

inline constexpr int64_t kWidePanel = 48;  // lanes

// Bytes of a task of attend_backward, aligned to 64.
using BackwardScratch = int64_t(bool bfloat16, int64_t dim);
// dq of wide panels [begin, end) of the lanes, one after the other, and their share of dk and dv.
using AttendBackward = void(const AttentionBackward& args, int64_t begin, int64_t end,
                            void* scratch);
// Rows [begin, end) of `shares` sums, `share` floats apart, added up, times `factor`, to `out` with
// `stride` elements between rows.
using StoreKeyGradients = void(bool bfloat16, const float* sums, int64_t shares, int64_t share,
                               int64_t dim, float factor, void* out, int64_t stride, int64_t begin,
                               int64_t end);

#define RLIR_VIDEO_ATTENTION_BUILD(isa)    \
  namespace isa {                          \
  AttentionSizesOf attention_sizes;        \
  AttendKernel attend;                     \
  PackKeys pack_keys;                      \
  BackwardScratch attend_backward_scratch; \
  AttendBackward attend_backward;          \
  StoreKeyGradients store_key_gradients;   \
  }
RLIR_VIDEO_ATTENTION_BUILD(baseline)
RLIR_VIDEO_ATTENTION_BUILD(avx2)
RLIR_VIDEO_ATTENTION_BUILD(avx512)
RLIR_VIDEO_ATTENTION_BUILD(avx512_bf16)
RLIR_VIDEO_ATTENTION_BUILD(amx)
#undef RLIR_VIDEO_ATTENTION_BUILD

}  // namespace rlir::cpu
