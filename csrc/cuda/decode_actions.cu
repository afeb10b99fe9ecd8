// Why it looks like this: a warp reads a frame, lane by lane side by side: a ballot makes a bit
// mask of the held buttons, an argmax over a class vector is five shuffles, and then each lane has
// the classes of one or two factors to write. Several frames a warp, so that a block copies its
// tables once for 32 frames.
#include "cuda/decode_actions.cuh"

#include "cuda/read_action.cuh"

namespace rlir::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kFrames = 4;

template <typename Real>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const RLIR_GRID_CONSTANT DecodeActions a) {
  RLIR_SHARED(ButtonTables, tables, 1);
  copy_tables(a.heads, tables);
  const ActionHeads& h = a.heads;
  const int lane = threadIdx.x % 32, factors = h.axes + h.groups;
  for (int i = 0; i < kFrames; ++i) {
    const int64_t row =
        (static_cast<int64_t>(blockIdx.x) * kFrames + i) * kWarps + threadIdx.x / 32;
    if (row >= a.rows) return;
    const int64_t trajectory = row / a.frames, frame = row - trajectory * a.frames;
    const Classes mine = read_frame<Real>(h, *tables, trajectory, frame, lane);
    for (int f = lane; f < factors; f += 32) {
      const int found = f < 32 ? mine.first : mine.second;
      a.classes[row * factors + f] = found;
      if (f < h.axes) {
        a.degrees[row * h.axes + f] = found >= 0 ? a.centres[h.starts[f] + found] : NAN;
      }
    }
  }
}

}  // namespace

int decode_actions(const DecodeActions& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(a.rows, kWarps * kFrames)));
  const bool wide =
      a.heads.keys.dtype == Dtype::kFloat64 || a.heads.camera.dtype == Dtype::kFloat64;
  return wide ? launch(decode_kernel<double>, grid, dim3(kThreads), 0, stream, a)
              : launch(decode_kernel<float>, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace rlir::cuda
