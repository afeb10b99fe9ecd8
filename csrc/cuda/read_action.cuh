// How a warp reads one frame's logits (cpu/action_heads.h). Lane l holds the classes of factors
// l and l + 32: there are at most 64.
#pragma once

#include "cuda/action_heads.cuh"
#include "cuda/portable.cuh"

namespace rlir::cuda {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Of a block, in shared memory: lanes read different buttons at once, which parameters are bad at.
struct ButtonTables {
  uint64_t scope[kMaxButtons], bit[kMaxButtons], code[kMaxButtons];
};

__device__ __forceinline__ void copy_tables(const ActionHeads& h, ButtonTables* tables) {
  for (int b = threadIdx.x; b < h.buttons; b += blockDim.x) {
    tables->scope[b] = h.scope[b];
    tables->bit[b] = h.bit[b];
    tables->code[b] = h.code[b];
  }
  __syncthreads();
}

// Only float64 is worked on as double: rounded to float, different logits could become equal.
template <typename Real>
__device__ __forceinline__ Real logit(const cpu::LogitRows& rows, int64_t at) {
  switch (rows.dtype) {
    case Dtype::kFloat64:
      return static_cast<Real>(load(static_cast<const double*>(rows.data) + at));
    case Dtype::kFloat32:
      return static_cast<Real>(load(static_cast<const float*>(rows.data) + at));
    case Dtype::kBFloat16:
      return static_cast<Real>(load(static_cast<const BFloat16*>(rows.data) + at));
    case Dtype::kFloat16:
      return static_cast<Real>(load(static_cast<const Float16*>(rows.data) + at));
  }
  return Real(0);
}

// The first of the largest of `size` classes, or -1 if one is not finite; the same in all lanes.
template <typename Real>
__device__ __forceinline__ int largest(const cpu::LogitRows& rows, int64_t at, int size, int lane) {
  Real best = static_cast<Real>(-INFINITY);
  int place = size;
  bool ok = true;
  for (int c = lane; c < size; c += 32) {
    const Real x = logit<Real>(rows, at + c * rows.class_stride);
    ok = ok && x - x == Real(0);
    if (x > best) {
      best = x;
      place = c;
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const Real other = __shfl_xor_sync(kAllLanes, best, distance);
    const int there = __shfl_xor_sync(kAllLanes, place, distance);
    if (other > best || (other == best && there < place)) {
      best = other;
      place = there;
    }
  }
  return __all_sync(kAllLanes, ok) ? place : -1;
}

struct Classes {
  int first, second;  // of factors lane and lane + 32
};

template <typename Real>
__device__ __forceinline__ Classes read_frame(const ActionHeads& h, const ButtonTables& tables,
                                              int64_t trajectory, int64_t frame, int lane) {
  const int64_t keys = trajectory * h.keys.trajectory_stride + frame * h.keys.frame_stride;
  const int64_t camera = trajectory * h.camera.trajectory_stride + frame * h.camera.frame_stride;
  Classes mine = {-1, -1};
  const int vectors = h.buttons > 0 ? h.axes : h.axes + h.groups;
  for (int f = 0; f < vectors; ++f) {
    const cpu::LogitRows& rows = f < h.axes ? h.camera : h.keys;
    const int64_t at = (f < h.axes ? camera : keys) + h.starts[f] * rows.class_stride;
    const int found = largest<Real>(rows, at, h.sizes[f], lane);
    if (f == lane) mine.first = found;
    if (f == lane + 32) mine.second = found;
  }
  if (h.buttons == 0) return mine;

  bool ok = true;
  uint64_t held = 0;
  for (int first = 0; first < h.buttons; first += 32) {
    const int b = first + lane;
    bool more = false;
    if (b < h.buttons) {
      const int64_t at = keys + 2 * b * h.keys.class_stride;
      const Real off = logit<Real>(h.keys, at), on = logit<Real>(h.keys, at + h.keys.class_stride);
      ok = ok && off - off == Real(0) && on - on == Real(0);
      more = on > off;
    }
    held |= static_cast<uint64_t>(__ballot_sync(kAllLanes, more)) << first;
  }
  ok = __all_sync(kAllLanes, ok);
  uint64_t word = 0;
  for (int b = lane; b < h.buttons; b += 32) {
    if ((held & tables.scope[b]) == tables.bit[b]) word |= tables.code[b];
  }
  word = static_cast<uint64_t>(__reduce_or_sync(kAllLanes, static_cast<uint32_t>(word >> 32)))
             << 32 |
         __reduce_or_sync(kAllLanes, static_cast<uint32_t>(word));
  for (int g = 0; g < h.groups; ++g) {
    const int f = h.axes + g;
    const int up = 64 - h.field_shift[g + 1], down = up + h.field_shift[g];
    const int found = ok ? static_cast<int>((word << up) >> down) : -1;
    if (f == lane) mine.first = found;
    if (f == lane + 32) mine.second = found;
  }
  return mine;
}

}  // namespace
}  // namespace rlir::cuda
