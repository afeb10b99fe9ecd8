// Formula and layout: flow_sde_step.h. Compiled once per instruction set, RLIR_ISA names it.
//
// Why one kernel: eager PyTorch makes about a dozen passes over the latents (drift, noise, scaled
// noise, sum, difference, square, ...), each bound by memory. Here a tile of 64 elements is read
// once; noise is made in registers.
//
// Why the same bits everywhere: element i of a row goes to accumulator i mod 16 of its chunk,
// accumulators fold in a fixed tree, chunks are added in order (by the caller), and the build
// forbids contraction into fused multiply-adds.
#include "cpu/flow_sde_step.h"

#include "core/philox.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

constexpr int64_t kTile = kNormalTile, kLanes = 16;
static_assert(kFlowChunk % kTile == 0 && kTile % kLanes == 0);

template <typename T, typename Real>
inline void convert_tile(const void* from, int64_t at, int64_t n, Real* out) {
  const T* x = static_cast<const T*>(from) + at;
  if (n == kTile) {
    for (int64_t i = 0; i < kTile; ++i) out[i] = static_cast<Real>(load(x + i));
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(load(x + i));
  for (int64_t i = n; i < kTile; ++i) out[i] = 0;
}

// A tile as Real, zeros from its n-th element on.
template <typename Real>
inline void load_tile(const void* from, Dtype dtype, int64_t at, int64_t n, Real* out) {
  switch (dtype) {
    case Dtype::kFloat64:
      return convert_tile<double>(from, at, n, out);
    case Dtype::kFloat32:
      return convert_tile<float>(from, at, n, out);
    case Dtype::kBFloat16:
      return convert_tile<BFloat16>(from, at, n, out);
    case Dtype::kFloat16:
      return convert_tile<Float16>(from, at, n, out);
  }
}

// Stores a tile and makes it what was stored, so that scoring it later gives the same bits.
template <typename T, typename Real>
inline void round_tile(Real* x, void* to, int64_t at, int64_t n) {
  T* out = static_cast<T*>(to) + at;
  for (int64_t i = 0; i < n; ++i) {
    store(out + i, x[i]);
    x[i] = static_cast<Real>(load(out + i));
  }
}

template <typename Real>
inline void copy_tile(const Real* x, void* to, int64_t at, int64_t n) {
  Real* out = static_cast<Real*>(to) + at;
  if (n == kTile) {  // of a known size: the compiler makes vectors of it
    __builtin_memcpy(out, x, sizeof(Real[kTile]));
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}

template <typename Real>
inline void store_tile(Real* x, void* to, Dtype dtype, int64_t at, int64_t n) {
  constexpr Dtype own = sizeof(Real) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  if (dtype == own) return copy_tile(x, to, at, n);
  switch (dtype) {
    case Dtype::kFloat64:
      return round_tile<double>(x, to, at, n);
    case Dtype::kFloat32:
      return round_tile<float>(x, to, at, n);
    case Dtype::kBFloat16:
      return round_tile<BFloat16>(x, to, at, n);
    case Dtype::kFloat16:
      return round_tile<Float16>(x, to, at, n);
  }
}

template <typename Real>
double step_chunk(const FlowSdeStep& a, int64_t row, int64_t chunk) {
  const FlowCoefficients& k = a.coefficients[row];
  const Real cx = static_cast<Real>(k.sample), cv = static_cast<Real>(k.velocity);
  const Real std = static_cast<Real>(k.std);
  const uint64_t id =
      static_cast<uint64_t>(a.row_ids == nullptr ? row : a.row_ids[row * a.row_id_stride]);
  const PhiloxSchedule key({static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32)});
  const int64_t first = chunk * kFlowChunk;
  const int64_t last = a.size - first < kFlowChunk ? a.size : first + kFlowChunk;
  double sums[kLanes] = {};  // as float, a long row would lose digits
  for (int64_t i = first; i < last; i += kTile) {
    const int64_t at = row * a.size + i, n = last - i < kTile ? last - i : kTile;
    Real x[kTile], v[kTile], mean[kTile], reached[kTile];
    load_tile(a.sample, a.sample_dtype, at, n, x);
    load_tile(a.velocity, a.velocity_dtype, at, n, v);
    for (int64_t j = 0; j < kTile; ++j) mean[j] = cx * x[j] + cv * v[j];
    copy_tile(mean, a.mean, at, n);
    if (a.previous != nullptr) {
      load_tile(a.previous, a.previous_dtype, at, n, reached);
    } else {
      float noise[kTile];
      normal_tile(noise, static_cast<uint32_t>(i / kTile), a.offset, id, key);
      for (int64_t j = 0; j < kTile; ++j) reached[j] = mean[j] + std * static_cast<Real>(noise[j]);
      for (int64_t j = n; j < kTile; ++j) reached[j] = mean[j];
      store_tile(reached, a.next, a.sample_dtype, at, n);
    }
    Real squares[kLanes] = {};
    for (int64_t j = 0; j < kTile; j += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const Real d = reached[j + l] - mean[j + l];
        squares[l] += d * d;
      }
    }
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(squares[l]);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

template <typename Real>
void backward_chunk(const FlowSdeBackward& a, int64_t row, int64_t chunk) {
  const Real cv = static_cast<Real>(a.coefficients[row].velocity);
  const Real slope = static_cast<Real>(a.slope[row]);
  const int64_t first = chunk * kFlowChunk;
  const int64_t last = a.size - first < kFlowChunk ? a.size : first + kFlowChunk;
  const Dtype real = a.is_double ? Dtype::kFloat64 : Dtype::kFloat32;
  for (int64_t i = first; i < last; i += kTile) {
    const int64_t at = row * a.size + i, n = last - i < kTile ? last - i : kTile;
    Real reached[kTile], mean[kTile], dmean[kTile] = {};
    load_tile(a.reached, a.reached_dtype, at, n, reached);
    load_tile(a.mean, real, at, n, mean);
    if (a.dmean != nullptr) load_tile(a.dmean, real, at, n, dmean);
    for (int64_t j = 0; j < kTile; ++j) {
      dmean[j] = cv * (dmean[j] + slope * (reached[j] - mean[j]));
    }
    copy_tile(dmean, a.dvelocity, at, n);
  }
}

}  // namespace

void flow_sde_step(const FlowSdeStep& a, int64_t begin, int64_t end) {
  const int64_t chunks = flow_chunks(a.size);
  for (int64_t i = begin; i < end; ++i) {
    a.partials[i] = a.is_double ? step_chunk<double>(a, i / chunks, i % chunks)
                                : step_chunk<float>(a, i / chunks, i % chunks);
  }
}

void flow_sde_backward(const FlowSdeBackward& a, int64_t begin, int64_t end) {
  const int64_t chunks = flow_chunks(a.size);
  for (int64_t i = begin; i < end; ++i) {
    if (a.is_double) {
      backward_chunk<double>(a, i / chunks, i % chunks);
    } else {
      backward_chunk<float>(a, i / chunks, i % chunks);
    }
  }
}

}  // namespace rlir::cpu::RLIR_ISA
