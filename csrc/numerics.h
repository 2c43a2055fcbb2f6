// One value to one code and back (contract C1-C7): quantlib/reference/numerics.py for g++ and nvcc, the same names and
// the same numbered steps. No torch in here, no branch on data, so that a loop over it vectorises.
#pragma once
#include <cstdint>

#include "formats.h"

#ifdef __CUDACC__
#define QL_FN __host__ __device__ __forceinline__
#else
// Internal linkage and always inlined: a file compiled for AVX-512 must not lend its code to one compiled without.
#define QL_FN static inline __attribute__((always_inline))
#endif

namespace quantlib {

QL_FN uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

QL_FN float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

constexpr uint32_t kNaN = 0x7fffffffu;  // the one NaN that is ever written
constexpr uint32_t kInfinity = 0x7f800000u;

// One IEEE operation, rounded once; on a device the intrinsic can be neither approximated nor contracted (C0).
#ifdef __CUDA_ARCH__
QL_FN float mul(float a, float b) { return __fmul_rn(a, b); }
QL_FN float div(float a, float b) { return __fdiv_rn(a, b); }
QL_FN float add(float a, float b) { return __fadd_rn(a, b); }
QL_FN float sub(float a, float b) { return __fsub_rn(a, b); }
#else
QL_FN float mul(float a, float b) { return a * b; }
QL_FN float div(float a, float b) { return a / b; }
QL_FN float add(float a, float b) { return a + b; }
QL_FN float sub(float a, float b) { return a - b; }
#endif
QL_FN float max(float a, float b) { return a > b ? a : b; }  // b where a is NaN
QL_FN float min(float a, float b) { return a < b ? a : b; }

// ---- the rows of the table as types ---------------------------------------------------------------------------------

struct float32 {
  using storage = float;
  static constexpr bool is_float = true;
  static constexpr int bits = 32;
};

template <int BITS>
struct storage_of;
template <>
struct storage_of<16> {
  using type = uint16_t;
};
template <>
struct storage_of<8> {
  using type = uint8_t;
};
template <>
struct storage_of<4> {
  using type = uint8_t;
};

#define QL_FLOAT_TYPE(NAME, BITS, E, M, BIAS, MAX_CODE, OVERFLOW_CODE, NAN_CODE, MAX, SCALE_MAX)                 \
  struct NAME {                                                                                                  \
    using storage = storage_of<BITS>::type;                                                                      \
    static constexpr bool is_float = true, is_signed = false; /* the sign bit is no part of a number */          \
    static constexpr int bits = BITS, exponent_bits = E, fraction_bits = M, bias = BIAS;                         \
    static constexpr uint32_t max_code = MAX_CODE, overflow_code = OVERFLOW_CODE, nan_code = NAN_CODE;           \
    static constexpr uint32_t max = MAX, scale_max = SCALE_MAX; /* bits of an FP32 value */                      \
    static constexpr bool has_inf = MAX_CODE + 1 == OVERFLOW_CODE && OVERFLOW_CODE != NAN_CODE;                  \
    static constexpr bool has_nan = NAN_CODE != MAX_CODE;                                                        \
  };
QL_FLOATS(QL_FLOAT_TYPE)
#undef QL_FLOAT_TYPE

#define QL_INT_TYPE(NAME, BITS, QMIN, QMAX, AFFINE_QMIN, AFFINE_QMAX, MAX, SCALE_MAX)                            \
  struct NAME {                                                                                                  \
    using storage = uint8_t;                                                                                     \
    static constexpr bool is_float = false, is_signed = AFFINE_QMIN < 0;                                         \
    static constexpr int bits = BITS, qmin = QMIN, qmax = QMAX;                                                  \
    static constexpr int affine_qmin = AFFINE_QMIN, affine_qmax = AFFINE_QMAX;                                   \
    static constexpr int max = MAX;                                                                              \
    static constexpr uint32_t scale_max = SCALE_MAX; /* bits of an FP32 value */                                 \
  };
QL_INTS(QL_INT_TYPE)
#undef QL_INT_TYPE

// ---- float formats --------------------------------------------------------------------------------------------------

// x -> code of F: nearest, ties to even, rounded once (C3).
template <class F>
QL_FN uint32_t encode_float(float x, bool saturate) {
  constexpr int shift = 23 - F::fraction_bits;
  const uint32_t bits = bits_of(x), a = bits & 0x7fffffffu, sign = (bits >> 31) << (F::bits - 1);
  // 1. round the magnitude's bits: add just under half, and the last kept bit so that ties go to even
  uint32_t r = a + ((a >> shift) & 1u) + ((1u << (shift - 1)) - 1u);
  // 2. move the exponent to the format's bias
  r = (r >> shift) - (uint32_t(127 - F::bias) << F::fraction_bits);
  // 3. below the smallest normal: add the float whose last place is the smallest subnormal; the addition rounds
  if constexpr (F::bias != 127) {
    constexpr uint32_t magic = uint32_t(127 + 24 - F::bias - F::fraction_bits) << 23;
    const uint32_t small = bits_of(add(float_of(a), float_of(magic))) - magic;
    r = a < (uint32_t(128 - F::bias) << 23) ? small : r;
  }
  // 4. too large: the largest finite value, or what the format has beyond it
  r = int32_t(r) > int32_t(F::max_code) ? (saturate ? F::max_code : F::overflow_code) : r;
  // 5. sign; NaN last
  return a > kInfinity ? F::nan_code : (r | sign);
}

// code of F -> value, exact; NaN becomes 0x7fffffff.
template <class F>
QL_FN float decode_float(uint32_t code) {
  const uint32_t a = code & ((1u << (F::bits - 1)) - 1u);
  // 1. normal: fraction and exponent move up, the exponent to FP32's bias
  uint32_t bits = (a << (23 - F::fraction_bits)) + (uint32_t(127 - F::bias) << 23);
  // 2. subnormal: a count of smallest subnormals
  if constexpr (F::bias != 127) {
    constexpr uint32_t smallest = uint32_t(128 - F::bias - F::fraction_bits) << 23;
    const uint32_t subnormal = bits_of(mul(float(int32_t(a)), float_of(smallest)));
    bits = a < (1u << F::fraction_bits) ? subnormal : bits;
  }
  // 3. infinity, sign, NaN
  if constexpr (F::has_inf) bits = a == F::overflow_code ? kInfinity : bits;
  bits |= (code >> (F::bits - 1)) << 31;
  if constexpr (F::has_nan) bits = a > (F::has_inf ? F::overflow_code : F::max_code) ? kNaN : bits;
  return float_of(bits);
}

// Every NaN becomes 0x7fffffff (C1).
QL_FN float canonical(float x) { return x == x ? x : float_of(kNaN); }

// ---- scales ---------------------------------------------------------------------------------------------------------

// s clamped to [2^-100, scale_max]; s <= 0 becomes 2^-100, NaN stays (C4).
QL_FN float effective_scale(float s, float scale_max) {
  const float clamped = min(max(s, float_of(QL_SCALE_MIN)), scale_max);
  return s == s ? clamped : float_of(kNaN);
}

template <class F>
QL_FN float effective_scale(float s) { return effective_scale(s, float_of(F::scale_max)); }

// What x is multiplied by: r = fl(1 / s_eff). t = mul(x, r) is x in units of the scale (C5, C6).
QL_FN float reciprocal(float s_eff) { return div(1.0f, s_eff); }

template <class F>
QL_FN float largest() {
  if constexpr (F::is_float) return float_of(F::max);
  else return float(F::max);
}

// Magnitude bits of the range -> clamp(fl(amax / Q)) (C4).
template <class F>
QL_FN float symmetric_scale(uint32_t amax_bits) {
  return effective_scale<F>(div(float_of(amax_bits), largest<F>()));
}

struct Affine {
  float scale;
  int32_t zero_point;
};

// Range -> scale and zero point (C4). Both bounds are NaN where the block holds one.
template <class F>
QL_FN Affine affine_scale(float lowest, float highest) {
  constexpr float qmin = F::affine_qmin, qmax = F::affine_qmax;
  // 1. widen to hold zero, so that zero has a code; a NaN stays
  lowest = lowest > 0.0f ? 0.0f : lowest;
  highest = highest < 0.0f ? 0.0f : highest;
  // 2. scale; an infinite range gives the largest
  const float s = effective_scale<F>(div(sub(highest, lowest), qmax - qmin));
  // 3. zero point: the code of zero when the lowest value has code qmin; 0 where the scale is NaN
  float z = sub(qmin, mul(lowest, reciprocal(s)));
  z = z == z ? z : 0.0f;
  z = min(max(z, qmin), qmax);
  return {s, int32_t(bits_of(add(z, 12582912.0f)) - 0x4b400000u)};
}

// ---- integer formats ------------------------------------------------------------------------------------------------

template <class F, bool AFFINE>
QL_FN int32_t clamp_zero_point(int32_t z) {
  if constexpr (!AFFINE) return 0;
  z = z < F::affine_qmin ? F::affine_qmin : z;
  return z > F::affine_qmax ? F::affine_qmax : z;
}

// t in units of the scale -> clamp(RNE(t) + z, qmin, qmax) (C5). z comes from clamp_zero_point.
template <class F, bool AFFINE>
QL_FN int32_t encode_int(float t, int32_t z) {
  constexpr int qmin = AFFINE ? F::affine_qmin : F::qmin, qmax = AFFINE ? F::affine_qmax : F::qmax;
  // 1. NaN is the code of zero
  t = t == t ? t : 0.0f;
  // 2. clamp first: z is added after rounding, so the bounds are integers and clamping commutes with rounding
  t = min(max(t, float(qmin - z)), float(qmax - z));
  // 3. round to nearest, ties to even: the last place of 1.5 * 2^23 is one; then add the zero point
  return int32_t(bits_of(add(t, 12582912.0f)) - 0x4b400000u) + z;
}

// fl(fl32(q - z) * s_eff), NaN as 0x7fffffff (C7).
QL_FN float decode_int(int32_t code, float s_eff, int32_t z) { return canonical(mul(float(code - z), s_eff)); }

}  // namespace quantlib
