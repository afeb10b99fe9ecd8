// Rotary embedding and cache write on a GPU. Formulas: cpu/rotary_append.h, whose bits this kernel
// reproduces. Raw pointers and a stream; nothing here waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "cpu/rotary_append.h"

namespace rlir::cuda {

// Returns an error code of launch(). `tokens_in_all` is B T; at least one thread's work. Where a
// position is not below `limit`, the query is NaN, nothing is written, and a device assertion
// fails.
int rotary_append(const cpu::RotaryAppend& args, int64_t tokens_in_all, int64_t limit,
                  void* stream);

}  // namespace rlir::cuda
