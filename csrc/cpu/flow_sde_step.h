// A stochastic step of a rectified flow with its log-probability. One build per instruction set;
// raw pointers only.
//
//   mean = cx x + cv v                     x sample, v velocity; cx, cv of each row
//   next = mean + std eps                  rounded to the sample's format; or given
//   logprob = -precision mean_i (next_i - mean_i)^2 - constant
//
// All schedules are of this form; their coefficients are made in cpu/flow_schedule.h. Rows are
// contiguous. Work is done in Real = double if a tensor is float64, else float.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "cpu/flow_schedule.h"

namespace rlir::cpu {

struct FlowSdeStep {
  const void *velocity, *sample, *previous;  // previous: or null, then noise is drawn
  Dtype velocity_dtype, sample_dtype, previous_dtype;
  void* next;        // [rows, size] of the sample's format; null where `previous` is given
  void* mean;        // [rows, size] Real
  double* partials;  // [rows, chunks] sums of squares
  const FlowCoefficients* coefficients;  // [rows]
  const int64_t* row_ids;                // [rows], row_id_stride apart; null: the row's number
  int64_t row_id_stride;
  int64_t size;  // of a row
  uint64_t seed;
  uint32_t offset;
  bool is_double;  // Real
};

struct FlowSdeBackward {
  const void* reached;  // next or previous
  Dtype reached_dtype;
  const void *mean, *dmean;              // [rows, size] Real; dmean or null
  const double* slope;                   // [rows] d logprob / d mean_i = slope (next_i - mean_i)
  const FlowCoefficients* coefficients;  // [rows]
  void* dvelocity;                       // [rows, size] Real
  int64_t size;
  bool is_double;
};

// Rows are worked on in chunks of this many elements; each has its own sum, in a fixed order.
inline constexpr int64_t kFlowChunk = 4096;

RLIR_ANYWHERE static constexpr int64_t flow_chunks(int64_t size) {
  return (size + kFlowChunk - 1) / kFlowChunk;
}

// Chunks [begin, end) of all rows, counted row by row.
using FlowSdeStepKernel = void(const FlowSdeStep& args, int64_t begin, int64_t end);

// d velocity = cv (d mean + slope (reached - mean)) of chunks [begin, end).
using FlowSdeBackwardKernel = void(const FlowSdeBackward& args, int64_t begin, int64_t end);

namespace baseline {
FlowSdeStepKernel flow_sde_step;
FlowSdeBackwardKernel flow_sde_backward;
}  // namespace baseline
namespace avx2 {
FlowSdeStepKernel flow_sde_step;
FlowSdeBackwardKernel flow_sde_backward;
}  // namespace avx2
namespace avx512 {
FlowSdeStepKernel flow_sde_step;
FlowSdeBackwardKernel flow_sde_backward;
}  // namespace avx512

}  // namespace rlir::cpu
