// Why it looks like this: FlashAttention-2's backward without atomics. Scores are computed twice,
// once by blocks that have keys and go through the queries (dk, dv), once by blocks that have
// queries and go through the keys (dq): every sum has one owner and one order, so that results are
// the same each time and do not depend on the batch, and heads that share keys are summed inside.
//
//   P = 2^(s scale log2 e - lse)   dP = dout v   dS = P (dP - delta)   delta = sum dout out - dlse
//
// P and dS go from the accumulators of one product into the operands of the next, rounded to
// bfloat16, without a way through memory: blocks of keys compute the transposes, S^T = K Q^T, whose
// accumulators are the left operands of dv += P^T dout and dk += dS^T q.
//
// First a kernel goes through the queries: delta, what each row sees, and what a tile of rows sees,
// in the order in which the others read them.
//
// A row that sees nothing of a block may hold anything, NaN as well: its P and dS are replaced, and
// its q and dout are read as zeros. So it is with keys.
#include "cuda/video_attention_backward.cuh"

#include "cuda/attention_gradient_keys.cuh"
#include "cuda/attention_gradient_queries.cuh"
#include "cuda/attention_gradient_simt.cuh"

namespace rlir::cuda {
namespace {

constexpr int kRowTile = 64;

// A block a tile of rows, a warp a row at a time.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    rows_kernel(const RLIR_GRID_CONSTANT AttentionBackward g, int part, int tiles) {
  RLIR_SHARED(Span, spans, kAttentionThreads / 32);
  const Attention& a = g.in;
  const GradientRows& to = g.rows[part];
  const int64_t tile = blockIdx.x % tiles, block = blockIdx.x / tiles;
  const int kv_head = static_cast<int>(block % a.kv_heads);
  const int64_t batch = block / a.kv_heads, members = part == 0 ? a.group : 1;
  const int rows = static_cast<int>(members * a.tokens * (a.heads / a.kv_heads));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t padded = static_cast<int64_t>(tiles) * kRowTile;
#pragma unroll 1
  for (int i = 0; i < kRowTile / 4; ++i) {
    const int row = static_cast<int>(tile) * kRowTile + 16 * warp + i;
    float delta = 0.0f, lse = 0.0f;
    if (row < rows) {
      const Query q = query_of(a, batch * members, kv_head, row);
      const T* out = static_cast<const T*>(g.out.data) + offset(g.out, q);
      const T* grad = static_cast<const T*>(g.grad_out.data) + offset(g.grad_out, q);
#pragma unroll 2
      for (int d = lane; d < a.depth; d += 32) {
        delta =
            __fmaf_rn(static_cast<float>(load(grad + d)), static_cast<float>(load(out + d)), delta);
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        delta = delta + __shfl_xor_sync(kAllLanes, delta, lanes);
      }
      if (g.grad_lse != nullptr) {
        delta = delta - g.grad_lse[q.sequence * g.grad_lse_sequence + q.token * g.grad_lse_token +
                                   q.head * g.grad_lse_head];
      }
      lse = g.lse[flat(a, q)] * 0x1.715476p+0f;
    }
    if (lane == 0) {
      const int64_t at = (batch * a.kv_heads + kv_head) * padded + row;
      to.lse[at] = lse;
      to.delta[at] = delta;
    }
  }
  if (kv_head != 0) return;  // what they see is the same for all heads
  Span span = no_span();
  if (lane < 16) {
    const int row = static_cast<int>(tile) * kRowTile + 16 * warp + lane;
    Sight sight{kNever, 0, 0, 0};
    if (row < rows) {
      const Query q = query_of(a, batch * members, kv_head, row);
      sight = sight_of(a, q.sequence, q.token);
      add(span, a.mask, sight);
      if (sight.low == kNever) span.whole_low = kNever;  // it must be hidden everywhere
    }
    static_cast<Sight*>(to.sights)[batch * padded + row] = sight;
  }
  __syncwarp();
  span = over_warp(span);
  if (lane == 0) spans[warp] = span;
#if !defined(RLIR_FAULT_ROWS_BARRIER)
  __syncthreads();
#endif
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kAttentionThreads / 32; ++w) span = joined(span, spans[w]);
  static_cast<Span*>(to.spans)[batch * tiles + tile] = span;
}

template <int D, int kParts>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    queries_kernel(const RLIR_GRID_CONSTANT AttentionBackward g, int tiles) {
  RLIR_SHARED_DYNAMIC(unsigned char, shared);
  const Attention& a = g.in;
  const int64_t block = blockIdx.x / tiles;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x % tiles);  // which see most, first
  QueryGradient<D, kParts>().run(g, block / a.kv_heads, static_cast<int>(block % a.kv_heads), tile,
                                 tiles, shared);
}

template <int D>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    keys_kernel(const RLIR_GRID_CONSTANT AttentionBackward g,
                const RLIR_GRID_CONSTANT AttentionBackward second, int calls, int part,
                int blocks) {
  RLIR_SHARED_DYNAMIC(unsigned char, shared);
  const int64_t block = blockIdx.x / blocks;
  const int64_t kv_heads = g.in.kv_heads;
  KeyGradient<D>().run(g, second, calls, part, block / kv_heads, static_cast<int>(block % kv_heads),
                       static_cast<int>(blockIdx.x % blocks) * kKeyBlock, shared);
}

template <int D>
__global__ void __launch_bounds__(kSimtThreads)
    simt_queries_kernel(const RLIR_GRID_CONSTANT AttentionBackward g, int tiles) {
  RLIR_SHARED_DYNAMIC(float, shared);
  const int64_t block = blockIdx.x / tiles;
  SimtGradient<D>().queries(g, block / g.in.kv_heads, static_cast<int>(block % g.in.kv_heads),
                            static_cast<int>(blockIdx.x % tiles), shared);
}

template <int D>
__global__ void __launch_bounds__(kSimtThreads)
    simt_keys_kernel(const RLIR_GRID_CONSTANT AttentionBackward g,
                     const RLIR_GRID_CONSTANT AttentionBackward second, int calls, int part,
                     int blocks) {
  RLIR_SHARED_DYNAMIC(float, shared);
  const int64_t block = blockIdx.x / blocks;
  const int64_t kv_heads = g.in.kv_heads;
  SimtGradient<D>().keys(g, second, calls, part, block / kv_heads,
                         static_cast<int>(block % kv_heads),
                         static_cast<int>(blockIdx.x % blocks) * kSimtTile, shared);
}

int64_t batches_of(const Attention& a, int part) {
  return part == 0 ? a.sequences / a.group : a.sequences;
}

int run_rows(const AttentionBackward& g, int part, void* stream) {
  const int64_t tiles = gradient_tiles(g.in, part);
  const dim3 grid(static_cast<unsigned>(tiles * g.in.kv_heads * batches_of(g.in, part)));
  const auto kernel = g.in.dtype == Dtype::kBFloat16 ? rows_kernel<BFloat16> : rows_kernel<float>;
  return launch(kernel, grid, dim3(kAttentionThreads), 0, stream, g, part, static_cast<int>(tiles));
}

template <int D>
int run_queries(const AttentionBackward& g, void* stream) {
  const Attention& a = g.in;
  const bool cores = a.dtype == Dtype::kBFloat16;
  const int64_t rows = a.tokens * (a.heads / a.kv_heads);
  const int64_t tiles = ceil_div<int64_t>(rows, cores ? kRowTile : kSimtTile);
  const dim3 grid(static_cast<unsigned>(tiles * a.kv_heads * a.sequences));
  if (cores) {
    const auto kernel = a.parts == 1 ? queries_kernel<D, 1> : queries_kernel<D, 2>;
    return launch(kernel, grid, dim3(kAttentionThreads), QueryGradient<D, 1>::kShared, stream, g,
                  static_cast<int>(tiles));
  }
  return launch(simt_queries_kernel<D>, grid, dim3(kSimtThreads), SimtGradient<D>::kShared, stream,
                g, static_cast<int>(tiles));
}

template <int D>
int run_keys(const AttentionBackward& g, const AttentionBackward* second, int part, void* stream) {
  const Attention& a = g.in;
  const bool cores = a.dtype == Dtype::kBFloat16;
  const int64_t blocks = ceil_div<int64_t>(a.part[part].slots, cores ? kKeyBlock : kSimtTile);
  const dim3 grid(static_cast<unsigned>(blocks * a.kv_heads * batches_of(a, part)));
  const AttentionBackward& other = second != nullptr ? *second : g;
  const int calls = second != nullptr ? 2 : 1;
  if (cores) {
    return launch(keys_kernel<D>, grid, dim3(kAttentionThreads), KeyGradient<D>::kShared, stream, g,
                  other, calls, part, static_cast<int>(blocks));
  }
  return launch(simt_keys_kernel<D>, grid, dim3(kSimtThreads), SimtGradient<D>::kShared, stream, g,
                other, calls, part, static_cast<int>(blocks));
}

}  // namespace

int64_t gradient_tiles(const Attention& in, int part) {
  const int64_t members = part == 0 ? in.group : 1;
  return ceil_div<int64_t>(members * in.tokens * (in.heads / in.kv_heads), kRowTile);
}

int attention_gradient_rows(const AttentionBackward& args, void* stream) {
  for (int part = 0; part < args.in.parts; ++part) {
    const int error = run_rows(args, part, stream);
    if (error != 0) return error;
  }
  return 0;
}

int attention_gradient_queries(const AttentionBackward& args, void* stream) {
  if (args.in.depth == 32) return run_queries<32>(args, stream);
  if (args.in.depth == 64) return run_queries<64>(args, stream);
  return run_queries<128>(args, stream);
}

int attention_gradient_keys(const AttentionBackward& args, const AttentionBackward* second,
                            int part, void* stream) {
  if (args.in.depth == 32) return run_keys<32>(args, second, part, stream);
  if (args.in.depth == 64) return run_keys<64>(args, second, part, stream);
  return run_keys<128>(args, second, part, stream);
}

}  // namespace rlir::cuda
