// A mask of the attention ops as they get it: its name and numbers (rlir/ops/_masks.py).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/reach.h"

namespace rlir {

inline AttentionMask attention_mask(const char* op, const std::string& kind,
                                    const std::vector<int64_t>& numbers) {
  AttentionMask m{MaskKind::kCausal, 1, 0, 0, 1, 1, 1, 0};
  const auto count = [&](size_t wanted) {
    RLIR_CHECK(numbers.size() == wanted, op, ": a ", kind, " mask must have ", wanted,
               " numbers, got ", numbers.size());
    for (const int64_t x : numbers) {
      RLIR_CHECK(x >= 0 && x < INT32_MAX, op, ": numbers of a mask must be from 0 and below 2^31, ",
                 "got ", x);
    }
  };
  if (kind == "causal") {
    count(1);
    m.window = numbers[0];
  } else if (kind == "frame_causal") {
    count(3);
    m.kind = MaskKind::kFrameCausal;
    m.image = numbers[0];
    m.action = numbers[1];
    m.window = numbers[2];
  } else if (kind == "diagonal") {
    count(6);
    m.kind = MaskKind::kDiagonal;
    m.rows = numbers[0];
    m.columns = numbers[1];
    m.ahead = numbers[2];
    m.action = numbers[3];
    m.window = numbers[4];
    m.context = numbers[5];
    m.image = m.rows * m.columns;
    RLIR_CHECK(m.ahead >= 1 && m.ahead <= m.columns, op,
               ": the window of a diagonal mask must be from 1 to its columns, got ", m.ahead,
               " of ", m.columns);
  } else {
    fail(op, ": mask must be causal, frame_causal or diagonal, got ", kind);
  }
  RLIR_CHECK(m.image >= 1 && m.image < INT32_MAX, op,
             ": a frame of a mask must have at least a token, got ", m.image);
  return m;
}

}  // namespace rlir
