// Formula and layout: group_advantage.h. Compiled once per instruction set, RLIR_ISA names it.
//
// Why one kernel: eager PyTorch takes about ten passes and launches over a few hundred bytes,
// and needs a padded copy for groups of unequal size. Here a group is gathered once into
// `values`, and everything else happens in the L1 cache.
//
// Why the same bits everywhere: the rewards that count are packed first, element i of the packed
// group goes to accumulator i mod 16, and the accumulators fold in a fixed tree. Neither the
// width of the vectors, nor other groups, threads or masked rows change that order, and the build
// forbids contraction into fused multiply-adds. All arithmetic is in double: next to the gather
// it costs little, and float32 results are as good as correctly rounded.
//
// No standard library here: its templates would leave weak symbols per instruction set.
#include "cpu/group_advantage.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

// Vectors of the compiler: it splits them into registers of the instruction set.
constexpr int64_t kLanes = kGroupAdvantageLanes;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));
typedef double Lanes8 __attribute__((vector_size(8 * sizeof(double))));
typedef double Lanes4 __attribute__((vector_size(4 * sizeof(double))));
static_assert(kLanes == 16);

struct Halves16 {
  Lanes8 low, high;
};
struct Halves8 {
  Lanes4 low, high;
};

inline double fold(const Lanes& lanes) {
  const Halves16 a = __builtin_bit_cast(Halves16, lanes);
  const Halves8 b = __builtin_bit_cast(Halves8, a.low + a.high);
  const Lanes4 c = b.low + b.high;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

inline Lanes lanes_at(const double* x) {
  Lanes v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Zeros up to a whole number of lanes: a sum over them needs no special end.
inline void pad(double* x, int64_t n) {
  for (int64_t i = n; i < padded(n); ++i) x[i] = 0.0;
}

inline double sum(const double* x, int64_t n) {
  Lanes total = {};
  for (int64_t i = 0; i < padded(n); i += kLanes) total += lanes_at(x + i);
  return fold(total);
}

inline double sum_of_squares(const double* x, int64_t n) {
  Lanes total = {};
  for (int64_t i = 0; i < padded(n); i += kLanes) total += lanes_at(x + i) * lanes_at(x + i);
  return fold(total);
}

inline void subtract(double* x, int64_t n, double value) {
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    const Lanes v = lanes_at(x + i) - value;
    __builtin_memcpy(x + i, &v, sizeof v);
  }
  pad(x, n);
}

// Makes `x` deviations from its mean; returns the standard deviation. The rounding error of the
// mean shows up as the mean of the deviations and is taken out (the corrected two-pass
// algorithm), so that a large common offset costs no digits.
double center(double* x, int64_t n, bool unbiased) {
  const double count = static_cast<double>(n);
  pad(x, n);
  subtract(x, n, sum(x, n) / count);
  subtract(x, n, sum(x, n) / count);
  const int64_t freedom = n - (unbiased ? 1 : 0);
  return freedom > 0 ? __builtin_sqrt(sum_of_squares(x, n) / static_cast<double>(freedom)) : 0.0;
}

int64_t rows_of(const GroupAdvantage& a, int64_t group) {
  return a.offsets == nullptr ? a.group_size : a.offsets[group + 1] - a.offsets[group];
}

// Appends the rewards of a group that count, and their rows; returns how many there are.
template <typename T, typename Skipped>
int64_t gather(const GroupAdvantage& a, int64_t group, double* values, int64_t* rows,
               Skipped skipped) {
  const T* rewards = static_cast<const T*>(a.rewards);
  const int64_t size = rows_of(a, group);
  int64_t count = 0;
  for (int64_t j = 0; j < size; ++j) {
    int64_t row, reward_at, mask_at;
    if (a.offsets == nullptr) {
      row = group * a.group_size + j;
      reward_at = group * a.reward_group_stride + j * a.reward_stride;
      mask_at = group * a.mask_group_stride + j * a.mask_stride;
    } else {
      const int64_t position = a.offsets[group] + j;
      row = a.order == nullptr ? position : a.order[position];
      reward_at = row * a.reward_stride;
      mask_at = row * a.mask_stride;
    }
    const double reward = load(rewards + reward_at);
    const bool finite = reward - reward == 0.0;
    if (finite && (a.mask == nullptr || a.mask[mask_at])) {
      values[count] = reward;
      rows[count++] = row;
    } else {
      skipped(row);
    }
  }
  return count;
}

// The common case of `gather`: rows that lie side by side, without mask, and all finite. Returns
// the first of them, or -1 where that does not hold.
template <typename T>
int64_t gather_whole(const GroupAdvantage& a, int64_t group, double* values) {
  if (a.mask != nullptr || a.order != nullptr || a.reward_stride != 1) return -1;
  const bool equal_groups = a.offsets == nullptr;
  const int64_t row = equal_groups ? group * a.group_size : a.offsets[group];
  const T* rewards =
      static_cast<const T*>(a.rewards) + (equal_groups ? group * a.reward_group_stride : row);
  const int64_t size = rows_of(a, group);
  for (int64_t j = 0; j < size; ++j) values[j] = load(rewards + j);
  pad(values, size);
  Lanes zeros = {};  // NaN where a reward is not finite
  for (int64_t i = 0; i < padded(size); i += kLanes) {
    zeros += lanes_at(values + i) - lanes_at(values + i);
  }
  return fold(zeros) == 0.0 ? row : -1;
}

inline bool all_equal(const double* x, int64_t n) {
  int differs = 0;
  for (int64_t i = 1; i < n; ++i) differs |= x[i] != x[0];
  return differs == 0;
}

// Rewards that count, in `x`, become advantages.
void advantages_of(const GroupAdvantage& a, double* x, int64_t n) {
  const double own = center(x, n, a.unbiased);
  const double deviation = a.scale == AdvantageScale::kGroup ? own : a.batch_deviation;
  const double divisor = a.scale == AdvantageScale::kNone ? 1.0 : deviation + a.eps;
  if (a.leave_one_out) {  // r_i - (S - r_i) / (n - 1) = (r_i - S / n) n / (n - 1)
    const double factor = static_cast<double>(n) / static_cast<double>(n - 1);
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
  }
  if (divisor > 0.0) {
    for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
  } else {  // eps = 0 and squares that underflow: differences below 1e-162
    for (int64_t i = 0; i < n; ++i) x[i] = 0.0;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double low = x[i] < -a.clip ? -a.clip : x[i];
    x[i] = low > a.clip ? a.clip : low;
  }
}

inline Lanes convert(const double* x) { return lanes_at(x); }
inline Lanes convert(const float* x) {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  Floats v;
  __builtin_memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, Lanes);
}
template <typename T>
inline Lanes convert(const T* x) {
  double wide[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = load(x + i);
  return lanes_at(wide);
}

inline void store_lanes(double* out, const Lanes& x) { __builtin_memcpy(out, &x, sizeof x); }
inline void store_lanes(float* out, const Lanes& x) {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  const Floats v = __builtin_convertvector(x, Floats);
  __builtin_memcpy(out, &v, sizeof v);
}
template <typename T>
inline void store_lanes(T* out, const Lanes& x) {
  for (int64_t i = 0; i < kLanes; ++i) store(out + i, x[i]);
}

// A group of 16 or 32 rows that lie side by side, in registers; the same bits as the general way.
// Returns false, having done nothing, where a reward is not finite, the sum overflows, or it is 0
// (then signs of zeros would need a look). Sums of 16 or 32 equal rewards are exact, so that their
// deviations are 0.
template <int kVectors, typename T>
inline bool run_whole(const GroupAdvantage& a, const T* rewards, T* advantages) {
  constexpr double kCount = kVectors * static_cast<double>(kLanes);
  static_assert(kVectors == 1 || kVectors == 2);
  Lanes x[kVectors], total = {};
  const auto sum_up = [&] {
    total = x[0];
    if constexpr (kVectors == 2) total += x[1];
    return fold(total);
  };
  for (int v = 0; v < kVectors; ++v) x[v] = convert(rewards + v * kLanes);
  const double all = sum_up();
  if (all == 0.0 || all - all != 0.0) return false;
  for (Lanes& v : x) v -= all / kCount;
  const double error = sum_up() / kCount;
  for (Lanes& v : x) v -= error;
  double deviation = a.batch_deviation;
  if (a.scale == AdvantageScale::kGroup) {
    total = x[0] * x[0];
    if constexpr (kVectors == 2) total += x[1] * x[1];
    deviation = __builtin_sqrt(fold(total) / (a.unbiased ? kCount - 1.0 : kCount));
  }
  const double divisor = a.scale == AdvantageScale::kNone ? 1.0 : deviation + a.eps;
  if (a.leave_one_out) {
    for (Lanes& v : x) v *= kCount / (kCount - 1.0);
  }
  const Lanes zero = {}, low = zero - a.clip, high = zero + a.clip;
  for (int v = 0; v < kVectors; ++v) {
    Lanes y = divisor > 0.0 ? x[v] / divisor : zero;
    y = y < low ? low : y;
    store_lanes(advantages + v * kLanes, y > high ? high : y);
  }
  return true;
}

template <typename T>
inline bool run_whole(const GroupAdvantage& a, int64_t group, T* advantages) {
  if (a.mask != nullptr || a.offsets != nullptr || a.reward_stride != 1) return false;
  const T* from = static_cast<const T*>(a.rewards) + group * a.reward_group_stride;
  T* to = advantages + group * a.group_size;
  if (a.group_size == kLanes) return run_whole<1>(a, from, to);
  return a.group_size == 2 * kLanes && run_whole<2>(a, from, to);
}

template <typename T>
void run(const GroupAdvantage& a, int64_t begin, int64_t end, double* values, int64_t* rows) {
  T* advantages = static_cast<T*>(a.advantages);
  const auto zero = [advantages](int64_t row) { store(advantages + row, 0.0); };
  for (int64_t group = begin; group < end; ++group) {
    if (run_whole(a, group, advantages)) continue;
    const int64_t first = gather_whole<T>(a, group, values);
    const int64_t n = first >= 0 ? rows_of(a, group) : gather<T>(a, group, values, rows, zero);
    // Rounding would turn equal rewards into noise and eps = 0 would blow it up: exact zeros.
    if (all_equal(values, n)) {
      for (int64_t i = 0; i < n; ++i) values[i] = 0.0;
    } else {
      advantages_of(a, values, n);
    }
    if (first >= 0) {
      for (int64_t i = 0; i < n; ++i) store(advantages + first + i, values[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) store(advantages + rows[i], values[i]);
    }
  }
}

template <typename T>
double deviation_of_all(const GroupAdvantage& a, int64_t groups, double* values, int64_t* rows) {
  int64_t n = 0;
  for (int64_t group = 0; group < groups; ++group) {
    n += gather<T>(a, group, values + n, rows + n, [](int64_t) {});
  }
  return n == 0 ? 0.0 : center(values, n, a.unbiased);
}

}  // namespace

void group_advantage(const GroupAdvantage& a, int64_t begin, int64_t end, double* values,
                     int64_t* rows) {
  switch (a.dtype) {
    case Dtype::kFloat64:
      return run<double>(a, begin, end, values, rows);
    case Dtype::kFloat32:
      return run<float>(a, begin, end, values, rows);
    case Dtype::kBFloat16:
      return run<BFloat16>(a, begin, end, values, rows);
    case Dtype::kFloat16:
      return run<Float16>(a, begin, end, values, rows);
  }
}

double batch_deviation(const GroupAdvantage& a, int64_t groups, double* values, int64_t* rows) {
  switch (a.dtype) {
    case Dtype::kFloat64:
      return deviation_of_all<double>(a, groups, values, rows);
    case Dtype::kFloat32:
      return deviation_of_all<float>(a, groups, values, rows);
    case Dtype::kBFloat16:
      return deviation_of_all<BFloat16>(a, groups, values, rows);
    case Dtype::kFloat16:
      return deviation_of_all<Float16>(a, groups, values, rows);
  }
  return 0.0;
}

}  // namespace rlir::cpu::RLIR_ISA
