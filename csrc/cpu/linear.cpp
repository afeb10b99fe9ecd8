// Formulas, layout and bits: linear.h.
//
// Why not a library's product: its order of sums depends on the number of rows, so that what a
// trainer computes of a batch is not what a rollout computed of a row.
#include "cpu/linear.h"

#include "cpu/pack.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

constexpr int64_t kRowBlock = 192;  // rows whose sums stand side by side: 36 KiB with AVX-512

// Panels of nearly equal width: a last one of a single vector would waste most of a tile.
struct Panels {
  int64_t vectors, count;

  explicit Panels(int64_t outputs)
      : vectors((outputs + kWidth - 1) / kWidth), count((vectors + kVectors - 1) / kVectors) {}
  int64_t first(int64_t panel) const { return vectors * panel / count * kWidth; }
};

template <typename F>
bool in_place(const LinearProduct& p) {
  constexpr int64_t kPer = F::kPerWord;
  if (F::kSwapped || (p.rows.dtype == Dtype::kFloat32) != (kPer == 1)) return false;
  return runs_along_k(p.rows) && p.depth % kPer == 0 && p.rows.major_stride % kPer == 0 &&
         reinterpret_cast<uintptr_t>(p.rows.data) % sizeof(typename F::Word) == 0;
}

template <typename F>
int64_t panel_words(const LinearProduct& p) {
  return words_for<F>(p.depth) * kPanel;
}

template <typename F>
LinearSizes sizes_of(const LinearProduct& p) {
  const int64_t sums = (kRowBlock + kRows) * kPanel;
  return {in_place<F>(p) ? 0 : 4 * packed_row_words<F>(p.depth), Panels(p.outputs).count,
          4 * (sums + panel_words<F>(p))};
}

template <typename F>
void pack(const LinearProduct& p, int64_t begin, int64_t end) {
  pack_words<F>(static_cast<typename F::Word*>(p.packed), p.rows, begin, end, p.depth);
}

void store_sums(const LinearProduct& p, const float* sums, int64_t row, int64_t first,
                int64_t lanes) {
  float values[kPanel];
  const int64_t n = at_most(lanes, p.outputs - first), at = row * p.outputs + first;
  if (p.bias == nullptr) return store_row(p.out, p.out_dtype, at, sums, n);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store_vector(values + i, load_vector(sums + i) + load_vector(p.bias + first + i));
  }
  for (; i < n; ++i) values[i] = sums[i] + p.bias[first + i];
  store_row(p.out, p.out_dtype, at, values, n);
}

template <typename F>
void tiles(const LinearProduct& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
           int64_t panel_end, float* sums) {
  using Word = typename F::Word;
  Word* panel = reinterpret_cast<Word*>(sums + (kRowBlock + kRows) * kPanel);
  const Panels panels(p.outputs);
  const bool packed = !in_place<F>(p);
  const Word* rows = static_cast<const Word*>(packed ? p.packed : p.rows.data);
  const int64_t stride = packed ? packed_row_words<F>(p.depth) : p.rows.major_stride / F::kPerWord;
  const int64_t words = words_for<F>(p.depth);
  for (int64_t i = panel_begin; i < panel_end; ++i) {
    const int64_t first = panels.first(i), lanes = panels.first(i + 1) - first;
    pack_lanes<F>(panel, p.lanes, first, lanes, p.outputs, p.depth);
    for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
      const int64_t count = at_most(kRowBlock, row_end - row);
      panel_product<F>(sums, rows + row * stride, stride, count, panel, words,
                       static_cast<int>(lanes), false);
      for (int64_t j = 0; j < count; ++j) store_sums(p, sums + j * kPanel, row + j, first, lanes);
    }
  }
}

}  // namespace

LinearSizes linear_sizes(const LinearProduct& p) {
  return p.bfloat16 ? sizes_of<BFloat16Words>(p) : sizes_of<Plain>(p);
}

void linear_pack(const LinearProduct& p, int64_t begin, int64_t end) {
  p.bfloat16 ? pack<BFloat16Words>(p, begin, end) : pack<Plain>(p, begin, end);
}

void linear_tiles(const LinearProduct& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                  int64_t panel_end, void* scratch) {
  float* sums = static_cast<float*>(scratch);
  p.bfloat16 ? tiles<BFloat16Words>(p, row_begin, row_end, panel_begin, panel_end, sums)
             : tiles<Plain>(p, row_begin, row_end, panel_begin, panel_end, sums);
}

void linear_bias(const Matrix& dy, int64_t rows, int64_t columns, float* db, int64_t begin,
                 int64_t end) {
  for (int64_t first = begin; first < end; first += kWidth) {
    double total[kWidth] = {};
    for (int64_t n = 0; n < rows; n += kLinearChain) {
      Vf sum = {};
      const int64_t last = at_most(n + kLinearChain, rows);
      for (int64_t row = n; row < last; ++row) {
        sum += values_across(dy, first, columns, row, rows);
      }
      for (int i = 0; i < kWidth; ++i) total[i] += static_cast<double>(sum[i]);
    }
    const int64_t count = at_most(kWidth, columns - first);
    for (int64_t i = 0; i < count; ++i) db[first + i] = static_cast<float>(total[i]);
  }
}

}  // namespace rlir::cpu::RLIR_ISA
