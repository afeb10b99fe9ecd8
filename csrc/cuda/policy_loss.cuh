// The policy's loss on a GPU, forward and backward. Formula: cpu/policy_loss.h, whose bits these
// kernels reproduce. Raw pointers and a stream; nothing here waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "cpu/policy_loss.h"

namespace rlir::cuda {

// One number in memory of the device, or null.
struct PolicyNumber {
  enum Kind : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64, kInt32 };
  const void* data;
  Kind kind;
};

struct PolicyLossForward {
  cpu::PolicyLoss f;
  double given;              // max_length or a normalizer that is known, or 0
  PolicyNumber normalizer;   // one that only the device knows
  cpu::PolicyLossRow* rows;  // scratch [rows]
  void *loss, *statistics;   // scalar and [kPolicyLossStatistics]: double if f.float64, or float
  double* scales;            // [3][rows]: scales, slopes, ratios
};

struct PolicyLossBackward {
  cpu::PolicyLoss f;
  PolicyNumber grad;     // d loss
  const double* scales;  // of the forward pass
  void* gradient;        // contiguous, in the dtype of logprob
};

// Return an error code of launch(). A normalizer that is not above 0 gives NaN, and a device
// assertion fails. The backward pass needs at least one token.
int policy_loss(const PolicyLossForward& args, void* stream);
int policy_loss_backward(const PolicyLossBackward& args, void* stream);

}  // namespace rlir::cuda
