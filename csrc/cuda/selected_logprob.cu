// Why it looks like this: a block computes the logits of a tile of rows by 256 columns in registers
// (product.cuh), passes them through shared memory, 64 rows at a time, to teams of 16 threads that
// take a row each, and writes three numbers a row: maximum, sum and entropy's sum of its 256
// columns. That is a block of the softmax in cpu/softmax.h, thread i of a team is accumulator i,
// and a second kernel joins a row's blocks in their order. So no sum depends on how the vocabulary
// is cut or on the batch, few rows still fill a GPU, and sample_tokens' sums are the same ones: the
// log-probability of what it drew from head_logits has the same bits.
//
// Neighbouring blocks of the grid share their columns: the weight is read from memory once.
#include "cuda/selected_logprob.cuh"

#include "cuda/head.cuh"

namespace rlir::cuda {
namespace {

constexpr int kRowThreads = 128;

// One row of a tile: its maximum and sums, and z of the target. z replaces the logits: in registers
// there is no room for it beside the sums of the tile's other half.
__device__ __forceinline__ void reduce_row(const SelectedLogprob& a, float* row_of_tile,
                                           int64_t row, int64_t block) {
  const int lane = threadIdx.x % kSoftmaxLanes;
  const uint32_t team = team_mask();
  float* own = row_of_tile + lane;  // every 16th is this thread's
  const int64_t first = block * kSoftmaxBlock + lane;
  const int64_t target = a.head.targets[row * a.head.target_stride] - first;
  float most = cpu::minus_infinity();
#pragma unroll 4
  for (int c = 0; c < kTileColumns; c += kSoftmaxLanes) {
    const float z = z_of(a.head, own + c, row, first + c);
    own[c] = z;
    most = z > most ? z : most;
    if (target == c) a.target_z[row] = z;
  }
#pragma unroll
  for (int distance = kSoftmaxLanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(team, most, distance, kSoftmaxLanes);
    most = other > most ? other : most;
  }
  const float reference = cpu::reference_of(most);
  float sum = 0.0f, dot = 0.0f;
#pragma unroll 4
  for (int c = 0; c < kTileColumns; c += kSoftmaxLanes) {
    const float x = own[c] - reference, e = exp(x);
    sum += e;
    if (a.entropy != nullptr) dot = cpu::add_dot(e, x, dot);
  }
#pragma unroll
  for (int distance = kSoftmaxLanes / 2; distance > 0; distance /= 2) {
    sum = sum + __shfl_xor_sync(team, sum, distance, kSoftmaxLanes);
    dot = dot + __shfl_xor_sync(team, dot, distance, kSoftmaxLanes);
  }
  if (lane != 0) return;
  const int64_t at = (block - a.head.low / kSoftmaxBlock) * a.head.rows + row;
  a.block_max[at] = most;
  a.block_sum[at] = sum;
  a.block_dot[at] = dot;
}

template <bool kTensorCores>
__global__ void __launch_bounds__(kProductThreads, 1)
    tile_kernel(const RLIR_GRID_CONSTANT SelectedLogprob a) {
  using Product = LogitsProduct<kTensorCores>;
  RLIR_SHARED_DYNAMIC(float, tile);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Product::kRows;
  const int64_t block = a.head.low / kSoftmaxBlock + blockIdx.y;
  Product product;
  product.run(hidden_operand(a.head), weight_operand(a.head), first, block * kSoftmaxBlock,
              {0, a.head.depth}, {nullptr, 0}, tile);
#pragma unroll 1
  for (int half = 0; half < Product::kHalves; ++half) {
    product.put(half, tile);
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kTeamRows; ++step) {
      const int in_half = team_row(step);
      const int64_t row = first + half * kHalfRows + in_half;
      if (row < a.head.rows) reduce_row(a, tile + in_half * kTileStride, row, block);
    }
    __syncthreads();
  }
}

// A thread a row: the blocks of its softmax in order.
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(const RLIR_GRID_CONSTANT SelectedLogprob a) {
  const Head& h = a.head;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x, n = h.rows;
  if (row >= n) return;
  const int64_t count = (h.high - 1) / kSoftmaxBlock - h.low / kSoftmaxBlock + 1;
  float maximum = cpu::minus_infinity();
  for (int64_t b = 0; b < count; ++b) {
    const float own = a.block_max[b * n + row];
    maximum = own > maximum ? own : maximum;
  }
  double s = 0.0, u = 0.0;
  for (int64_t b = 0; b < count; ++b) {
    const float top = a.block_max[b * n + row];
    cpu::join_block(top, maximum, exp(top - maximum), a.block_sum[b * n + row],
                    a.block_dot[b * n + row], &s, &u);
  }
  const int64_t target = h.targets[row * h.target_stride];
  const bool known = target >= 0 && target < h.tokens;
  bool any = h.support == nullptr || maximum != cpu::minus_infinity();
  for (int64_t v = h.low; !any && v < h.high; ++v) any = supports(h, row, v);
  const double log_sum = log(s);
  const float nan = NAN;
  a.stats[row] = maximum;
  a.stats[n + row] = static_cast<float>(log_sum);
  a.stats[2 * n + row] = static_cast<float>(1.0 / s);
  float logprob = cpu::minus_infinity();
  if (supports(h, row, target)) logprob = cpu::row_logprob(a.target_z[row], maximum, log_sum);
  a.logprob[row] = known && any ? logprob : nan;
  if (a.entropy != nullptr) a.entropy[row] = any ? cpu::row_entropy(s, u, log_sum) : nan;
  RLIR_DEVICE_ASSERT(known, "selected_logprob: targets must be from 0 and below V");
  RLIR_DEVICE_ASSERT(any,
                     "selected_logprob: support must hold a token of vocab_range in every row");
}

template <bool kTensorCores>
__global__ void __launch_bounds__(kProductThreads, 1)
    logits_kernel(const RLIR_GRID_CONSTANT Head a, float* logits) {
  using Product = LogitsProduct<kTensorCores>;
  RLIR_SHARED_DYNAMIC(float, tile);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Product::kRows;
  const int64_t start = (a.low / kTileColumns + blockIdx.y) * kTileColumns;
  Product product;
  product.run(hidden_operand(a), weight_operand(a), first, start, {0, a.depth}, {nullptr, 0}, tile);
  const int64_t token = start + threadIdx.x;  // a thread has a column
  const bool here = token >= a.low && token < a.high;
  const float bias =
      a.bias != nullptr && here ? float_at(a.bias, a.bias_dtype, token * a.bias_stride) : 0.0f;
#pragma unroll 1
  for (int half = 0; half < Product::kHalves; ++half) {
    product.put(half, tile);
    __syncthreads();
    const int64_t row = first + half * kHalfRows;
    for (int i = 0; i < kHalfRows && row + i < a.rows && here; ++i) {
      const float logit = tile[i * kTileStride + threadIdx.x];
      logits[(row + i) * a.tokens + token] = a.bias != nullptr ? logit + bias : logit;
    }
    __syncthreads();
  }
}

// A thread a chunk of eight elements.
__global__ void __launch_bounds__(kRowThreads)
    pack_kernel(Matrix from, int64_t rows, int64_t depth, uint16_t* to, int64_t stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int64_t row = i / (stride / 8), column = i % (stride / 8) * 8;
  if (row >= rows) return;
  const uint16_t* in = static_cast<const uint16_t*>(from.data) + row * from.major_stride;
  uint32_t word[4] = {};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (column + k < depth) {
      word[k / 2] |= static_cast<uint32_t>(in[(column + k) * from.minor_stride]) << 16 * (k % 2);
    }
  }
  *reinterpret_cast<uint4*>(to + row * stride + column) =
      make_uint4(word[0], word[1], word[2], word[3]);
}

template <typename Product>
dim3 tiles_of(const Head& a) {
  const int64_t blocks = (a.high - 1) / kTileColumns - a.low / kTileColumns + 1;
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(a.rows, Product::kRows)),
              static_cast<unsigned>(blocks));
}

template <bool kTensorCores>
int run_tiles(const SelectedLogprob& a, void* stream) {
  using Product = LogitsProduct<kTensorCores>;
  return launch(tile_kernel<kTensorCores>, tiles_of<Product>(a.head), dim3(kProductThreads),
                Product::kShared, stream, a);
}

template <bool kTensorCores>
int run_logits(const Head& a, float* logits, void* stream) {
  using Product = LogitsProduct<kTensorCores>;
  return launch(logits_kernel<kTensorCores>, tiles_of<Product>(a), dim3(kProductThreads),
                Product::kShared, stream, a, logits);
}

}  // namespace

bool head_packed(const Matrix& x) {
  return x.minor_stride == 1 && x.major_stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

int head_pack(const Matrix& from, int64_t rows, int64_t depth, void* to, int64_t stride,
              void* stream) {
  const int64_t blocks = ceil_div<int64_t>(rows * (stride / 8), kRowThreads);
  return launch(pack_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads), 0, stream,
                from, rows, depth, static_cast<uint16_t*>(to), stride);
}

int selected_logprob(const SelectedLogprob& a, void* stream) {
  const int error = a.head.tensor_cores ? run_tiles<true>(a, stream) : run_tiles<false>(a, stream);
  if (error != 0) return error;
  const dim3 rows(static_cast<unsigned>(ceil_div<int64_t>(a.head.rows, kRowThreads)));
  return launch(rows_kernel, rows, dim3(kRowThreads), 0, stream, a);
}

int head_logits(const Head& a, float* logits, void* stream) {
  return a.tensor_cores ? run_logits<true>(a, logits, stream)
                        : run_logits<false>(a, logits, stream);
}

}  // namespace rlir::cuda
