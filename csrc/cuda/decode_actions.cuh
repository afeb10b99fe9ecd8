// Decoding actions off an inverse dynamics model's heads on a GPU. What it computes:
// cpu/decode_actions.h, whose results this kernel gives. Raw pointers and a stream; nothing here
// waits for the device.
#pragma once

#include "cuda/action_heads.cuh"

namespace rlir::cuda {

struct DecodeActions {
  ActionHeads heads;
  float centres[kMaxBins];  // degrees of the bins of the axes, one after another
  int64_t rows, frames;     // rows: trajectories * frames
  int64_t* classes;         // [rows, axes + groups]
  float* degrees;           // [rows, axes]
};

// Returns an error code of launch(). At least one row.
int decode_actions(const DecodeActions& args, void* stream);

}  // namespace rlir::cuda
