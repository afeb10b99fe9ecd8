// Two routes. bfloat16 goes to tensor cores (attention_tile.cuh). float32 is computed as on the
// CPU, and has its bits: cpu/video_attention.h has the order of every sum.
#include "cuda/attention_simt.cuh"
#include "cuda/attention_tile.cuh"

namespace rlir::cuda {
namespace {

// Rows of a tile of a head: enough for registers, and not fewer in a warp than they can hold.
template <int D>
constexpr int kTall = D == 128 ? 1 : 2;
template <int D, int kM>
constexpr int kBlocks = D == 128 || kM == 2 ? 2
                        : D == 64           ? 3
                                            : 4;

// Tiles of a sequence and head are neighbours in the grid, the last ones, which see most, first.
template <int D, int kM, int kParts>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<D, kM>)
    attend_kernel(const RLIR_GRID_CONSTANT AttentionForward f, int tiles) {
  using Tile = AttentionTile<D, kM, kParts, true>;
  RLIR_SHARED_DYNAMIC(unsigned char, shared);
  const Attention& a = f.in;
  const int64_t block = blockIdx.x / tiles, sequence = block / a.kv_heads;
  const int kv_head = static_cast<int>(block % a.kv_heads);
  const int rows = static_cast<int>(a.tokens * (a.heads / a.kv_heads));
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Tile::kRows;
  Tile tile;
  tile.run(a, sequence, kv_head, first, rows, 0, kNever, shared);
  tile.finish(a, sequence, kv_head, first, rows, f.out, f.lse);
}

template <int D>
__global__ void __launch_bounds__(kSimtThreads)
    simt_kernel(const RLIR_GRID_CONSTANT AttentionForward f, int tiles) {
  RLIR_SHARED_DYNAMIC(float, shared);
  const Attention& a = f.in;
  const int64_t block = blockIdx.x / tiles, sequence = block / a.kv_heads;
  const int kv_head = static_cast<int>(block % a.kv_heads);
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kSimtRows;
  SimtTile<D>().run(f, sequence, kv_head, first, shared);
}

template <int D, int kM>
int attend(const AttentionForward& f, int64_t rows, void* stream) {
  using Tile = AttentionTile<D, kM, 1, true>;
  const int64_t tiles = ceil_div<int64_t>(rows, Tile::kRows);
  const dim3 grid(static_cast<unsigned>(tiles * f.in.sequences * f.in.kv_heads));
  const auto kernel = f.in.parts == 1 ? attend_kernel<D, kM, 1> : attend_kernel<D, kM, 2>;
  return launch(kernel, grid, dim3(kAttentionThreads), Tile::kShared, stream, f,
                static_cast<int>(tiles));
}

template <int D>
int forward(const AttentionForward& f, void* stream) {
  const int64_t rows = f.in.tokens * (f.in.heads / f.in.kv_heads);
  if (f.in.dtype == Dtype::kBFloat16) {
    if (kTall<D> == 1 || rows <= 64 || f.in.mask.kind == MaskKind::kRefreshed) {
      return attend<D, 1>(f, rows, stream);
    }
    return attend<D, kTall<D>>(f, rows, stream);
  }
  const int64_t tiles = ceil_div<int64_t>(rows, kSimtRows);
  const dim3 grid(static_cast<unsigned>(tiles * f.in.sequences * f.in.kv_heads));
  return launch(simt_kernel<D>, grid, dim3(kSimtThreads), SimtTile<D>::kShared, stream, f,
                static_cast<int>(tiles));
}

}  // namespace

int video_attention(const AttentionForward& args, void* stream) {
  if (args.in.depth == 32) return forward<32>(args, stream);
  if (args.in.depth == 64) return forward<64>(args, stream);
  return forward<128>(args, stream);
}

}  // namespace rlir::cuda
