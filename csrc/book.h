// Code books: the value of code i is values[i], in ascending order (contract C6): quantlib/reference/numerics.py for
// g++ and nvcc. Part of numerics.h, which alone includes it.
#pragma once

namespace quantlib {

// The FP32 bits of the values of F: of a constant code, or a table in memory, which kernels of a GPU have no use for.
template <class F>
struct Book;
#define QL_BOOK(NAME, ...)                                         \
  template <>                                                      \
  struct Book<NAME> {                                              \
    alignas(64) static constexpr uint32_t table[] = {__VA_ARGS__}; \
    static constexpr QL_MEMBER uint32_t bits(uint32_t code) {      \
      constexpr uint32_t values[] = {__VA_ARGS__};                 \
      return values[code];                                         \
    }                                                              \
  };
QL_BOOKS(QL_BOOK)
#undef QL_BOOK

// x -> code of the nearest value; at a midpoint, of the lower.
template <class F, class V>
QL_FN Bits<V> encode_book(V x) {
  // 1. the midpoints below x
  Bits<V> code = splat<Bits<V>>(0u);
#pragma GCC unroll 16
  for (uint32_t i = 0; i < F::max_code; ++i) {
    const float midpoint = mul(add(float_of(Book<F>::bits(i)), float_of(Book<F>::bits(i + 1))), 0.5f);
    code = x > splat<V>(midpoint) ? code + 1u : code;
  }
  // 2. NaN is the largest value
  return x == x ? code : splat<Bits<V>>(F::nan_code);
}

// One of COUNT values from FIRST on, by the low bits of a code: a tree of selections, which keeps no table in memory.
template <class F, uint32_t FIRST, uint32_t COUNT, class V>
QL_FN V pick(Bits<V> code) {
  if constexpr (COUNT == 1) {
    return splat<V>(float_of(Book<F>::bits(FIRST)));
  } else {
    const V low = pick<F, FIRST, COUNT / 2, V>(code), high = pick<F, FIRST + COUNT / 2, COUNT / 2, V>(code);
    return (code & (COUNT / 2)) != 0u ? high : low;
  }
}

// The values of codes; csrc/cpu/lanes.h looks them up where a register holds the table.
template <class V>
struct LookUp {
  template <class F>
  static QL_MEMBER V of(Bits<V> code) {
    return pick<F, 0, F::max_code + 1, V>(code);
  }
};

// code of F -> value
template <class F, class V>
QL_FN V decode_book(Bits<V> code) {
  return LookUp<V>::template of<F>(code);
}

}  // namespace quantlib
