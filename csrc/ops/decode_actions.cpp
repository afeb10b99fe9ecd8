// rlir::decode_actions on the CPU. What it computes: cpu/decode_actions.h.
#include "cpu/decode_actions.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "core/cpu_isa.h"
#include "ops/decode_actions.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> decode_actions_cpu(const Tensor& button_logits,
                                              const Tensor& camera_logits, Ints axis_sizes,
                                              Ints group_sizes, Ints button_classes,
                                              Ints button_opponents, std::vector<double> centres) {
  const HeadTables tables("decode_actions", button_logits, camera_logits, std::move(axis_sizes),
                          std::move(group_sizes), button_classes, button_opponents);
  check_centres(tables, centres);
  const int64_t b = button_logits.size(0), t = button_logits.size(1);
  Tensor classes =
      torch::stable::new_empty(button_logits, {b, t, tables.factors()}, ScalarType::Long);
  Tensor degrees =
      torch::stable::new_empty(button_logits, {b, t, tables.heads().axes}, ScalarType::Float);
  if (b * t == 0) return {classes, degrees};
  cpu::DecodeActions args{};
  args.heads = tables.heads();
  args.frames = t;
  args.centres = centres.data();
  args.classes = classes.mutable_data_ptr<int64_t>();
  args.degrees = degrees.mutable_data_ptr<float>();
  const auto kernel = RLIR_CPU_KERNEL(decode_actions);
  torch::stable::parallel_for(0, b, action_grain(tables, t), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, ActionBuffers(tables).scratch);
  });
  return {classes, degrees};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kDecodeActionsSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("decode_actions", TORCH_BOX(&decode_actions_cpu));
}

}  // namespace rlir
