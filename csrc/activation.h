// y = activation(x) in FP32: quantlib/reference/activation.py for g++ and nvcc, the same names and the same numbered
// steps, one rounding an operation. V is a float, or in csrc/cpu/lanes.h a vector of them.
#pragma once
#include "numerics.h"
#include "problem.h"

namespace quantlib {

// p * x + c, for polynomials by Horner's rule
template <class V>
QL_FN V horner(V p, V x, float c) {
  return add(mul(p, x), splat<V>(c));
}

template <class V>
QL_FN V power_of_two(Ints<V> k) {
  return same_bits<V>(same_bits<Bits<V>>(k + 127) << 23u);
}

// e^x, within 2 units in the last place; 0 from -104 on, infinity from 89 on.
template <class V>
QL_FN V exp(V x) {
  // 1. e^x = 2^k * e^r, |r| <= ln(2) / 2; the bound comes first in max and min, so that a NaN stays
  x = min(splat<V>(89.0f), max(splat<V>(-104.0f), x));
  const Ints<V> k = Lanes<V>::nearest(mul(x, splat<V>(1.44269502f)));
  const V k_float = Lanes<V>::of(k);
  const V r = sub(sub(x, mul(k_float, splat<V>(0.693359375f))), mul(k_float, splat<V>(-2.12194440e-4f)));
  // 2. e^r
  V p = splat<V>(1.9875691500e-4f);
  p = horner(p, r, 1.3981999507e-3f);
  p = horner(p, r, 8.3334519073e-3f);
  p = horner(p, r, 4.1665795894e-2f);
  p = horner(p, r, 0.16666665459f);
  p = horner(p, r, 0.5f);
  p = add(add(mul(p, mul(r, r)), r), splat<V>(1.0f));
  // 3. times 2^k in two steps, each a normal number
  const Ints<V> half = k >> 1;
  return mul(mul(p, power_of_two<V>(half)), power_of_two<V>(k - half));
}

// x * Phi(x) = max(x, 0) - z * Phi(-z), z = |x|.
template <class V>
QL_FN V gelu(V x) {
  const V z = min(splat<V>(16.0f), same_bits<V>(bits_of(x) & 0x7fffffffu));
  const V t = div(splat<V>(1.0f), add(splat<V>(1.0f), mul(splat<V>(0.34f), z)));
  V q = splat<V>(-0.02517484f);
  q = horner(q, t, 0.13509157f);
  q = horner(q, t, -0.26445132f);
  q = horner(q, t, 0.1927802f);
  q = horner(q, t, -0.03861637f);
  q = horner(q, t, 0.112938516f);
  q = horner(q, t, 0.11576874f);
  q = horner(q, t, 0.13603917f);
  q = horner(q, t, 0.13562436f);
  const V tail = mul(exp(mul(-mul(z, z), splat<V>(0.5f))), mul(t, q));
  return sub(x > splat<V>(0.0f) ? x : splat<V>(0.0f), mul(z, tail));
}

// [...] -> [...]; NaN as 0x7FFFFFFF. -inf gives its limit, a zero, and not the NaN of -inf * 0.
template <class V>
QL_FN V activate(V x, Activation activation) {
  const V zero = splat<V>(0.0f), one = splat<V>(1.0f);
  const V low = max(splat<V>(-3.4028235e38f), x);  // x where it is NaN
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      x = x < zero ? zero : x;
      break;
    case Activation::gelu:
      x = gelu(x);
      break;
    case Activation::gelu_tanh: {
      const V inner = add(splat<V>(1.5957691f), mul(splat<V>(0.071354814f), mul(low, low)));
      x = div(low, add(one, exp(-mul(low, inner))));
      break;
    }
    case Activation::silu:
      x = div(low, add(one, exp(-low)));
  }
  return canonical(x);
}

}  // namespace quantlib
