// A stochastic step of a rectified flow on a GPU. Formula: cpu/flow_sde_step.h and
// cpu/flow_schedule.h, whose bits these kernels reproduce. Raw pointers and a stream; nothing here
// waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "cpu/flow_sde_step.h"

namespace rlir::cuda {

// A number of each row; the stride counts elements.
struct FlowNumbers {
  const void* data;
  int64_t stride;
  Dtype dtype;
};

struct FlowSdeStep {
  // Rows of `size` elements, contiguous. previous: or null, then noise is drawn and `next` written.
  const void *velocity, *sample, *previous;
  void* next;              // of the sample's format
  void* mean;              // Real
  void *logprob, *std;     // [rows] Real
  double* partials;        // [rows, flow_chunks(size)]
  const int64_t* row_ids;  // or null: the row's number
  int64_t row_id_stride;
  const int64_t *seed, *offset;  // read on the device: a captured graph draws anew
  int64_t rows, size;
  FlowNumbers sigma, sigma_next;
  cpu::FlowNoise noise;
  Dtype velocity_dtype, sample_dtype, previous_dtype;
  bool is_double;  // Real is double, else float
};

struct FlowSdeBackward {
  const void *reached, *mean, *dmean;  // mean, dmean: Real; dmean or null
  void* dvelocity;                     // Real
  int64_t rows, size;
  FlowNumbers dlogprob, sigma, sigma_next;  // dlogprob.data: or null
  cpu::FlowNoise noise;
  Dtype reached_dtype;
  bool is_double;
};

// Return an error code of launch(). At least one row. A row whose sigmas are out of range, or any
// row if `offset` is, gets NaN, and a device assertion fails.
int flow_sde_step(const FlowSdeStep& args, void* stream);
int flow_sde_backward(const FlowSdeBackward& args, void* stream);

}  // namespace rlir::cuda
