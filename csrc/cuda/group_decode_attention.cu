// Why it looks like this: decoding reads keys and hardly computes, so a group's prefix must be read
// once, for all its rollouts, and by many blocks. The rows of a tile are the queries of all rollouts
// of the group; keys are cut into splits of 512 slots, a block each, which leave their sums, and a
// second kernel joins a query's splits in order:
//
//   m = max m_s,  out = sum_s 2^(m_s - m) acc_s / sum_s 2^(m_s - m) l_s
//
// Splits are anchored at slots of the prefix or the suffix, and so a query's bits do not depend on
// the other rollouts, on their number, or on how many of its tokens come together.
#include "cuda/group_decode_attention.cuh"

#include "cuda/attention_tile.cuh"

namespace rlir::cuda {
namespace {

constexpr int kSplitBlocks = 8, kMergeThreads = 128;

int64_t splits_of(const KeyPart& part) {
  return ceil_div<int64_t>(part.slots, kSplitBlocks * kKeyBlock);
}

// Of one part of the keys: sequences that read them together, tiles of their queries, splits.
struct SplitWork {
  int64_t members;
  int tiles, splits;

  int64_t blocks(const Attention& a) const {
    return tiles * splits * a.kv_heads * (a.sequences / members);
  }
};
struct SplitPlan {
  SplitWork part[2];
};

// The tiles of a split are neighbours in the grid: they read the same keys.
template <int D>
__global__ void __launch_bounds__(kAttentionThreads, D == 128 ? 2 : D == 64 ? 3 : 4)
    split_kernel(const RLIR_GRID_CONSTANT GroupDecode g, const RLIR_GRID_CONSTANT SplitPlan plan) {
  using Tile = AttentionTile<D, 1>;
  RLIR_SHARED_DYNAMIC(unsigned char, shared);
  const Attention& a = g.in;
  int64_t block = blockIdx.x;
  const int64_t before = plan.part[0].tiles * plan.part[0].splits * a.kv_heads *
                         (a.sequences / plan.part[0].members);
  const int part = block < before ? 0 : 1;
  if (part == 1) block -= before;
  const SplitWork& work = plan.part[part];
  const int first = static_cast<int>(block % work.tiles) * Tile::kRows;
  block /= work.tiles;
  const int split = static_cast<int>(block % work.splits);
  block /= work.splits;
  const int kv_head = static_cast<int>(block % a.kv_heads);
  const int64_t sequence = block / a.kv_heads * work.members;
  const int rows = static_cast<int>(work.members * a.tokens * (a.heads / a.kv_heads));
  Tile tile;
  tile.run(a, sequence, kv_head, first, rows,
           {part, part, split * kSplitBlocks, (split + 1) * kSplitBlocks}, shared);
  const int64_t place = part == 0 ? split : plan.part[0].splits + split;
  const int64_t queries = a.sequences * a.tokens * a.heads;
  tile.leave(a, sequence, kv_head, first, rows, g.sums + place * queries * D,
             reinterpret_cast<float2*>(g.scales) + place * queries);
}

// A thread has four columns of a query.
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const RLIR_GRID_CONSTANT GroupDecode g, int splits) {
  const int chunks = static_cast<int>(g.in.depth / 4);
  const int64_t queries = g.in.sequences * g.in.tokens * g.in.heads;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t query = i / chunks, column = i % chunks * 4;
  if (query >= queries) return;
  const float2* scales = reinterpret_cast<const float2*>(g.scales) + query;
  float most = -INFINITY;
  for (int s = 0; s < splits; ++s) most = max(most, scales[s * queries].x);
  const float reference = most == -INFINITY ? 0.0f : most;
  float total = 0.0f;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int s = 0; s < splits; ++s) {
    const float2 scale = scales[s * queries];
    if (scale.y == 0.0f) continue;  // it saw nothing there, and no sums were written
    const float factor = ptx::ex2(scale.x - reference);
    const float4 x =
        *reinterpret_cast<const float4*>(g.sums + (s * queries + query) * g.in.depth + column);
    total = __fmaf_rn(factor, scale.y, total);
    sum = make_float4(__fmaf_rn(factor, x.x, sum.x), __fmaf_rn(factor, x.y, sum.y),
                      __fmaf_rn(factor, x.z, sum.z), __fmaf_rn(factor, x.w, sum.w));
  }
  uint2 out = make_uint2(0u, 0u);
  if (total != 0.0f) {
    const float inverse = 1.0f / total;
    out = make_uint2(ptx::pack_bf16(sum.x * inverse, sum.y * inverse),
                     ptx::pack_bf16(sum.z * inverse, sum.w * inverse));
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(g.out) + query * g.in.depth + column) = out;
}

template <int D>
int run_splits(const GroupDecode& g, void* stream) {
  using Tile = AttentionTile<D, 1>;
  const Attention& a = g.in;
  const int64_t rows = a.tokens * (a.heads / a.kv_heads);
  SplitPlan plan{};
  int64_t blocks = 0;
  for (int p = 0; p < 2; ++p) {
    const int64_t members = p == 0 ? a.group : 1;
    plan.part[p] = {members, static_cast<int>(ceil_div<int64_t>(members * rows, Tile::kRows)),
                    static_cast<int>(splits_of(a.part[p]))};
    blocks += plan.part[p].blocks(a);
  }
  return launch(split_kernel<D>, dim3(static_cast<unsigned>(blocks)), dim3(kAttentionThreads),
                Tile::kShared, stream, g, plan);
}

}  // namespace

int64_t group_decode_splits(const Attention& in) {
  return splits_of(in.part[0]) + splits_of(in.part[1]);
}

int group_decode_attention(const GroupDecode& args, void* stream) {
  const Attention& a = args.in;
  const int64_t splits = group_decode_splits(a);
  if (splits > 0) {
    const int error = a.depth == 32   ? run_splits<32>(args, stream)
                      : a.depth == 64 ? run_splits<64>(args, stream)
                                      : run_splits<128>(args, stream);
    if (error != 0) return error;
  }
  const int64_t threads = a.sequences * a.tokens * a.heads * (a.depth / 4);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(threads, kMergeThreads)));
  return launch(merge_kernel, grid, dim3(kMergeThreads), 0, stream, args,
                static_cast<int>(splits));
}

}  // namespace rlir::cuda
