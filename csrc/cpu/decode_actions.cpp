// What it computes: decode_actions.h. Compiled once per instruction set, RLIR_ISA names it.
//
// Why one kernel: eager PyTorch takes an argmax over two-way buttons (a reduction of length 2,
// its slowest), one a camera axis, and then a dozen small operations to let keys cancel out and to
// number the classes of a group. Here 64 frames at a time are read once and stay in
// the L1 cache; keys and groups are then worked on across frames, a full vector at a time.
#include "cpu/decode_actions.h"

#include "cpu/read_action.h"

namespace rlir::cpu::RLIR_ISA {

void decode_actions(const DecodeActions& a, int64_t begin, int64_t end,
                    const ActionScratch& scratch) {
  const ActionHeads& h = a.heads;
  const int64_t factors = h.axes + h.groups;
  int64_t* classes = a.classes + begin * a.frames * factors;
  float* degrees = a.degrees + begin * a.frames * h.axes;
  const int64_t last = end * a.frames;
  for (int64_t row = begin * a.frames; row < last; row += kActionBlock) {
    const int64_t rows = last - row < kActionBlock ? last - row : kActionBlock;
    read_block(h, {row / a.frames, row % a.frames}, rows, a.frames, nullptr, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t f = 0; f < factors; ++f) *classes++ = scratch.classes[f * kActionBlock + r];
      const double* centres = a.centres;
      for (int64_t axis = 0; axis < h.axes; centres += h.axis_sizes[axis++]) {
        const int64_t c = scratch.classes[axis * kActionBlock + r];
        *degrees++ = c >= 0 ? static_cast<float>(centres[c]) : __builtin_nanf("");
      }
    }
  }
}

}  // namespace rlir::cpu::RLIR_ISA
