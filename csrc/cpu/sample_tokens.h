// One token a row from (truncated) logits, its log-probability on the support it was drawn from,
// and the entropy there. One build per instruction set; raw pointers only.
//
//   z       = logits / temperature on [low, high), -infinity elsewhere
//   support = what top_k, top_p and min_p leave of the row (cpu/truncation.h)
//   token   = the first v in the support with  sum of masses up to v  >  u * sum of all masses,
//             or, greedy, the first of the largest z
//   logprob, entropy as in cpu/softmax.h, on the support
//
// u is a 64 bit fraction from Philox 4x32-10 (philox_fraction of core/philox.h). It depends on
// seed, row id and offset alone, and masses are exact multiples of 2^-32, so a row has the same
// token whatever the batch, threads and instruction set.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "core/philox.h"

namespace rlir::cpu {

struct SampleTokens {
  const void* logits;  // [N][V], float32 or bfloat16; strides in elements
  Dtype dtype;
  int64_t row_stride, token_stride;
  int64_t tokens;
  int64_t low, high;
  float temperature;
  bool greedy;    // token = the first of the largest z in the support, and no draw
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
  double min_p;   // 0: none
  PhiloxKey key;  // the seed
  uint32_t offset;
  const int64_t* row_ids;  // or null: 0, 1, ...
  int64_t row_id_stride;
  int64_t* token;  // [N]
  float *logprob, *entropy;
  uint8_t* support;  // [N][ceil(V / 8)], bit v % 8 of byte v / 8; or null
};

// Rows [begin, end). Returns the first row without a distribution (NaN, +infinity, or nothing but
// -infinity), or -1.
using SampleTokensKernel = int64_t(const SampleTokens& args, int64_t begin, int64_t end,
                                   void* scratch);
// Bytes of scratch a thread needs, aligned to 64.
using SampleTokensScratch = int64_t(int64_t tokens);

namespace baseline {
SampleTokensKernel sample_tokens;
SampleTokensScratch sample_tokens_scratch;
}  // namespace baseline
namespace avx2 {
SampleTokensKernel sample_tokens;
SampleTokensScratch sample_tokens_scratch;
}  // namespace avx2
namespace avx512 {
SampleTokensKernel sample_tokens;
SampleTokensScratch sample_tokens_scratch;
}  // namespace avx512

}  // namespace rlir::cpu
