// Formulas, layout and bits: linear.h.
//
// Why not a library's product: its order of sums depends on the number of rows, so that what a
// trainer computes of a batch is not what a rollout computed of a row.
#include "cpu/linear.h"

#include "cpu/pack.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

constexpr int64_t kRowBlock = 12 * kRows;   // rows at a time where a panel outgrows the L2 cache
constexpr int64_t kL2Words = 128 * 1024;    // what of the L2 cache a panel may take
constexpr int64_t kGroupWords = 96 * 1024;  // what panels that are packed together take

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

// Panels that a task packs at a time: rows are brought from memory once for all of them.
template <typename F>
int64_t group_panels(const LinearProduct& p) {
  const int64_t words = panel_words<F>(p);
  return p.count <= kRowBlock || words * 2 > kGroupWords ? 1
                                                         : kGroupWords / (words > 0 ? words : 1);
}

template <typename F>
LinearSizes sizes_of(const LinearProduct& p) {
  const int64_t sums = (kRowBlock + kRows) * kPanel;
  return {in_place<F>(p) ? 0 : 4 * packed_row_words<F>(p.depth), Panels(p.outputs).count,
          4 * (sums + at_most(group_panels<F>(p), Panels(p.outputs).count) * panel_words<F>(p))};
}

template <typename F>
void pack(const LinearProduct& p, int64_t begin, int64_t end) {
  pack_words<F>(static_cast<typename F::Word*>(p.packed), p.rows, begin, end, p.depth);
}

// The lines that `lanes` results of a row will go to, on their way while these are computed: rows
// are far apart, and a store that misses holds up those behind it.
inline void ask_for_results(const LinearProduct& p, int64_t row, int64_t first, int64_t lanes) {
  if (p.turned) return;
  const int64_t size = p.out_dtype == Dtype::kFloat32 ? 4 : 2;
  const char* from = static_cast<const char*>(p.out) + (row * p.outputs + first) * size;
  const int64_t last = at_most(lanes, p.outputs - first) * size - 1;
  for (int64_t i = 0; i < last; i += 64) __builtin_prefetch(from + i, 1, 3);
  __builtin_prefetch(from + last, 1, 3);
}

void store_sums(const LinearProduct& p, const float* sums, int64_t row, int64_t first,
                int64_t lanes) {
  float values[kPanel];
  if (p.turned) {
    for (int64_t i = 0; i < at_most(lanes, p.outputs - first); ++i) {
      const float value = p.bias == nullptr ? sums[i] : sums[i] + p.bias[row];
      store_row(p.out, p.out_dtype, (first + i) * p.count + row, &value, 1);
    }
    return;
  }
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
  Word* packed = reinterpret_cast<Word*>(sums + (kRowBlock + kRows) * kPanel);
  const Panels panels(p.outputs);
  const bool copied = !in_place<F>(p);
  const Word* rows = static_cast<const Word*>(copied ? p.packed : p.rows.data);
  const int64_t stride = copied ? packed_row_words<F>(p.depth) : p.rows.major_stride / F::kPerWord;
  const int64_t words = words_for<F>(p.depth), size = panel_words<F>(p);
  const int64_t group = group_panels<F>(p), step = size > kL2Words ? kRowBlock : kRows;
  for (int64_t from = panel_begin; from < panel_end; from += group) {
    const int64_t to = at_most(from + group, panel_end);
    for (int64_t i = from; i < to; ++i) {
      const int64_t first = panels.first(i);
      pack_lanes<F>(packed + (i - from) * size, p.lanes, first, panels.first(i + 1) - first,
                    p.outputs, p.depth);
    }
    for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
      const int64_t end = at_most(row + kRowBlock, row_end);
      for (int64_t i = from; i < to; ++i) {
        const int64_t first = panels.first(i), lanes = panels.first(i + 1) - first;
        for (int64_t j = row; j < end; j += step) {
          const int64_t count = at_most(step, end - j);
          for (int64_t n = 0; n < count; ++n) ask_for_results(p, j + n, first, lanes);
          panel_product<F>(sums, rows + j * stride, stride, count, packed + (i - from) * size,
                           words, static_cast<int>(lanes), false);
          for (int64_t n = 0; n < count; ++n) store_sums(p, sums + n * kPanel, j + n, first, lanes);
        }
      }
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
