// A tile of a matrix product, out[m][n] = sum over k of A[m][k] B[n][k] in float32, by a block of
// 256 threads. The two routes have one interface:
//
//   run     computes kRows x 256 outputs; starts from sums in memory where asked to
//   put     brings 64 of the rows to shared memory, where the kernel's own work on them begins
//
// MmaProduct, for bfloat16: 8 warps of 64 x 64 outputs, mma.sync m16n8k16 on operands that cp.async
// brings through four stages of 32 k and ldmatrix reads without bank conflicts: within its row, a
// chunk of 16 bytes lies at its number xor some bits of the row's.
//
//   k contiguous      [m][32 k]   64 bytes a row, chunk ^ (row / 2 mod 4)
//   m contiguous      [32 k][m]   chunk ^ (k mod 8), read by ldmatrix.trans
//
// SimtProduct, for float32 and mixtures, with any strides: 8 x 8 outputs a thread. An output is
// chains of 128 fused multiply-adds that are added up in order, as in cpu/product.h, whose bits
// it has.
//
// An output depends on its row, its column and the depth alone, not on its place in a tile.
#pragma once

#include "core/matrix.h"
#include "cuda/ptx.cuh"

namespace rlir::cuda {
namespace {

constexpr int kProductThreads = 256, kTileColumns = 256, kHalfRows = 64;
// Floats between rows of a tile in shared memory: fragments are written, and rows read by half
// warps that take rows two apart, without bank conflicts.
constexpr int kTileStride = kTileColumns + 8;
constexpr size_t kTileBytes = kHalfRows * kTileStride * sizeof(float);

// Element (i, k) is data[i * stride + k * k_stride]; i < count.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t count, stride, k_stride;
};

// k in [first, end). What lies below `first` may be anything.
struct Depth {
  int64_t first, end;
};

// What outputs start from: [m][n], rows `stride` apart; or null.
struct Start {
  const float* sums;
  int64_t stride;
};

// kAcrossA: the operand's rows, not k, are contiguous in memory. Operands are bfloat16, aligned to
// 16 bytes, and so are their strides.
template <bool kAcrossA, bool kAcrossB>
class MmaProduct {
 public:
  static constexpr int kRows = 128, kHalves = 2;
  static constexpr int kStages = 4, kDepth = 32;
  static constexpr uint32_t kBytesA = kRows * kDepth * 2, kBytesB = kTileColumns * kDepth * 2;
  static constexpr size_t kShared = kStages * (kBytesA + kBytesB);
  static_assert(kShared >= kTileBytes);

  __device__ __forceinline__ void run(const Operand& a, const Operand& b, int64_t row,
                                      int64_t column, const Depth& depth, const Start& start,
                                      void* shared) {
    const uint32_t base = ptx::shared_address(shared);
    const int64_t begin = depth.first / kDepth * kDepth;
    const int tiles = static_cast<int>((depth.end - begin + kDepth - 1) / kDepth);
    works_ = row + first_row() < a.count && column + first_column() < b.count;
    initialise(a, b, row, column, start);
    const auto copy = [&](int tile) {
      if (tile < tiles) {
        const uint32_t to = base + tile % kStages * (kBytesA + kBytesB);
        const int64_t k = begin + static_cast<int64_t>(tile) * kDepth;
        copy_operand<kRows, kAcrossA>(to, a, row, k, depth);
        copy_operand<kTileColumns, kAcrossB>(to + kBytesA, b, column, k, depth);
      }
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) copy(tile);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
#if defined(RLIR_FAULT_COPY_WAIT)
      ptx::cp_async_wait<kStages - 1>();
#else
      ptx::cp_async_wait<kStages - 2>();
#endif
#if !defined(RLIR_FAULT_COPY_BARRIER)
      __syncthreads();  // the copies of all threads are there, and all have left the stage before
#endif
      copy(tile + kStages - 1);
      const uint32_t at = base + tile % kStages * (kBytesA + kBytesB);
      if (works_) multiply(at, at + kBytesA);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // Rows 64 half .. 64 half + 63 to `tile`; those that do not exist may be left out.
  __device__ __forceinline__ void put(int half, float* tile) const {
    if (first_row() != half * kHalfRows || !works_) return;
    const int lane = threadIdx.x % 32;
    float* to = tile + lane / 4 * kTileStride + first_column() + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float (&s)[4] = sums_[i][j];
        float* at = to + 16 * i * kTileStride + 8 * j;
        *reinterpret_cast<float2*>(at) = make_float2(s[0], s[1]);
        *reinterpret_cast<float2*>(at + 8 * kTileStride) = make_float2(s[2], s[3]);
      }
    }
  }

 private:
  // Of the warp's outputs, relative to the tile.
  __device__ __forceinline__ int first_row() const { return threadIdx.x / 32 % 2 * kHalfRows; }
  __device__ __forceinline__ int first_column() const { return threadIdx.x / 64 * 64; }

  __device__ __forceinline__ void initialise(const Operand& a, const Operand& b, int64_t row,
                                             int64_t column, const Start& start) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums_[i][j][e] = 0.0f;
          if (start.sums == nullptr) continue;
          const int64_t m = row + first_row() + 16 * i + lane / 4 + 8 * (e / 2);
          const int64_t n = column + first_column() + 8 * j + 2 * (lane % 4) + e % 2;
          if (m < a.count && n < b.count) sums_[i][j][e] = start.sums[m * start.stride + n];
        }
      }
    }
  }

  template <int kCount, bool kAcross>
  static __device__ __forceinline__ void copy_operand(uint32_t to, const Operand& x, int64_t first,
                                                      int64_t k, const Depth& depth) {
    const uint16_t* data = static_cast<const uint16_t*>(x.data);
    constexpr int kChunks = (kAcross ? kCount : kDepth) / 8;  // of a row in shared memory
    constexpr int kLines = kAcross ? kDepth : kCount;
    static_assert(kLines * kChunks % kProductThreads == 0);
#pragma unroll
    for (int i = 0; i < kLines * kChunks; i += kProductThreads) {
      const int line = (i + threadIdx.x) / kChunks, chunk = (i + threadIdx.x) % kChunks;
      const int64_t at = (kAcross ? k : first) + line;         // along the strided dimension
      const int64_t from = (kAcross ? first : k) + 8 * chunk;  // along the contiguous one
      const int64_t left = (kAcross ? x.count : depth.end) - from;
      const bool there = left > 0 && (kAcross ? at >= depth.first && at < depth.end : at < x.count);
      const uint32_t bytes = there ? static_cast<uint32_t>(2 * min(left, int64_t{8})) : 0u;
      const uint32_t swizzled = chunk ^ (kAcross ? line & 7 : line >> 1 & 3);
      ptx::cp_async_16(to + line * kChunks * 16 + swizzled * 16,
                       there ? data + at * (kAcross ? x.k_stride : x.stride) + from : data, bytes);
    }
  }

  // 16 x 16 elements of an operand from row `row` and k `k` of a stage on, as ldmatrix wants them.
  // `row_lane`, `k_lane`: the eight rows and the eight k that this lane has the address of.
  template <int kCount, bool kAcross>
  static __device__ __forceinline__ void load_fragment(uint32_t (&r)[4], uint32_t from, int row,
                                                       int k, int row_lane, int k_lane) {
    const int i = threadIdx.x % 8;
    if constexpr (kAcross) {
      const int line = k + 8 * k_lane + i, chunk = row / 8 + row_lane;
      ptx::ldmatrix_x4_trans(r, from + line * kCount * 2 + ((chunk ^ (line & 7)) << 4));
    } else {
      const int line = row + 8 * row_lane + i, chunk = k / 8 + k_lane;
      ptx::ldmatrix_x4(r, from + line * kDepth * 2 + ((chunk ^ (line >> 1 & 3)) << 4));
    }
  }

  __device__ __forceinline__ void multiply(uint32_t a, uint32_t b) {
    const int lane = threadIdx.x % 32, odd = lane >> 3 & 1, upper = lane >> 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t fa[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_fragment<kRows, kAcrossA>(fa[i], a, first_row() + 16 * i, k, odd, upper);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t fb[4];
        load_fragment<kTileColumns, kAcrossB>(fb, b, first_column() + 16 * j, k, upper, odd);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::mma_bf16(sums_[i][2 * j], fa[i], fb[0], fb[1]);
          ptx::mma_bf16(sums_[i][2 * j + 1], fa[i], fb[2], fb[3]);
        }
      }
    }
  }

  float sums_[4][8][4];
  bool works_;
};

// float32, or what is widened to it. Sums of whole chains wait in the tile in shared memory: beside
// the chains they would not fit into registers.
class SimtProduct {
 public:
  static constexpr int kRows = 64, kHalves = 1;
  static constexpr int kDepth = 16, kChain = 128;
  static constexpr int kStrideA = kRows + 4, kStrideB = kTileColumns + 4;
  static constexpr size_t kShared = kTileBytes + kDepth * (kStrideA + kStrideB) * sizeof(float);

  __device__ __forceinline__ void run(const Operand& a, const Operand& b, int64_t row,
                                      int64_t column, const Depth& depth, const Start& start,
                                      void* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* sums = static_cast<float*>(shared) + 8 * warp * kTileStride + 4 * lane;
    float* at = static_cast<float*>(shared) + kHalfRows * kTileStride;
    float* bt = at + kDepth * kStrideA;
    const bool works = row + 8 * warp < a.count;
    bool adds = start.sums != nullptr;
    initialise(sums, row + 8 * warp, column + 4 * lane, a.count, b.count, start);
    float chain[8][8] = {};
#pragma unroll 1
    for (int64_t k = depth.first / kDepth * kDepth; k < depth.end; k += kDepth) {
      fill<kRows>(at, a, row, k, depth);
      fill<kTileColumns>(bt, b, column, k, depth);
#if !defined(RLIR_FAULT_COPY_BARRIER)
      __syncthreads();
#endif
      if (works) {
#pragma unroll 4
        for (int i = 0; i < kDepth; ++i) {
          const float4* x = reinterpret_cast<const float4*>(at + i * kStrideA + 8 * warp);
          const float4* y = reinterpret_cast<const float4*>(bt + i * kStrideB + 4 * lane);
          add(chain, x[0], x[1], y[0], y[32]);
        }
      }
      __syncthreads();
      if ((k + kDepth) % kChain != 0 && k + kDepth < depth.end) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          float4* to = reinterpret_cast<float4*>(sums + i * kTileStride + j / 4 * 128);
          float (&c)[8] = chain[i];
          const float4 s = *to;
          *to = adds ? make_float4(s.x + c[j], s.y + c[j + 1], s.z + c[j + 2], s.w + c[j + 3])
                     : make_float4(c[j], c[j + 1], c[j + 2], c[j + 3]);
          c[j] = c[j + 1] = c[j + 2] = c[j + 3] = 0.0f;
        }
      }
      adds = true;
    }
  }

  // They are there.
  __device__ __forceinline__ void put(int, float*) const {}

 private:
  // What this thread's 8 x 8 sums start from.
  static __device__ __forceinline__ void initialise(float* sums, int64_t row, int64_t column,
                                                    int64_t rows, int64_t columns,
                                                    const Start& start) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int c = 0; c < kTileColumns; c += 128) {
        float s[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool there = start.sums != nullptr && row + i < rows && column + c + j < columns;
          s[j] = there ? start.sums[(row + i) * start.stride + column + c + j] : 0.0f;
        }
        *reinterpret_cast<float4*>(sums + i * kTileStride + c) =
            make_float4(s[0], s[1], s[2], s[3]);
      }
    }
  }

  static __device__ __forceinline__ void add(float (&sum)[8][8], const float4& x0, const float4& x1,
                                             const float4& y0, const float4& y1) {
    const float x[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w};
    const float y[8] = {y0.x, y0.y, y0.z, y0.w, y1.x, y1.y, y1.z, y1.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j] = __fmaf_rn(x[i], y[j], sum[i][j]);
    }
  }

  static __device__ __forceinline__ float value(const Operand& x, int64_t i, int64_t k) {
    const int64_t at = i * x.stride + k * x.k_stride;
    return x.dtype == Dtype::kFloat32
               ? static_cast<const float*>(x.data)[at]
               : static_cast<float>(load(static_cast<const BFloat16*>(x.data) + at));
  }

  // to[k][i] of rows first .. first + kCount - 1 and 16 k; zeros where there is nothing.
  template <int kCount>
  static __device__ __forceinline__ void fill(float* to, const Operand& x, int64_t first, int64_t k,
                                              const Depth& depth) {
    constexpr int kStride = kCount + 4;
    const bool by_k = x.k_stride == 1;
    const int64_t other = by_k ? x.stride : x.k_stride;
    const bool whole = x.dtype == Dtype::kFloat32 && other % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && k >= depth.first &&
                       k + kDepth <= depth.end;
    if (whole && by_k) {
      for (int e = threadIdx.x; e < kCount * kDepth / 4; e += kProductThreads) {
        const int i = e / (kDepth / 4), q = 4 * (e % (kDepth / 4));
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + i < x.count) {
          const float* from = static_cast<const float*>(x.data) + (first + i) * x.stride + k + q;
          v = *reinterpret_cast<const float4*>(from);
        }
        float* at = to + q * kStride + i;
        at[0] = v.x, at[kStride] = v.y, at[2 * kStride] = v.z, at[3 * kStride] = v.w;
      }
    } else if (whole && x.stride == 1 && first + kCount <= x.count) {
      for (int e = threadIdx.x; e < kCount * kDepth / 4; e += kProductThreads) {
        const int j = e / (kCount / 4), i = 4 * (e % (kCount / 4));
        const float* from = static_cast<const float*>(x.data) + first + i + (k + j) * x.k_stride;
        *reinterpret_cast<float4*>(to + j * kStride + i) = *reinterpret_cast<const float4*>(from);
      }
    } else {
#pragma unroll 1
      for (int e = threadIdx.x; e < kCount * kDepth; e += kProductThreads) {
        const int i = by_k ? e / kDepth : e % kCount, j = by_k ? e % kDepth : e / kCount;
        const bool there = first + i < x.count && k + j >= depth.first && k + j < depth.end;
        to[j * kStride + i] = there ? value(x, first + i, k + j) : 0.0f;
      }
    }
  }
};

template <bool kTensorCores, bool kAcrossA, bool kAcrossB>
struct ProductOf {
  using Type = SimtProduct;
};
template <bool kAcrossA, bool kAcrossB>
struct ProductOf<true, kAcrossA, kAcrossB> {
  using Type = MmaProduct<kAcrossA, kAcrossB>;
};

}  // namespace
}  // namespace rlir::cuda
