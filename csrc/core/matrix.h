// A matrix [major][minor] in memory with any strides.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir {

struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t major_stride, minor_stride;  // in elements
};

}  // namespace rlir
