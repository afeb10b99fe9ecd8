// Gradients of selected_logprob, a chunk of the vocabulary at a time. Formulas:
// cpu/selected_logprob.h.
//
// Why it looks like this: gradient_kernel computes the logits of a tile again (product.cuh), turns
// them into dz in shared memory and writes dz of the chunk once, [N][columns], in bfloat16 where
// tensor cores go on with it. Two products read it: dhidden += dz weight, dweight = dz^T hidden;
// ldmatrix.trans transposes as it reads. To compute the logits once more in each of them instead
// would need no memory and half as many products again.
//
// Sums over the vocabulary go on from chunk to chunk in float32, so that a row's dhidden does not
// depend on where chunks end. Sums over rows run in their order: nothing is added by atomics.
#include "cuda/head.cuh"
#include "cuda/selected_logprob.cuh"

namespace rlir::cuda {
namespace {

constexpr int kBiasThreads = 128;

// What dz needs to know of a row.
struct RowGradient {
  float max, log_sum, scale;  // scale = 1 / s
  float logprob, entropy;     // coefficients: dlogprob / T, dentropy / T
  float mean;                 // the entropy

  __device__ RowGradient(const HeadGradient& g, int64_t row) {
    const Head& a = g.head;
    max = g.stats[row];
    log_sum = g.stats[a.rows + row];
    scale = g.stats[2 * a.rows + row];
    logprob = entropy = mean = 0.0f;
    const int64_t target = a.targets[row * a.target_stride];
    if (g.grad_logprob != nullptr && supports(a, row, target)) {
      logprob = g.grad_logprob[row * g.grad_logprob_stride] / a.temperature;
    }
    if (target < 0 || target >= a.tokens) logprob = NAN;  // the forward pass has said it
    if (g.grad_entropy != nullptr) {
      entropy = g.grad_entropy[row * g.grad_entropy_stride] / a.temperature;
      mean = g.entropy[row];
    }
  }

  // -p (dlogprob + dentropy (log p + entropy)), without the target's own term.
  __device__ float of(float z) const {
    const float below = z - max, p = exp(below) * scale;
    const float logp = p > 0.0f ? below - log_sum : 0.0f;
    return -p * fmaf(entropy, logp + mean, logprob);
  }
};

// A row of a tile: logits become dz.
__device__ __forceinline__ void gradient_row(const HeadGradient& g, float* row_of_tile, int64_t row,
                                             int64_t start) {
  const Head& a = g.head;
  const int lane = threadIdx.x % kSoftmaxLanes;
  const RowGradient of_row(g, row);
  const int64_t target = a.targets[row * a.target_stride];
#pragma unroll 4
  for (int c = lane; c < kTileColumns; c += kSoftmaxLanes) {
    const int64_t token = start + c;
    float dz = of_row.of(z_of(a, row_of_tile + c, row, token));
    if (token == target) dz += of_row.logprob;
    row_of_tile[c] = token >= a.low && token < a.high ? dz : 0.0f;
  }
}

// dz of the rows of a half tile, eight columns a thread.
__device__ __forceinline__ void store_dz(const HeadGradient& g, const float* tile, int64_t first,
                                         int64_t column) {
  const int64_t stride = (g.block_end - g.block_begin) * kTileColumns;
  constexpr int kChunks = kTileColumns / 8;
  for (int e = threadIdx.x; e < kHalfRows * kChunks; e += kProductThreads) {
    const int i = e / kChunks, c = 8 * (e % kChunks);
    if (first + i >= g.head.rows) return;
    const float4* from = reinterpret_cast<const float4*>(tile + i * kTileStride + c);
    const float4 x = from[0], y = from[1];
    const int64_t at = (first + i) * stride + column + c;
    if (g.head.tensor_cores) {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(g.dz) + at) =
          make_uint4(ptx::pack_bf16(x.x, x.y), ptx::pack_bf16(x.z, x.w), ptx::pack_bf16(y.x, y.y),
                     ptx::pack_bf16(y.z, y.w));
    } else {
      float4* to = reinterpret_cast<float4*>(static_cast<float*>(g.dz) + at);
      to[0] = x;
      to[1] = y;
    }
  }
}

template <bool kTensorCores>
__global__ void __launch_bounds__(kProductThreads, 1)
    gradient_kernel(const RLIR_GRID_CONSTANT HeadGradient g) {
  using Product = LogitsProduct<kTensorCores>;
  RLIR_SHARED_DYNAMIC(float, tile);
  const Head& a = g.head;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Product::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  const int64_t start = g.block_begin * kTileColumns + column;
  Product product;
  product.run(hidden_operand(a), weight_operand(a), first, start, {0, a.depth}, {nullptr, 0}, tile);
  float bias = 0.0f;  // of this thread's column
#pragma unroll 1
  for (int half = 0; half < Product::kHalves; ++half) {
    const int64_t row = first + half * kHalfRows;
    product.put(half, tile);
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kTeamRows; ++step) {
      const int in_half = team_row(step);
      if (row + in_half < a.rows) {
        gradient_row(g, tile + in_half * kTileStride, row + in_half, start);
      }
    }
#if !defined(RLIR_FAULT_TILE)
    __syncthreads();
#endif
    store_dz(g, tile, row, column);
    for (int i = 0; g.bias_sums != nullptr && i < kHalfRows && row + i < a.rows; ++i) {
      bias += tile[i * kTileStride + threadIdx.x];
    }
    __syncthreads();
  }
  if (g.bias_sums != nullptr) {
    const int64_t columns = (g.block_end - g.block_begin) * kTileColumns;
    g.bias_sums[blockIdx.x * columns + column + threadIdx.x] = bias;
  }
}

// Columns of the chunk that vocab_range has, relative to it.
__device__ __forceinline__ Depth chunk_range(const HeadGradient& g) {
  const int64_t start = g.block_begin * kTileColumns, end = g.block_end * kTileColumns;
  return {max(g.head.low - start, int64_t{0}), min(g.head.high, end) - start};
}

__device__ __forceinline__ Operand dz_operand(const HeadGradient& g) {
  const Dtype dtype = g.head.tensor_cores ? Dtype::kBFloat16 : Dtype::kFloat32;
  return {g.dz, dtype, g.head.rows, (g.block_end - g.block_begin) * kTileColumns, 1};
}

// The same elements with rows and k exchanged; `count` of the k become rows.
__device__ __forceinline__ Operand transposed(const Operand& x, int64_t count) {
  return {x.data, x.dtype, count, x.k_stride, x.stride};
}

// dhidden: rows by H, k is the vocabulary.
template <bool kTensorCores>
__global__ void __launch_bounds__(kProductThreads, 1)
    hidden_kernel(const RLIR_GRID_CONSTANT HeadGradient g) {
  using Product = HiddenProduct<kTensorCores>;
  RLIR_SHARED_DYNAMIC(float, tile);
  const Head& a = g.head;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Product::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  Matrix weight = a.weight;
  const int64_t skipped = g.block_begin * kTileColumns * weight.major_stride;
  weight.data =
      static_cast<const char*>(weight.data) + skipped * (weight.dtype == Dtype::kFloat32 ? 4 : 2);
  const Operand w = {weight.data, weight.dtype, 0, weight.major_stride, weight.minor_stride};
  Product product;
  product.run(dz_operand(g), transposed(w, a.depth), first, column, chunk_range(g),
              {g.first ? nullptr : g.hidden_sums, a.depth}, tile);
#pragma unroll 1
  for (int half = 0; half < Product::kHalves; ++half) {
    product.put(half, tile);
    __syncthreads();
    const int64_t row = first + half * kHalfRows, h = column + threadIdx.x;
    for (int i = 0; i < kHalfRows && row + i < a.rows && h < a.depth; ++i) {
      const float sum = tile[i * kTileStride + threadIdx.x];
      const int64_t at = (row + i) * a.depth + h;
      if (g.last) {
        store_at(g.grad_hidden, g.hidden_dtype, at, sum);
      } else {
        g.hidden_sums[at] = sum;
      }
    }
    __syncthreads();
  }
}

// dweight of the chunk: its columns by H, k are the rows.
template <bool kTensorCores>
__global__ void __launch_bounds__(kProductThreads, 1)
    weight_kernel(const RLIR_GRID_CONSTANT HeadGradient g) {
  using Product = WeightProduct<kTensorCores>;
  RLIR_SHARED_DYNAMIC(float, tile);
  const Head& a = g.head;
  const Depth range = chunk_range(g);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Product::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  Product product;
  product.run(transposed(dz_operand(g), range.end), transposed(hidden_operand(a), a.depth), first,
              column, {0, a.rows}, {nullptr, 0}, tile);
#pragma unroll 1
  for (int half = 0; half < Product::kHalves; ++half) {
    product.put(half, tile);
    __syncthreads();
    const int64_t h = column + threadIdx.x;
    for (int i = 0; i < kHalfRows && h < a.depth; ++i) {
      const int64_t v = first + half * kHalfRows + i;
      if (v < range.first || v >= range.end) continue;
      const int64_t token = g.block_begin * kTileColumns + v;
      store_at(g.grad_weight, g.weight_dtype, token * a.depth + h,
               tile[i * kTileStride + threadIdx.x]);
    }
    __syncthreads();
  }
}

// A thread a column: sums of tiles of rows, in their order.
__global__ void __launch_bounds__(kBiasThreads)
    bias_kernel(const RLIR_GRID_CONSTANT HeadGradient g, int64_t tiles) {
  const Depth range = chunk_range(g);
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kBiasThreads + threadIdx.x;
  if (v < range.first || v >= range.end) return;
  const int64_t columns = (g.block_end - g.block_begin) * kTileColumns;
  double sum = 0.0;
  for (int64_t i = 0; i < tiles; ++i) sum += static_cast<double>(g.bias_sums[i * columns + v]);
  g.grad_bias[g.block_begin * kTileColumns + v] = static_cast<float>(sum);
}

template <typename Product>
dim3 tiles_of(int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, Product::kRows)),
              static_cast<unsigned>(ceil_div<int64_t>(columns, kTileColumns)));
}

template <bool kTensorCores>
int run(const HeadGradient& g, void* stream) {
  using Logits = LogitsProduct<kTensorCores>;
  using Hidden = HiddenProduct<kTensorCores>;
  using Weight = WeightProduct<kTensorCores>;
  const Head& a = g.head;
  const int64_t columns = (g.block_end - g.block_begin) * kTileColumns;
  const dim3 threads(kProductThreads);
  int error = launch(gradient_kernel<kTensorCores>, tiles_of<Logits>(a.rows, columns), threads,
                     Logits::kShared, stream, g);
  if (error == 0 && g.grad_hidden != nullptr && a.depth > 0) {
    error = launch(hidden_kernel<kTensorCores>, tiles_of<Hidden>(a.rows, a.depth), threads,
                   Hidden::kShared, stream, g);
  }
  if (error == 0 && g.grad_weight != nullptr && a.depth > 0) {
    error = launch(weight_kernel<kTensorCores>, tiles_of<Weight>(columns, a.depth), threads,
                   Weight::kShared, stream, g);
  }
  if (error == 0 && g.grad_bias != nullptr) {
    const dim3 blocks(static_cast<unsigned>(columns / kBiasThreads));
    error = launch(bias_kernel, blocks, dim3(kBiasThreads), 0, stream, g, head_row_tiles(a));
  }
  return error;
}

}  // namespace

int64_t head_row_tiles(const Head& a) {
  const int rows = a.tensor_cores ? LogitsProduct<true>::kRows : LogitsProduct<false>::kRows;
  return ceil_div<int64_t>(a.rows, rows);
}

int selected_logprob_backward(const HeadGradient& g, void* stream) {
  return g.head.tensor_cores ? run<true>(g, stream) : run<false>(g, stream);
}

}  // namespace rlir::cuda
