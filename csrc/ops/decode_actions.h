// rlir::decode_actions: schema and checks, for every device. What it computes:
// cpu/decode_actions.h.
#pragma once

#include <vector>

#include "ops/action_heads.h"

namespace rlir {

inline constexpr const char* kDecodeActionsSchema =
    "decode_actions(Tensor button_logits, Tensor camera_logits, *, int[] axis_sizes, "
    "int[] group_sizes, int[] button_classes, int[] button_opponents, float[] centres) "
    "-> (Tensor, Tensor)";

inline void check_centres(const HeadTables& tables, const std::vector<double>& centres) {
  const auto bins = static_cast<size_t>(tables.heads().camera.classes);
  RLIR_CHECK(centres.size() == bins, "decode_actions: centres must be ", bins, ", got ",
             centres.size());
}

}  // namespace rlir
