// A mask of the attention ops as the operators take it, a string and integers, for the kernels.
// rlir/ops/_masks.py makes them; core/reach.h says what they mean.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/reach.h"

namespace rlir {

// `op` is for the messages. Any string and integers are safe.
inline AttentionMask attention_mask(const char* op, const std::string& kind,
                                    const std::vector<int64_t>& numbers) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  size_t count = 0;
  AttentionMask m{};
  if (kind == "causal") {
    m.kind = MaskKind::kCausal;
    count = 1;
  } else if (kind == "frame_causal") {
    m.kind = MaskKind::kFrameCausal;
    count = 3;
  } else {
    RLIR_CHECK(kind == "diagonal", op,
               ": mask must be 'causal', 'frame_causal' or 'diagonal', got '", kind, "'");
    m.kind = MaskKind::kDiagonal;
    count = 7;
  }
  RLIR_CHECK(numbers.size() == count, op, ": mask_numbers of '", kind, "' must be ", count,
             ", got ", numbers.size());
  for (const int64_t number : numbers) {
    RLIR_CHECK(number >= 0 && number < kLimit, op,
               ": mask_numbers must be from 0 and below 2^31, got ", number);
  }
  if (m.kind == MaskKind::kCausal) {
    m.window = numbers[0];
    return m;
  }
  if (m.kind == MaskKind::kFrameCausal) {
    m.image = numbers[0];
    m.action = numbers[1];
    m.window = numbers[2];
  } else {
    m.rows = numbers[0];
    m.columns = numbers[1];
    m.ahead = numbers[2];
    m.action = numbers[3];
    m.window = numbers[4];
    m.context = numbers[5];
    const int64_t refresh = numbers[6];
    m.image = m.rows * (m.columns + refresh) - refresh;
    RLIR_CHECK(m.ahead >= 1 && m.ahead <= m.columns, op,
               ": the window of 'diagonal' must be from 1 to its columns ", m.columns, ", got ",
               m.ahead);
    RLIR_CHECK(refresh <= 1, op, ": the refresh of 'diagonal' must be 0 or 1, got ", refresh);
    RLIR_CHECK(refresh == 0 || m.ahead < m.columns, op,
               ": the window of 'diagonal' must be below its columns ", m.columns,
               " with refresh, got ", m.ahead);
    if (refresh == 1 && m.rows > 1) m.kind = MaskKind::kRefreshed;  // one row has no stand-in
  }
  RLIR_CHECK(m.image >= 1 && m.image < kLimit, op,
             ": a frame of the mask must have from 1 and below 2^31 tokens, got ", m.image);
  return m;
}

}  // namespace rlir
