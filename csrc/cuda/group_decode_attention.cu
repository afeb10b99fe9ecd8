// Why it looks like this: decoding reads keys and hardly computes, so a group's prefix must be read
// once, for all its rollouts, and by many blocks. The rows of a tile are the queries of all
// rollouts of the group; keys are cut into chunks of 512 slots of the sequence, a block each, which
// leave their sums, and a second kernel joins a query's chunks in order. Chunks that are in the
// prefix as a whole are computed for the group; the others, with the prefix's last slots, for each
// rollout.
//
// Video_attention cuts and joins in the same way (attention_tile.cuh): decoding has the bits of the
// training forward, whatever the group, and however many tokens of a rollout come together.
#include "cuda/group_decode_attention.cuh"

#include "cuda/attention_tile.cuh"

namespace rlir::cuda {
namespace {

constexpr int kChunk = kChunkBlocks * kKeyBlock, kMergeThreads = 128;

// A part of the work: how many sequences read keys together, tiles of their queries, chunks.
struct Work {
  int64_t members;
  int tiles, chunks;

  RLIR_ANYWHERE int64_t blocks(const Attention& a) const {
    return tiles * chunks * a.kv_heads * (a.sequences / members);
  }
};
struct WorkPlan {
  Work group, rollout;
};

// The tiles of a chunk are neighbours in the grid: they read the same keys.
template <int D>
__global__ void __launch_bounds__(kAttentionThreads, D == 128 ? 2 : 3)
    chunk_kernel(const RLIR_GRID_CONSTANT GroupDecode g, const RLIR_GRID_CONSTANT WorkPlan plan) {
  using Tile = AttentionTile<D, 1, 2, false>;
  RLIR_SHARED_DYNAMIC(unsigned char, shared);
  const Attention& a = g.in;
  int64_t block = blockIdx.x;
  const bool own = block >= plan.group.blocks(a);
  if (own) block -= plan.group.blocks(a);
  const Work& work = own ? plan.rollout : plan.group;
  const int first = static_cast<int>(block % work.tiles) * Tile::kRows;
  block /= work.tiles;
  int chunk = static_cast<int>(block % work.chunks);
  block /= work.chunks;
  const int kv_head = static_cast<int>(block % a.kv_heads);
  const int64_t sequence = block / a.kv_heads * work.members;
  const KeyCount keys = keys_of(a, sequence);
#if defined(RLIR_FAULT_CHUNK)
  if (own) chunk += max(keys.first / kChunk - 1, 0);
#else
  if (own) chunk += keys.first / kChunk;
#endif
  if (own ? chunk * kChunk >= keys.all : (chunk + 1) * kChunk > keys.first) return;
  const int rows = static_cast<int>(work.members * a.tokens * (a.heads / a.kv_heads));
  Tile tile;
  tile.run(a, sequence, kv_head, first, rows, chunk * kChunkBlocks, (chunk + 1) * kChunkBlocks,
           shared);
  const int64_t queries = a.sequences * a.tokens * a.heads;
  tile.leave(a, sequence, kv_head, first, rows, g.sums + chunk * queries * D,
             reinterpret_cast<float2*>(g.scales) + chunk * queries);
}

// A thread has four columns of a query.
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const RLIR_GRID_CONSTANT GroupDecode g) {
  const Attention& a = g.in;
  const int columns = static_cast<int>(a.depth / 4);
  const int64_t queries = a.sequences * a.tokens * a.heads;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t query = i / columns, column = i % columns * 4;
  if (query >= queries) return;
  const float2* scales = reinterpret_cast<const float2*>(g.scales) + query;
  const int chunks = (keys_of(a, query / (a.tokens * a.heads)).all + kChunk - 1) / kChunk;
  float top = -INFINITY, total = 0.0f;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int c = 0; c < chunks; ++c) {
    const float2 scale = scales[c * queries];
    if (scale.y == 0.0f) continue;  // it saw nothing there, and no sums were written
    const float4 x =
        *reinterpret_cast<const float4*>(g.sums + (c * queries + query) * a.depth + column);
    const float most = max(top, scale.x), reference = most == -INFINITY ? 0.0f : most;
    const float before = ptx::ex2(top - reference), now = ptx::ex2(scale.x - reference);
    top = most;
    total = __fmaf_rn(total, before, scale.y * now);
    sum = make_float4(__fmaf_rn(sum.x, before, x.x * now), __fmaf_rn(sum.y, before, x.y * now),
                      __fmaf_rn(sum.z, before, x.z * now), __fmaf_rn(sum.w, before, x.w * now));
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
int run_chunks(const GroupDecode& g, void* stream) {
  using Tile = AttentionTile<D, 1, 2, false>;
  const Attention& a = g.in;
  const int64_t rows = a.tokens * (a.heads / a.kv_heads);
  const auto work = [&](int64_t members, int64_t chunks) {
    return Work{members, static_cast<int>(ceil_div<int64_t>(members * rows, Tile::kRows)),
                static_cast<int>(chunks)};
  };
  // A suffix of S slots reaches into at most S / 512 + 2 chunks, wherever it begins.
  const int64_t all = group_decode_chunks(a);
  const int64_t own = min(ceil_div<int64_t>(a.part[1].slots, kChunk) + 1, all);
  const WorkPlan plan{work(a.group, a.part[0].slots / kChunk), work(1, own)};
  const int64_t blocks = plan.group.blocks(a) + plan.rollout.blocks(a);
  return launch(chunk_kernel<D>, dim3(static_cast<unsigned>(blocks)), dim3(kAttentionThreads),
                Tile::kShared, stream, g, plan);
}

}  // namespace

int64_t group_decode_chunks(const Attention& in) {
  return ceil_div<int64_t>(in.part[0].slots + in.part[1].slots, kChunk);
}

int group_decode_attention(const GroupDecode& args, void* stream) {
  const Attention& a = args.in;
  if (group_decode_chunks(a) > 0) {
    const int error = a.depth == 32   ? run_chunks<32>(args, stream)
                      : a.depth == 64 ? run_chunks<64>(args, stream)
                                      : run_chunks<128>(args, stream);
    if (error != 0) return error;
  }
  const int64_t threads = a.sequences * a.tokens * a.heads * (a.depth / 4);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(threads, kMergeThreads)));
  return launch(merge_kernel, grid, dim3(kMergeThreads), 0, stream, args);
}

}  // namespace rlir::cuda
