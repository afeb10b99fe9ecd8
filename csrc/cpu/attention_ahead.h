// The rows of keys and values that come next, asked of memory while others are in use.
//
// A thread that only reads what it needs next waits for memory most of the time where queries are
// few, as in decoding. And memory gives whole pages faster than a quarter of each slot's row of
// heads: so where a thread has several key heads (they lie beside each other), it asks for all of
// their rows at once. How much that is: docs/kernels/group_decode_attention.md.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/attention_words.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

class RowsAhead {
 public:
  RowsAhead() {}  // nothing
  // Share number `turn` of `turns` of the block at `start`, if `keys` go that far. Of a block in
  // which a prefix ends, the suffix's slots alone: the prefix's are what all rollouts of a group
  // read.
  RowsAhead(bool bfloat16, const KeySource& keys, int64_t row_elements, int64_t start, int64_t turn,
            int64_t turns) {
    const int64_t end = at_most(start + kKeyBlock, keys.count[0] + keys.count[1]);
    if (start < keys.count[0] && end > keys.count[0]) start = keys.count[0];
    const int64_t share = (end - start + turns - 1) / turns;
    start += turn * share;
    if (start >= end) return;
    slots_ = at_most(share, end - start);
    const int part = segment_of(keys, start, slots_), size = bfloat16 ? 2 : 4;
    k_ = static_cast<const char*>(slot_row(bfloat16, keys, false, start));
    v_ = static_cast<const char*>(slot_row(bfloat16, keys, true, start));
    k_stride_ = keys.k_stride[part] * size;
    v_stride_ = keys.v_stride[part] * size;
    bytes_ = row_elements * size;
  }

  // Slots a time, if they are asked for in `times` times.
  int64_t pace(int64_t times) const { return (slots_ + times - 1) / times; }

  void ask(int64_t slots) {
    for (; slots > 0 && slots_ > 0; --slots, --slots_) {
      for (int64_t i = 0; i < bytes_; i += 64) {
        __builtin_prefetch(k_ + i, 0, 2);
        __builtin_prefetch(v_ + i, 0, 2);
      }
      k_ += k_stride_;
      v_ += v_stride_;
    }
  }

 private:
  const char *k_ = nullptr, *v_ = nullptr;
  int64_t k_stride_ = 0, v_stride_ = 0, bytes_ = 0, slots_ = 0;
};

}  // namespace
}  // namespace rlir::cpu
