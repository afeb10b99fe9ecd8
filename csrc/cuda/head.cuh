// What the kernels of selected_logprob share: operands of the product, z of a logit, rows of a
// tile.
#pragma once

#include "cpu/softmax.h"
#include "cuda/product.cuh"
#include "cuda/selected_logprob.cuh"

namespace rlir::cuda {
namespace {

using cpu::kSoftmaxBlock;
using cpu::kSoftmaxLanes;
static_assert(kTileColumns == kSoftmaxBlock);

// Of hidden and weight; of dz and weight; of dz and hidden, both of which are transposed.
template <bool kTensorCores>
using LogitsProduct = typename ProductOf<kTensorCores, false, false>::Type;
template <bool kTensorCores>
using HiddenProduct = typename ProductOf<kTensorCores, false, true>::Type;
template <bool kTensorCores>
using WeightProduct = typename ProductOf<kTensorCores, true, true>::Type;

// Operands of hidden weight^T. Columns beyond vocab_range are not looked at.
__device__ __forceinline__ Operand hidden_operand(const Head& a) {
  const Matrix& m = a.hidden;
  return {m.data, m.dtype, a.rows, m.major_stride, m.minor_stride};
}
__device__ __forceinline__ Operand weight_operand(const Head& a) {
  const Matrix& m = a.weight;
  return {m.data, m.dtype, a.high, m.major_stride, m.minor_stride};
}

__device__ __forceinline__ float float_at(const void* data, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat32
             ? static_cast<const float*>(data)[at]
             : static_cast<float>(load(static_cast<const BFloat16*>(data) + at));
}
__device__ __forceinline__ void store_at(void* data, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else {
    store(static_cast<BFloat16*>(data) + at, value);
  }
}

__device__ __forceinline__ bool supports(const Head& a, int64_t row, int64_t token) {
  if (token < a.low || token >= a.high) return false;
  return a.support == nullptr ||
         (a.support[row * a.support_stride + token / 8] >> (token % 8) & 1) != 0;
}

// z of a logit, which is looked at inside of the support only; -infinity outside.
__device__ __forceinline__ float z_of(const Head& a, const float* logit, int64_t row,
                                      int64_t token) {
  if (!supports(a, row, token)) return cpu::minus_infinity();
  float z = *logit;
  if (a.bias != nullptr) z = z + float_at(a.bias, a.bias_dtype, token * a.bias_stride);
  return a.temperature != 1.0f ? z / a.temperature : z;
}

// The rows of a half tile that a team of 16 threads takes, one a step: the two teams of a warp have
// rows that are two apart, so that they read different banks.
constexpr int kTeamRows = kHalfRows / (kProductThreads / kSoftmaxLanes);
__device__ __forceinline__ int team_row(int step) {
  const int warp = threadIdx.x / 32, team = threadIdx.x / kSoftmaxLanes % 2;
  return 8 * warp + step / 2 * 4 + step % 2 + 2 * team;
}
static_assert(kTeamRows == 4);

__device__ __forceinline__ uint32_t team_mask() { return 0xffffu << (threadIdx.x & 16); }

}  // namespace
}  // namespace rlir::cuda
