// One token a row from (truncated) logits, on a GPU. Formula and random numbers:
// cpu/sample_tokens.h, whose tokens, supports and bits this kernel reproduces. Raw pointers and a
// stream; nothing here waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "cpu/sample_tokens.h"

namespace rlir::cuda {

struct SampleTokens {
  const void* logits;  // [N][V], float32 or bfloat16; strides in elements
  Dtype dtype;
  int64_t rows, row_stride, token_stride;
  int64_t tokens;
  int64_t low, high;
  float temperature;
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
  double min_p;   // 0: none
  // In memory of the device, where they are not null: a captured graph draws anew.
  const int64_t *seed_tensor, *offset_tensor;
  uint64_t seed, offset;
  const int64_t* row_ids;  // or null: 0, 1, ...
  int64_t row_id_stride;
  int64_t* token;  // [N]
  float *logprob, *entropy;
  uint8_t* support;  // [N][ceil(V / 8)] or null
  void* space;       // [N][sample_tokens_space()] bytes, or null where that is 0
};

// Bytes of workspace a row needs; 0 where shared memory has room for it.
int64_t sample_tokens_space(int64_t low, int64_t high);

// Returns an error code of launch(). At least one row. A row without a distribution, or any row if
// the offset is out of range, gets token `low` and NaN, and a device assertion fails.
int sample_tokens(const SampleTokens& args, void* stream);

}  // namespace rlir::cuda
