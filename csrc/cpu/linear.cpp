// Formulas, layout and bits: linear.h.
//
// Why not a library's product: its order of sums depends on the number of rows, so that what a
// trainer computes of a batch is not what a rollout computed of a row.
#include "cpu/linear.h"

#include "cpu/pack.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

// Words of the L2 cache that packed panels may take: as many go together as fit, so that a row is
// brought from memory once for all of them. A panel that is larger goes alone, kRowBlock rows at a
// time through a part of it (kDepth of cpu/product.h).
constexpr int64_t kL2Words = 128 * 1024;
constexpr int64_t kRowBlock = 12 * kRows;
static_assert(kRowBlock % kRowPad == 0);

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

// Panels that a task packs at a time; one where there are few rows to go through them.
template <typename F>
int64_t group_panels(const LinearProduct& p) {
  const int64_t words = panel_words<F>(p);
  return p.count <= kRowBlock || 2 * words > kL2Words ? 1 : kL2Words / (words > 0 ? words : 1);
}

template <typename F>
LinearSizes sizes_of(const LinearProduct& p) {
  const int64_t sums = (kRowBlock + kRowPad) * kPanel;
  return {in_place<F>(p) ? 0 : 4 * packed_row_words<F>(p.depth), Panels(p.outputs).count,
          4 * (sums + at_most(group_panels<F>(p), Panels(p.outputs).count) * panel_words<F>(p))};
}

template <typename F>
void pack(const LinearProduct& p, int64_t begin, int64_t end) {
  pack_words<F>(static_cast<typename F::Word*>(p.packed), p.rows, begin, end, p.depth);
}

template <bool kFloat>
void store_rows(const LinearProduct& p, const float* sums, int64_t row, int64_t count,
                int64_t first, int64_t lanes) {
  constexpr Dtype kDtype = kFloat ? Dtype::kFloat32 : Dtype::kBFloat16;
  const int64_t n = at_most(lanes, p.outputs - first);
  for (int64_t j = 0; j < count; ++j) {
    const float* from = sums + j * kPanel;
    const int64_t at = (row + j) * p.outputs + first;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Vf value = load_vector(from + i);
      const Vf out = p.bias == nullptr ? value : value + load_vector(p.bias + first + i);
      store_values(p.out, kDtype, at + i, out);
    }
    for (; i < n; ++i) {
      const float value = p.bias == nullptr ? from[i] : from[i] + p.bias[first + i];
      store_row(p.out, kDtype, at + i, &value, 1);
    }
  }
}

void store_turned(const LinearProduct& p, const float* sums, int64_t row, int64_t count,
                  int64_t first, int64_t lanes) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < at_most(lanes, p.outputs - first); ++i) {
      const float sum = sums[j * kPanel + i];
      const float value = p.bias == nullptr ? sum : sum + p.bias[row + j];
      store_row(p.out, p.out_dtype, (first + i) * p.count + row + j, &value, 1);
    }
  }
}

template <typename F>
void tiles(const LinearProduct& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
           int64_t panel_end, float* sums) {
  using Word = typename F::Word;
  const ProductScope<F> scope;
  Word* packed = reinterpret_cast<Word*>(sums + (kRowBlock + kRowPad) * kPanel);
  const Panels panels(p.outputs);
  const auto store = p.turned                         ? store_turned
                     : p.out_dtype == Dtype::kFloat32 ? store_rows<true>
                                                      : store_rows<false>;
  const bool copied = !in_place<F>(p);
  const Word* rows = static_cast<const Word*>(copied ? p.packed : p.rows.data);
  const int64_t stride = copied ? packed_row_words<F>(p.depth) : p.rows.major_stride / F::kPerWord;
  const int64_t words = words_for<F>(p.depth), size = panel_words<F>(p);
  const int64_t group = group_panels<F>(p), block = size > kL2Words ? kRowBlock : kRowPad;
  for (int64_t from = panel_begin; from < panel_end; from += group) {
    const int64_t to = at_most(from + group, panel_end);
    for (int64_t i = from; i < to; ++i) {
      const int64_t first = panels.first(i);
      pack_lanes<F>(packed + (i - from) * size, p.lanes, first, panels.first(i + 1) - first,
                    p.outputs, p.depth);
    }
    for (int64_t row = row_begin; row < row_end; row += block) {
      const int64_t count = at_most(block, row_end - row);
      for (int64_t i = from; i < to; ++i) {
        const int64_t first = panels.first(i), lanes = panels.first(i + 1) - first;
        panel_product<F>(sums, rows + row * stride, stride, count, packed + (i - from) * size,
                         words, static_cast<int>(lanes), false);
        store(p, sums, row, count, first, lanes);
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
    for (int64_t row = 0; row < rows; ++row) {
      const Vf values = values_across(dy, first, columns, row, rows);
      for (int i = 0; i < kWidth; ++i) total[i] += static_cast<double>(values[i]);
    }
    const int64_t count = at_most(kWidth, columns - first);
    for (int64_t i = 0; i < count; ++i) db[first + i] = static_cast<float>(total[i]);
  }
}

}  // namespace rlir::cpu::RLIR_ISA
