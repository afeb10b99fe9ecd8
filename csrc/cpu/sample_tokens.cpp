// Formula and random numbers: sample_tokens.h.
//
// Why one kernel: eager PyTorch sorts the row, sums it, masks it, scatters it back, and takes a
// softmax twice, some fifteen passes over [N, V]. Here a row of float32 stays in the L1 or L2 cache
// through all of it, exp is taken once, and nothing is sorted.
#include "cpu/sample_tokens.h"

#include "core/philox.h"
#include "cpu/truncation.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

// z of a row: float32, divided by the temperature, -infinity outside of [low, high).
void load_row(const SampleTokens& a, int64_t row, float* z) {
  const Span span = span_of(a.low, a.high);
  for (int64_t v = span.begin; v < a.low; ++v) z[v] = minus_infinity();
  for (int64_t v = a.high; v < span.end; ++v) z[v] = minus_infinity();
  const int64_t step = a.token_stride, n = a.high - a.low;
  const int64_t start = row * a.row_stride + a.low * step;
  float* out = z + a.low;
  if (a.dtype == Dtype::kFloat32) {
    const float* in = static_cast<const float*>(a.logits) + start;
    if (step == 1) {
      __builtin_memcpy(out, in, sizeof(float) * static_cast<uint64_t>(n));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = in[i * step];
    }
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(a.logits) + start;
    if (step == 1) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = __builtin_bit_cast(float, static_cast<uint32_t>(in[i]) << 16);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = __builtin_bit_cast(float, static_cast<uint32_t>(in[i * step]) << 16);
      }
    }
  }
  if (a.temperature == 1.0f) return;
  for (int64_t v = span.begin; v < span.end; v += kWidth) {
    store_vector(z + v, load_vector(z + v) / splat(a.temperature));
  }
}

struct RowSums {
  double s, u;   // softmax sums on the support
  double total;  // mass of the support
};

// Sums of a block on the support. The masses that are left go back to `mass`, and the block's
// mass is returned.
double sum_block(const RowSearch& search, const float* z, const Cut& cut, int64_t block, float* sum,
                 float* dot) {
  constexpr int kParts = kSoftmaxLanes / kWidth;
  const int64_t start = block * kSoftmaxBlock;
  const Vf reference = reference_of(splat(search.block_max[block]));
  Vf sums[kParts] = {}, dots[kParts] = {};
  MassSum mass;
  for (int64_t v = start; v < start + kSoftmaxBlock; v += kSoftmaxLanes) {
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = v + part * kWidth;
      const Vf x = load_vector(z + at);
      const Vi in = in_cut(cut, x, at);
      const Vf e = select(in, load_vector(search.e + at), Vf{});
      sums[part] += e;
      dots[part] = add_dot(e, x - reference, dots[part]);
      const Vf left = select(in, load_vector(search.mass + at), Vf{});
      store_vector(search.mass + at, left);
      mass.add(left);
    }
  }
  float lanes[2][kSoftmaxLanes];
  for (int part = 0; part < kParts; ++part) {
    store_vector(lanes[0] + part * kWidth, sums[part]);
    store_vector(lanes[1] + part * kWidth, dots[part]);
  }
  fold_lanes(lanes[0]);
  fold_lanes(lanes[1]);
  *sum = lanes[0][0];
  *dot = lanes[1][0];
  return mass.total();
}

// The first token at which the running mass exceeds the fraction `u` / 2^64 of all of it.
int64_t draw(const RowSearch& search, const double* block_mass, const Span& span, double total,
             uint64_t u) {
  const uint64_t units = static_cast<uint64_t>(total * (1.0 / kMassUnit));
  const uint64_t below = static_cast<uint64_t>((static_cast<unsigned __int128>(u) * units) >> 64);
  const double target = static_cast<double>(below) * kMassUnit;  // < total
  double before = 0.0;
  int64_t block = span.begin / kSoftmaxBlock;
  while (!(before + block_mass[block] > target)) before += block_mass[block++];
  int64_t v = block * kSoftmaxBlock;
  double running = before + static_cast<double>(search.mass[v]);
  while (!(running > target)) running += static_cast<double>(search.mass[++v]);
  return v;
}

// False where the row has no distribution.
bool sample(const SampleTokens& a, int64_t row, float* z, double* block_mass,
            const RowSearch& search) {
  load_row(a, row, z);
  const float maximum = row_exponentials(search, z, a.low, a.high);
  const double all = *search.total;
  if (!(all > 0.0) || maximum == __builtin_inff()) return false;
  const Cut cut = row_cut(search, z, maximum, a.low, a.high, {a.top_k, a.top_p, a.min_p});

  const Span span = span_of(a.low, a.high);
  RowSums sums = {};
  for (int64_t b = span.begin / kSoftmaxBlock; b < span.end / kSoftmaxBlock; ++b) {
    block_mass[b] = 0.0;
    if (search.block_max[b] == minus_infinity() || search.block_max[b] < cut.threshold) continue;
    float sum, dot;
    block_mass[b] = sum_block(search, z, cut, b, &sum, &dot);
    sums.total += block_mass[b];
    join_block(search.block_max[b], maximum, search.factor[b], sum, dot, &sums.s, &sums.u);
  }
  const int64_t id = a.row_ids == nullptr ? row : a.row_ids[row * a.row_id_stride];
  const uint64_t u = philox_fraction(a.offset, static_cast<uint64_t>(id), a.key);
  int64_t token = a.low;
  if (a.greedy) {
    while (z[token] != maximum) ++token;
  } else {
    token = draw(search, block_mass, span, sums.total, u);
  }
  const double log_sum = log(sums.s);
  a.token[row] = token;
  a.logprob[row] = row_logprob(z[token], maximum, log_sum);
  a.entropy[row] = row_entropy(sums.s, sums.u, log_sum);
  if (a.support != nullptr) {
    write_support(z, cut, a.low, a.high, a.tokens, a.support + row * ((a.tokens + 7) / 8));
  }
  return true;
}

}  // namespace

int64_t sample_tokens_scratch(int64_t tokens) {
  const int64_t padded = padded_tokens(tokens);
  return 4 * padded + round_up(8 * (padded / kSoftmaxBlock), 64) + row_search_bytes(tokens);
}

int64_t sample_tokens(const SampleTokens& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t padded = padded_tokens(a.tokens);
  float* z = static_cast<float*>(scratch);
  double* block_mass = reinterpret_cast<double*>(z + padded);
  float* rest = z + padded + round_up(8 * (padded / kSoftmaxBlock), 64) / 4;
  const RowSearch search = row_search(rest, a.tokens);
  for (int64_t row = begin; row < end; ++row) {
    if (!sample(a, row, z, block_mass, search)) return row;
  }
  return -1;
}

}  // namespace rlir::cpu::RLIR_ISA
