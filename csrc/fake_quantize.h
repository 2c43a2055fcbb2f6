// One value of a fake quantization and its gradients (contract C10): quantlib/reference/fake_quantize.py for g++ and
// nvcc. V is a float, or in csrc/cpu/lanes.h a vector of them; a comparison of two V is a mask that `?:` takes.
#pragma once
#include "numerics.h"

namespace quantlib {

// Any integer format: its codes are known at run time.
struct Integer {
  static constexpr bool is_float = false;
};

// The lowest and the highest code; unused where the format is a float's.
struct Limits {
  float qmin, qmax;
};

// The constants of a block: r = 1 / s, and the zero point as it is used forward and backward.
template <class V>
struct Shared {
  V r, s, z;
};

// |t| < 2^22 to the nearest integer, ties to even: the last place of 1.5 * 2^23 is one. Its zero is +0, a NaN stays.
template <class V>
QL_FN V nearest(V t) {
  return sub(add(t, splat<V>(12582912.0f)), splat<V>(12582912.0f));
}

// A learned zero point -> the code that it is: rounded, 0 where it is NaN.
QL_FN float code_of(float z, Limits q) {
  z = z == z ? z : 0.0f;
  return nearest(min(max(z, q.qmin), q.qmax));
}

// The largest magnitude bits of t that are inside: those of the largest value, or of what still rounds to it.
template <class F>
QL_FN constexpr int32_t largest_inside(bool lsq_mask) {
  return int32_t(F::max + (lsq_mask || F::is_book ? 0 : (1u << (22 - F::fraction_bits)) - (F::max_code & 1)));
}

// t within [lo, hi]; NaN stays, which is why it stands second.
template <class V>
QL_FN V clamp(V t, V lo, V hi) {
  return min(hi, max(lo, t));
}

// y = fl(c * s), c the value of x's code in units of the scale
template <class F, class V>
QL_FN V fake_quantized(V x, const Shared<V>& of, [[maybe_unused]] Limits q) {
  const V t = mul(x, of.r);
  V c;
  if constexpr (F::is_float) c = decode_float<F, V>(encode_float<F>(t, true));
  else c = nearest(clamp(t, sub(splat<V>(q.qmin), of.z), sub(splat<V>(q.qmax), of.z)));
  return t == t ? mul(c, of.s) : same_bits<V>(splat<Bits<V>>(kNaN));
}

// The terms that an element adds to the gradients of its scale and zero point, and whether it passes its own on.
template <class V>
struct Gradients {
  decltype(V{} == V{}) inside;
  V scale, zero_point;
};

template <class F, bool LSQ, class V>
QL_FN Gradients<V> gradients(V dy, V x, const Shared<V>& of, [[maybe_unused]] Limits q) {
  const V t = mul(x, of.r), zero = splat<V>(0.0f);
  Gradients<V> g;
  V c;
  if constexpr (F::is_float) {
    const auto a = same_bits<Ints<V>>(bits_of(t) & 0x7fffffffu);
    g.inside = a <= splat<Ints<V>>(largest_inside<F>(LSQ));
    c = decode_float<F, V>(encode_float<F>(t, true));
  } else {
    // A t that the clamp moves is no code; far outside, where `nearest` is not exact, neither is what it gives.
    const V clamped = clamp(t, sub(splat<V>(q.qmin), of.z), sub(splat<V>(q.qmax), of.z));
    c = nearest(clamped);
    g.inside = LSQ ? clamped == t : c == nearest(t);
  }
  const V slope = g.inside ? sub(c, t) : c;
  g.scale = mul(dy, t == t ? slope : zero);
  g.zero_point = g.inside ? zero : -mul(dy, of.s);
  return g;
}

}  // namespace quantlib
