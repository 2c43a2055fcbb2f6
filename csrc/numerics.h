// One value to one code and back (contract C1-C7): quantlib/reference/numerics.py for g++ and nvcc, the same names and
// the same numbered steps. No torch in here, no branch on data, so that a loop over it vectorises.
#pragma once
#include <cstdint>

#include "rows.h"

namespace quantlib {

constexpr uint32_t kNaN = 0x7fffffffu;  // the one NaN that is ever written
constexpr uint32_t kInfinity = 0x7f800000u;

template <class To, class From>
QL_FN To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "not the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
QL_FN float float_of(uint32_t bits) { return same_bits<float>(bits); }

// The bits of 2^(code - 127) as FP32: the value of a code of E8M0, 255 of which is NaN.
QL_FN uint32_t exponent_bits(uint8_t code) { return code == 255 ? kNaN : code ? uint32_t(code) << 23 : 0x00400000u; }

// One IEEE operation, rounded once; on a device the intrinsic can be neither approximated nor contracted (C0).
#ifdef __CUDA_ARCH__
QL_FN float mul(float a, float b) { return __fmul_rn(a, b); }
QL_FN float div(float a, float b) { return __fdiv_rn(a, b); }
QL_FN float add(float a, float b) { return __fadd_rn(a, b); }
QL_FN float sub(float a, float b) { return __fsub_rn(a, b); }
#else
template <class V>
QL_FN V mul(V a, V b) {
  return a * b;
}
template <class V>
QL_FN V add(V a, V b) {
  return a + b;
}
template <class V>
QL_FN V div(V a, V b) {
  return a / b;
}
template <class V>
QL_FN V sub(V a, V b) {
  return a - b;
}
#endif

// ---- lanes ----------------------------------------------------------------------------------------------------------

// V is a float, or in csrc/cpu/lanes.h a vector of them; Bits<V> and Ints<V> are as many integers.
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
  using Bits = uint32_t;
  using Ints = int32_t;
  // b where a is NaN
  static QL_MEMBER float max(float a, float b) { return a > b ? a : b; }
  static QL_MEMBER float min(float a, float b) { return a < b ? a : b; }
  static QL_MEMBER float of(int32_t a) { return float(a); }
  // |a| <= 2^22, ties to even: the last place of 1.5 * 2^23 is one
  static QL_MEMBER int32_t nearest(float a) { return same_bits<int32_t>(add(a, 12582912.0f)) - 0x4b400000; }
};
template <class V>
using Bits = typename Lanes<V>::Bits;
template <class V>
using Ints = typename Lanes<V>::Ints;

template <class V>
QL_FN Bits<V> bits_of(V x) {
  return same_bits<Bits<V>>(x);
}
// A constant in every lane.
template <class V, class S>
QL_FN V splat(S value) {
  return V{} + value;
}
template <class V>
QL_FN V max(V a, V b) {
  return Lanes<V>::max(a, b);
}
template <class V>
QL_FN V min(V a, V b) {
  return Lanes<V>::min(a, b);
}

}  // namespace quantlib

#include "book.h"  // which computes with lanes

namespace quantlib {

// ---- float formats --------------------------------------------------------------------------------------------------

// x -> code of F: nearest, ties to even, rounded once (C3).
template <class F, class V>
QL_FN Bits<V> encode_float(V x, bool saturate) {
  if constexpr (F::is_book) return encode_book<F>(x);
  using U = Bits<V>;
  using I = Ints<V>;
  constexpr unsigned shift = 23 - F::fraction_bits;
  const U bits = bits_of(x);
  const U magnitude = bits & 0x7fffffffu;
  const I a = same_bits<I>(magnitude);
  // 1. round the magnitude's bits: add just under half, and the last kept bit so that ties go to even
  const U rounded = magnitude + ((magnitude >> shift) & 1u) + ((1u << (shift - 1)) - 1u);
  // 2. move the exponent to the format's bias
  I r = same_bits<I>(rounded - (uint32_t(127 - F::bias) << 23)) >> shift;
  // 3. below the smallest normal: add the float whose last place is the smallest subnormal; the addition rounds
  if constexpr (F::bias != 127) {
    constexpr int32_t magic = (127 + 24 - F::bias - F::fraction_bits) << 23;
    const I small = same_bits<I>(add(same_bits<V>(a), splat<V>(float_of(magic)))) - magic;
    r = a < ((128 - F::bias) << 23) ? small : r;
  }
  // 4. too large: the largest finite value, or what the format has beyond it, which is the next code
  const I limit = splat<I>(int32_t(saturate ? F::max_code : F::overflow_code));
  r = r < limit ? r : limit;
  // 5. sign, of a zero only where there is -0; NaN last
  U code = same_bits<U>(r) | ((bits >> unsigned(32 - F::bits)) & (1u << (F::bits - 1)));
  if constexpr (!F::has_negative_zero) code = r == 0 ? splat<U>(0u) : code;
  return a > int32_t(kInfinity) ? splat<U>(F::nan_code) : code;
}

// code of F -> value, exact; NaN becomes 0x7fffffff.
template <class F, class V>
QL_FN V decode_float(Bits<V> code) {
  if constexpr (F::is_book) return decode_book<F, V>(code);
  using U = Bits<V>;
  using I = Ints<V>;
  const I a = same_bits<I>(code & ((1u << (F::bits - 1)) - 1u));
  // 1. normal: fraction and exponent move up, the exponent to FP32's bias
  I bits = (a << unsigned(23 - F::fraction_bits)) + ((127 - F::bias) << 23);
  // 2. subnormal: a count of smallest subnormals
  if constexpr (F::bias != 127) {
    constexpr uint32_t smallest = uint32_t(128 - F::bias - F::fraction_bits) << 23;
    const I small = same_bits<I>(mul(Lanes<V>::of(a), splat<V>(float_of(smallest))));
    bits = a < (1 << F::fraction_bits) ? small : bits;
  }
  // 3. infinity, sign, NaN
  if constexpr (F::has_inf) bits = a == int32_t(F::overflow_code) ? splat<I>(int32_t(kInfinity)) : bits;
  const U signed_bits = same_bits<U>(bits) | ((code << unsigned(32 - F::bits)) & 0x80000000u);
  if constexpr (!F::has_nan) return same_bits<V>(signed_bits);
  if constexpr (!F::has_negative_zero) return same_bits<V>(signed_bits == 0x80000000u ? splat<U>(kNaN) : signed_bits);
  constexpr int32_t highest = F::has_inf ? F::overflow_code : F::max_code;
  return same_bits<V>(a > highest ? splat<U>(kNaN) : signed_bits);
}

template <class F>
QL_FN float decode_float(uint32_t code) {
  return decode_float<F, float>(code);
}

// Every NaN becomes 0x7fffffff (C1).
template <class V>
QL_FN V canonical(V x) {
  return x == x ? x : same_bits<V>(splat<Bits<V>>(kNaN));
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// The magnitude of s clamped to [2^-100, scale_max], its sign kept; a zero becomes 2^-100, NaN stays (C4).
QL_FN float effective_scale(float s, float scale_max) {
  const float magnitude = float_of(bits_of(s) & 0x7fffffffu);
  const float clamped = min(max(magnitude, float_of(QL_SCALE_MIN)), scale_max);
  return s == s ? bits_of(s) > 0x80000000u ? -clamped : clamped : float_of(kNaN);
}

template <class F>
QL_FN float effective_scale(float s) {
  return effective_scale(s, float_of(F::scale_max));
}

// The factor of x: r = fl(1 / s_eff). t = mul(x, r) is x in units of the scale (C5, C6).
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
  return {s, Lanes<float>::nearest(z)};
}

// ---- integer formats ------------------------------------------------------------------------------------------------

template <class F, bool AFFINE>
QL_FN int32_t clamp_zero_point(int32_t z) {
  if constexpr (!AFFINE) return 0;
  z = z < F::affine_qmin ? F::affine_qmin : z;
  return z > F::affine_qmax ? F::affine_qmax : z;
}

// t in units of the scale -> clamp(RNE(t) + z, qmin, qmax) (C5). z comes from clamp_zero_point.
template <class F, bool AFFINE, class V>
QL_FN Ints<V> encode_int(V t, Ints<V> z) {
  constexpr int qmin = AFFINE ? F::affine_qmin : F::qmin, qmax = AFFINE ? F::affine_qmax : F::qmax;
  // 1. NaN is the code of zero
  // 2. clamp first: z is added after rounding, so the bounds are integers and clamping commutes with rounding
  t = t == t ? max(t, Lanes<V>::of(qmin - z)) : splat<V>(0.0f);
  t = min(t, Lanes<V>::of(qmax - z));
  // 3. round to nearest, ties to even, then add the zero point
  return Lanes<V>::nearest(t) + z;
}

// fl(fl32(q - z) * s_eff), NaN as 0x7fffffff (C7).
QL_FN float decode_int(int32_t code, float s_eff, int32_t z) { return canonical(mul(float(code - z), s_eff)); }

}  // namespace quantlib
