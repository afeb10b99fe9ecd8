// Formula and layout: policy_loss.h. Compiled once per instruction set, RLIR_ISA names it.
//
// Why one kernel: eager PyTorch makes about twenty passes forward and as many backward, each over
// all tokens. Here a block of a row is read once, and loss and statistics come from the same
// registers; the backward pass reads it once more and computes the ratio again, which costs less
// than to write it and read it back. At sequence level the ratio belongs to a whole row, so the
// forward pass reads a row twice (the second time from the cache).
//
// Why the same bits everywhere: token i of a row goes to accumulator i mod 16 in every build; a
// block's accumulators are added to those of the row, in double; these fold in a fixed tree; and
// exp is our own (core/exp.h). The build forbids contraction.
//
// No standard library here: its templates would leave weak symbols per instruction set.
// This file is longer than most: forward and backward share the arithmetic of a token.
#include "cpu/policy_loss.h"

#include "cpu/policy_loss_token.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kBlock = 256;  // tokens: a block's inputs stay in the L1 cache

template <typename S, typename T>
void widen(const S* in, int64_t stride, int64_t n, T* out) {
  if (stride == 0) {
    const T x = static_cast<T>(load(in));
    for (int64_t i = 0; i < n; ++i) out[i] = x;
  } else if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(load(in + i));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(load(in + i * stride));
  }
}

// A native vector of tokens, and of their mask.
template <typename T>
inline typename Simd<T>::Vector vector_at(const T* x) {
  typename Simd<T>::Vector v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

template <typename T>
inline typename Simd<T>::Int mask_at(const uint8_t* mask) {
  return widen_bytes<T>(mask) != 0;
}

template <typename T>
inline bool is_dtype(Dtype dtype) {
  return dtype == (sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32);
}

// n elements of a row from `column`, as T: where they lie, if they can be read in whole lanes, or
// in `scratch` with zeros behind them.
template <typename T>
const T* fetch(const PolicyLoss::Matrix& m, int64_t row, int64_t column, int64_t n, T* scratch) {
  const int64_t at = row * m.row_stride + column * m.stride;
  if (is_dtype<T>(m.dtype) && m.stride == 1 && n == kBlock) {
    return static_cast<const T*>(m.data) + at;
  }
  switch (m.dtype) {
    case Dtype::kFloat64:
      widen(static_cast<const double*>(m.data) + at, m.stride, n, scratch);
      break;
    case Dtype::kFloat32:
      widen(static_cast<const float*>(m.data) + at, m.stride, n, scratch);
      break;
    case Dtype::kBFloat16:
      widen(static_cast<const BFloat16*>(m.data) + at, m.stride, n, scratch);
      break;
    case Dtype::kFloat16:
      widen(static_cast<const Float16*>(m.data) + at, m.stride, n, scratch);
      break;
  }
  for (int64_t i = n; i < kBlock; ++i) scratch[i] = T(0);
  return scratch;
}

template <typename T>
struct Scratch {
  T p[kBlock], o[kBlock], a[kBlock], q[kBlock], u[kBlock];
  uint8_t mask[kBlock];
};

// A block's inputs; those that are absent are null.
template <typename T>
struct Block {
  const T *p, *o, *a, *q, *u;
  const uint8_t* mask;

  Block(const PolicyLoss& f, int64_t row, int64_t column, int64_t n, Scratch<T>* s) {
    p = fetch(f.logprob, row, column, n, s->p);
    o = fetch(f.old_logprob, row, column, n, s->o);
    if (f.advantages.stride != 0 || column == 0) {  // one a row: of the first block
      a = fetch(f.advantages, row, column, f.advantages.stride == 0 ? kBlock : n, s->a);
    } else {
      a = s->a;
    }
    q = f.ref_logprob.data == nullptr ? nullptr : fetch(f.ref_logprob, row, column, n, s->q);
    u = f.rollout_logprob.data == nullptr ? nullptr
                                          : fetch(f.rollout_logprob, row, column, n, s->u);
    mask = fetch_mask(f, row, column, n, s->mask);
  }

  static const uint8_t* fetch_mask(const PolicyLoss& f, int64_t row, int64_t column, int64_t n,
                                   uint8_t* scratch) {
    const uint8_t* in = nullptr;
    if (f.mask != nullptr) {
      in = reinterpret_cast<const uint8_t*>(f.mask) + row * f.mask_row_stride +
           column * f.mask_stride;
      if (f.mask_stride == 1 && n == kBlock) return in;
    }
    for (int64_t i = 0; i < n; ++i) scratch[i] = in == nullptr ? 1 : in[i * f.mask_stride];
    for (int64_t i = n; i < kBlock; ++i) scratch[i] = 0;
    return scratch;
  }
};

// Sums over a block: lane i of vector j is accumulator j * S::kLanes + i, of 16.
template <typename T>
struct Sums {
  using V = typename Simd<T>::Vector;
  using I = typename Simd<T>::Int;
  static constexpr int kVectors = kLanes / Simd<T>::kLanes;
  V gain[kVectors] = {}, kl[kVectors] = {}, log_ratio[kVectors] = {}, weight[kVectors] = {};
  V ratio[kVectors] = {}, square[kVectors] = {}, slope[kVectors] = {};
  I tokens[kVectors] = {}, truncated[kVectors] = {}, clipped_low[kVectors] = {};
  I clipped_high[kVectors] = {}, clipped_delta[kVectors] = {}, outside[kVectors] = {};
};

template <typename T, typename Vector>
void add_lanes(const Vector* from, double* to) {
  constexpr int kPart = sizeof(Vector) / sizeof(T);
  for (int j = 0; j < kLanes / kPart; ++j) {
    for (int i = 0; i < kPart; ++i) to[j * kPart + i] += static_cast<double>(from[j][i]);
  }
}

double fold(double* x) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  }
  return x[0];
}

template <typename T>
struct Row {
  using V = typename Simd<T>::Vector;
  using I = typename Simd<T>::Int;
  using Word = typename Simd<T>::Word;
  double gain[kLanes] = {}, kl[kLanes] = {}, log_ratio[kLanes] = {}, weight[kLanes] = {};
  double ratio[kLanes] = {}, square[kLanes] = {}, slope[kLanes] = {};
  double tokens[kLanes] = {}, truncated[kLanes] = {}, clipped_low[kLanes] = {};
  double clipped_high[kLanes] = {}, clipped_delta[kLanes] = {}, outside[kLanes] = {};
  V lowest = splat(static_cast<T>(__builtin_inf())), highest = -lowest;
  I broken = {};  // a NaN ratio

  void add(const Sums<T>& s) {
    add_lanes<T>(s.gain, gain);
    add_lanes<T>(s.kl, kl);
    add_lanes<T>(s.log_ratio, log_ratio);
    add_lanes<T>(s.weight, weight);
    add_lanes<T>(s.ratio, ratio);
    add_lanes<T>(s.square, square);
    add_lanes<T>(s.slope, slope);
    add_lanes<Word>(s.tokens, tokens);
    add_lanes<Word>(s.truncated, truncated);
    add_lanes<Word>(s.clipped_low, clipped_low);
    add_lanes<Word>(s.clipped_high, clipped_high);
    add_lanes<Word>(s.clipped_delta, clipped_delta);
    add_lanes<Word>(s.outside, outside);
  }
};

template <typename T>
struct Kernel {
  using S = Simd<T>;
  using V = typename S::Vector;
  using I = typename S::Int;
  static constexpr int kVectors = kLanes / S::kLanes;

  const PolicyLoss& f;
  const Token<T> token;
  Scratch<T> scratch;

  explicit Kernel(const PolicyLoss& args) : f(args), token(args) {}

  // `shared`: the ratio of the row, at sequence level.
  template <bool kSequence>
  void block(const Block<T>& b, int64_t n, V shared, Row<T>* row) {
    Sums<T> s;
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int j = 0; j < kVectors; ++j) {
        const int64_t k = i + j * S::kLanes;
        const I m = mask_at<T>(b.mask + k);
        const V zero = token.zero, p = vector_at(b.p + k), o = vector_at(b.o + k);
        const V a = vector_at(b.a + k), l = p - o;
        const V c = kSequence ? shared : exp_of<T>(l).exp;
        V gain = token.gain(c, a, p), v = token.one;
        if (b.u != nullptr) {
          I cut;
          v = token.importance(o, vector_at(b.u + k), &cut);
          gain = a == zero ? zero : gain * v;
          s.weight[j] += m ? v : zero;
          s.truncated[j] -= m & cut;
        }
        s.gain[j] += m ? gain : zero;
        if (b.q != nullptr) {
          V kl = token.kl(p, vector_at(b.q + k));
          if (f.kl_importance) kl = kl * c;
          s.kl[j] += m ? kl : zero;
        }
        s.tokens[j] -= m;
        s.log_ratio[j] += m ? l : zero;
        const I below = c<token.low, above = c> token.high;
        s.clipped_low[j] -= m & below & (a < zero);
        s.clipped_high[j] -= m & above & (a > zero);
        s.clipped_delta[j] -= m & (c > token.delta) & (a < zero);
        s.outside[j] -= m & (below | above);
        if constexpr (kSequence) {
          if (!f.cispo) s.slope[j] += m & (a != zero) ? token.slope(c, a) * v : zero;
        } else {
          const V r = m ? c : zero;
          s.ratio[j] += r;
          s.square[j] += r * r;
          row->lowest = m & (c < row->lowest) ? c : row->lowest;
          row->highest = m & (c > row->highest) ? c : row->highest;
          row->broken |= m & (c != c);
        }
      }
    }
    row->add(s);
  }

  // Tokens that count and the mean of their log-ratios.
  double mean_log_ratio(int64_t r) {
    double total[kLanes] = {}, count[kLanes] = {};
    for (int64_t t = 0; t < f.columns; t += kBlock) {
      const int64_t n = f.columns - t < kBlock ? f.columns - t : kBlock;
      const T* p = fetch(f.logprob, r, t, n, scratch.p);
      const T* o = fetch(f.old_logprob, r, t, n, scratch.o);
      const uint8_t* mask = Block<T>::fetch_mask(f, r, t, n, scratch.mask);
      V sum[kVectors] = {};
      I tokens[kVectors] = {};
      for (int64_t i = 0; i < n; i += kLanes) {
        for (int j = 0; j < kVectors; ++j) {
          const int64_t k = i + j * S::kLanes;
          const I m = mask_at<T>(mask + k);
          sum[j] += m ? vector_at(p + k) - vector_at(o + k) : token.zero;
          tokens[j] -= m;
        }
      }
      add_lanes<T>(sum, total);
      add_lanes<typename S::Word>(tokens, count);
    }
    const double n = fold(count);
    return fold(total) / (n > 1.0 ? n : 1.0);
  }

  template <bool kSequence>
  PolicyLossRow forward(int64_t r) {
    V shared = {};
    if (kSequence) shared = exp_of<T>(splat(static_cast<T>(mean_log_ratio(r)))).exp;
    Row<T> row;
    for (int64_t t = 0; t < f.columns; t += kBlock) {
      const int64_t n = f.columns - t < kBlock ? f.columns - t : kBlock;
      block<kSequence>(Block<T>(f, r, t, n, &scratch), n, shared, &row);
    }
    PolicyLossRow out;
    out.tokens = fold(row.tokens);
    out.gain = fold(row.gain);
    out.kl = fold(row.kl);
    out.log_ratio = fold(row.log_ratio);
    out.weight = fold(row.weight);
    out.truncated = fold(row.truncated);
    out.ratio = fold(row.ratio);
    out.square = fold(row.square);
    out.clipped_low = fold(row.clipped_low);
    out.clipped_high = fold(row.clipped_high);
    out.clipped_delta = fold(row.clipped_delta);
    out.outside = fold(row.outside);
    out.slope = kSequence ? fold(row.slope) : 0.0;
    out.lowest = __builtin_inf();
    out.highest = -__builtin_inf();
    for (int i = 0; i < S::kLanes; ++i) {
      if (row.lowest[i] < out.lowest) out.lowest = row.lowest[i];
      if (row.highest[i] > out.highest) out.highest = row.highest[i];
      if (row.broken[i] != 0) out.lowest = out.highest = __builtin_nan("");
    }
    finish_row(f, static_cast<double>(shared[0]), &out);
    return out;
  }

  void backward(int64_t r, double scale, double slope, double ratio, T* gradient, int64_t t,
                int64_t n) {
    const Block<T> b(f, r, t, n, &scratch);
    const V all = splat(static_cast<T>(scale)), of_row = splat(static_cast<T>(slope));
    const V shared = splat(static_cast<T>(ratio));
    const V kl_weight = splat(static_cast<T>(f.kl_weight));
    const bool has_kl = b.q != nullptr && f.kl_weight != 0.0;
    const bool by_row = f.sequence && !f.cispo;
    for (int64_t i = 0; i < n; i += S::kLanes) {
      const I m = mask_at<T>(b.mask + i);
      const V zero = token.zero, p = vector_at(b.p + i), o = vector_at(b.o + i);
      const V c = f.sequence ? shared : exp_of<T>(p - o).exp;
      V g = of_row;  // 0 at token level
      if (!by_row) {
        const V a = vector_at(b.a + i);
        V d = f.cispo ? (a == zero ? zero : token.at_most_high(c) * a) : token.slope(c, a);
        if (b.u != nullptr) {
          I cut;
          const V v = token.importance(o, vector_at(b.u + i), &cut);
          d = a == zero ? zero : d * v;
        }
        g -= d;
      }
      if (has_kl) {
        const V q = vector_at(b.q + i);
        V d = token.kl_slope(p, q);
        if (f.kl_importance) {
          if (!f.sequence) d += token.kl(p, q);
          d = d * c;
        }
        g += kl_weight * d;
      }
      g = m ? g * all : zero;
      __builtin_memcpy(gradient + i, &g, sizeof g);
    }
  }
};

template <typename T>
void put(const T* from, int64_t n, Dtype dtype, void* to, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat64:
      for (int64_t i = 0; i < n; ++i) store(static_cast<double*>(to) + at + i, from[i]);
      break;
    case Dtype::kFloat32:
      for (int64_t i = 0; i < n; ++i) store(static_cast<float*>(to) + at + i, from[i]);
      break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < n; ++i) store(static_cast<BFloat16*>(to) + at + i, from[i]);
      break;
    case Dtype::kFloat16:
      for (int64_t i = 0; i < n; ++i) store(static_cast<Float16*>(to) + at + i, from[i]);
      break;
  }
}

template <typename T>
void run(const PolicyLoss& f, int64_t begin, int64_t end, PolicyLossRow* out) {
  Kernel<T> kernel(f);
  for (int64_t r = begin; r < end; ++r) {
    out[r] = f.sequence ? kernel.template forward<true>(r) : kernel.template forward<false>(r);
  }
}

template <typename T>
void run_backward(const PolicyLoss& f, int64_t begin, int64_t end, const double* scales,
                  const double* slopes, const double* ratios, void* gradient) {
  Kernel<T> kernel(f);
  T values[kBlock];
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t t = 0; t < f.columns; t += kBlock) {
      const int64_t n = f.columns - t < kBlock ? f.columns - t : kBlock;
      kernel.backward(r, scales[r], slopes[r], ratios[r], values, t, n);
      put(values, n, f.logprob.dtype, gradient, r * f.columns + t);
    }
  }
}

}  // namespace

void policy_loss(const PolicyLoss& f, int64_t begin, int64_t end, PolicyLossRow* out) {
  return f.float64 ? run<double>(f, begin, end, out) : run<float>(f, begin, end, out);
}

void policy_loss_backward(const PolicyLoss& f, int64_t begin, int64_t end, const double* scales,
                          const double* slopes, const double* ratios, void* gradient) {
  return f.float64 ? run_backward<double>(f, begin, end, scales, slopes, ratios, gradient)
                   : run_backward<float>(f, begin, end, scales, slopes, ratios, gradient);
}

}  // namespace rlir::cpu::RLIR_ISA
