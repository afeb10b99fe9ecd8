// Rotary embedding on a GPU. Formulas: cpu/rotary.h, whose bits this kernel reproduces. Raw
// pointers and a stream; nothing here waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "cpu/rotary.h"

namespace rlir::cuda {

// Returns an error code of launch(). `tokens_in_all` is B T; at least one token and head.
int rotary(const cpu::Rotary& args, int64_t tokens_in_all, void* stream);

}  // namespace rlir::cuda
