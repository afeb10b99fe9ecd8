// CUDA's built-in functions for kernels compiled by the C++ compiler: shuffles, votes, reductions,
// atomics, arithmetic. Only those that kernels use; a missing one is a compile error.
// __activemask() stays missing: what it returns is not defined well enough to compute with.
#pragma once

namespace rlir::emu {

struct Shuffle {
  uint64_t value, result;
  int operand, width;
};
enum class Shuffled { kIndex, kUp, kDown, kXor };

// PTX ISA, shfl.sync. A source lane outside the mask gives an undefined value: poison here.
template <Shuffled kind>
RLIR_EMU_UNCHECKED void shuffle(void** arguments, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Shuffle* own = static_cast<Shuffle*>(arguments[lane]);
    const int width = own->width, first = lane & ~(width - 1);
    int from;
    if (kind == Shuffled::kIndex) {
      from = first + (own->operand & (width - 1));
    } else if (kind == Shuffled::kUp) {
      from = lane - own->operand < first ? lane : lane - own->operand;
    } else if (kind == Shuffled::kDown) {
      from = lane + own->operand >= first + width ? lane : lane + own->operand;
    } else {
      from = (lane ^ own->operand) >= first + width ? lane : lane ^ own->operand;
    }
    own->result =
        mask >> from & 1 ? static_cast<Shuffle*>(arguments[from])->value : 0xfff7dead7fc0deadull;
  }
}

template <Shuffled kind, typename T>
inline T shuffled(uint32_t mask, T value, int operand, int width, const char* what,
                  const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  Shuffle argument{0, 0, operand, width};
  memcpy(&argument.value, &value, sizeof value);
  collective(&argument, mask, shuffle<kind>, what, file, line);
  T result;
  memcpy(&result, &argument.result, sizeof result);
  return result;
}

struct Vote {
  uint32_t value, result;
};
enum class Voted { kBallot, kAdd, kMin, kMax, kAnd, kOr, kMatch };

template <Voted kind>
RLIR_EMU_UNCHECKED void vote(void** arguments, uint32_t mask) {
  uint32_t result = 0;
  bool first = true;
  const auto value_of = [=](int lane) { return static_cast<Vote*>(arguments[lane])->value; };
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint32_t v = value_of(lane);
    if (kind == Voted::kBallot) {
      result |= v != 0 ? 1u << lane : 0u;
    } else if (first) {
      result = v;
    } else if (kind == Voted::kAdd) {
      result += v;
    } else if (kind == Voted::kMin) {
      result = v < result ? v : result;
    } else if (kind == Voted::kMax) {
      result = v > result ? v : result;
    } else if (kind == Voted::kAnd) {
      result &= v;
    } else {
      result |= v;
    }
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (kind == Voted::kMatch) {
      result = 0;
      for (int other = 0; other < 32; ++other) {
        if ((mask >> other & 1) && value_of(other) == value_of(lane)) result |= 1u << other;
      }
    }
    static_cast<Vote*>(arguments[lane])->result = result;
  }
}

template <Voted kind>
inline uint32_t voted(uint32_t mask, uint32_t value, const char* what, const char* file, int line) {
  Vote argument{value, 0};
  collective(&argument, mask, vote<kind>, what, file, line);
  return argument.result;
}

// Fibers switch only where they wait, so a plain read-modify-write is atomic.
template <typename T, typename Change>
RLIR_EMU_UNCHECKED T atomically(T* p, Change change) {
  touch_atomic(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = change(old);
  return old;
}
template <typename T>
struct Same {
  using Type = T;
};

}  // namespace rlir::emu

#define RLIR_EMU_SHUFFLE(name, kind, Operand)                                                   \
  template <typename T>                                                                         \
  inline T name(uint32_t mask, T value, Operand operand, int width = 32, RLIR_EMU_PLACE) {      \
    using ::rlir::emu::Shuffled;                                                                \
    return ::rlir::emu::shuffled<Shuffled::kind>(mask, value, static_cast<int>(operand), width, \
                                                 #name, file, line);                            \
  }
RLIR_EMU_SHUFFLE(__shfl_sync, kIndex, int)
RLIR_EMU_SHUFFLE(__shfl_up_sync, kUp, unsigned)
RLIR_EMU_SHUFFLE(__shfl_down_sync, kDown, unsigned)
RLIR_EMU_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef RLIR_EMU_SHUFFLE

#define RLIR_EMU_VOTE(Result, name, kind, Value, value, finish)                              \
  inline Result name(uint32_t mask, Value x, RLIR_EMU_PLACE) {                               \
    using ::rlir::emu::Voted;                                                                \
    const uint32_t result = ::rlir::emu::voted<Voted::kind>(mask, value, #name, file, line); \
    return finish;                                                                           \
  }
RLIR_EMU_VOTE(unsigned, __ballot_sync, kBallot, int, x != 0, result)
RLIR_EMU_VOTE(int, __any_sync, kBallot, int, x != 0, result != 0)
RLIR_EMU_VOTE(int, __all_sync, kBallot, int, x != 0, result == mask)
RLIR_EMU_VOTE(unsigned, __match_any_sync, kMatch, unsigned, x, result)
RLIR_EMU_VOTE(unsigned, __reduce_add_sync, kAdd, unsigned, x, result)
RLIR_EMU_VOTE(unsigned, __reduce_min_sync, kMin, unsigned, x, result)
RLIR_EMU_VOTE(unsigned, __reduce_max_sync, kMax, unsigned, x, result)
RLIR_EMU_VOTE(unsigned, __reduce_and_sync, kAnd, unsigned, x, result)
RLIR_EMU_VOTE(unsigned, __reduce_or_sync, kOr, unsigned, x, result)
#undef RLIR_EMU_VOTE

#define RLIR_EMU_ATOMIC(name, T, expression)                                    \
  inline T name(T* p, typename ::rlir::emu::Same<T>::Type v) {                  \
    return ::rlir::emu::atomically(                                             \
        p, [=]([[maybe_unused]] T old) { return static_cast<T>(expression); }); \
  }
RLIR_EMU_ATOMIC(atomicAdd, int, old + v)
RLIR_EMU_ATOMIC(atomicAdd, unsigned, old + v)
RLIR_EMU_ATOMIC(atomicAdd, unsigned long long, old + v)
RLIR_EMU_ATOMIC(atomicAdd, float, old + v)
RLIR_EMU_ATOMIC(atomicAdd, double, old + v)
RLIR_EMU_ATOMIC(atomicMin, int, v < old ? v : old)
RLIR_EMU_ATOMIC(atomicMin, unsigned, v < old ? v : old)
RLIR_EMU_ATOMIC(atomicMax, int, v > old ? v : old)
RLIR_EMU_ATOMIC(atomicMax, unsigned, v > old ? v : old)
RLIR_EMU_ATOMIC(atomicMax, unsigned long long, v > old ? v : old)
RLIR_EMU_ATOMIC(atomicAnd, unsigned, old& v)
RLIR_EMU_ATOMIC(atomicOr, unsigned, old | v)
RLIR_EMU_ATOMIC(atomicExch, int, v)
RLIR_EMU_ATOMIC(atomicExch, unsigned, v)
#undef RLIR_EMU_ATOMIC
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v) {
  return ::rlir::emu::atomically(p, [=](unsigned old) { return old == expected ? v : old; });
}
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected,
                                    unsigned long long v) {
  return ::rlir::emu::atomically(p,
                                 [=](unsigned long long old) { return old == expected ? v : old; });
}

// Arithmetic that says how it rounds is never contracted.
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x != 0 ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}
template <typename T>
inline void __stcg(T* p, T v) {
  *p = v;
}
template <typename T>
inline void __stcs(T* p, T v) {
  *p = v;
}
#define RLIR_EMU_MIN_MAX(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
RLIR_EMU_MIN_MAX(int)
RLIR_EMU_MIN_MAX(unsigned)
RLIR_EMU_MIN_MAX(long)
RLIR_EMU_MIN_MAX(unsigned long)
RLIR_EMU_MIN_MAX(long long)
RLIR_EMU_MIN_MAX(unsigned long long)
#undef RLIR_EMU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
