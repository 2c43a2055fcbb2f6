// The rows of the table (quantlib/formats.py) as types, as values, and the way from a Type to its row.
#pragma once
#include <cstdint>

#include "formats.h"

#ifdef __CUDACC__
#define QL_FN __host__ __device__ __forceinline__
#define QL_MEMBER QL_FN
#else
// Internal linkage and always inlined: a file compiled for AVX-512 must not lend its code to one compiled without.
#define QL_FN static inline __attribute__((always_inline))
#define QL_MEMBER inline __attribute__((always_inline))
#endif
#define QL_HOST_FN static inline __attribute__((always_inline))

namespace quantlib {

// ---- types ----------------------------------------------------------------------------------------------------------

// The unit in which one code lies, or several that share a byte.
template <int BITS>
struct storage_of {
  static_assert(BITS <= 8, "a code of more than a byte has 16 or 32 bits");
  using type = uint8_t;
};
template <>
struct storage_of<16> {
  using type = uint16_t;
};

struct float32 {
  using storage = float;
  static constexpr Type type = Type::float32;
  static constexpr bool is_float = true, is_signed = false, is_book = false;
  static constexpr int bits = 32, per_byte = 1;
};

#define QL_FLOAT_TYPE(NAME, DTYPE, BITS, PER_BYTE, E, M, BIAS, IS_BOOK, HAS_INF, HAS_NAN, HAS_NEGATIVE_ZERO, MAX_CODE, \
                      OVERFLOW_CODE, NAN_CODE, MAX, SCALE_MAX)                                                         \
  struct NAME {                                                                                                        \
    using storage = storage_of<BITS>::type;                                                                            \
    static constexpr Type type = Type::NAME;                                                                           \
    static constexpr bool is_float = true, is_signed = false; /* the sign bit is no part of a number */                \
    static constexpr int bits = BITS, per_byte = PER_BYTE;                                                             \
    static constexpr int exponent_bits = E, fraction_bits = M, bias = BIAS;                                            \
    static constexpr bool is_book = IS_BOOK; /* a table of values: see book.h */                                       \
    static constexpr bool has_inf = HAS_INF, has_nan = HAS_NAN;                                                        \
    static constexpr bool has_negative_zero = HAS_NEGATIVE_ZERO; /* if not, its code is the one NaN */                 \
    static constexpr uint32_t max_code = MAX_CODE, overflow_code = OVERFLOW_CODE, nan_code = NAN_CODE;                 \
    static constexpr uint32_t max = MAX, scale_max = SCALE_MAX; /* bits of an FP32 value */                            \
  };
QL_FLOATS(QL_FLOAT_TYPE)
#undef QL_FLOAT_TYPE

#define QL_INT_TYPE(NAME, DTYPE, BITS, PER_BYTE, SIGNED, QMIN, QMAX, AFFINE_QMIN, AFFINE_QMAX, MAX, SCALE_MAX) \
  struct NAME {                                                                                                \
    using storage = uint8_t;                                                                                   \
    static constexpr Type type = Type::NAME;                                                                   \
    static constexpr bool is_float = false, is_signed = SIGNED, is_book = false;                               \
    static constexpr int bits = BITS, per_byte = PER_BYTE;                                                     \
    static constexpr int qmin = QMIN, qmax = QMAX, affine_qmin = AFFINE_QMIN, affine_qmax = AFFINE_QMAX;       \
    static constexpr int max = MAX;                                                                            \
    static constexpr uint32_t scale_max = SCALE_MAX; /* bits of an FP32 value */                               \
  };
QL_INTS(QL_INT_TYPE)
#undef QL_INT_TYPE

// Every row, float32 first.
constexpr Type kTypes[] = {
#define QL_ROW(NAME, ...) Type::NAME,
    Type::float32, QL_FLOATS(QL_ROW) QL_INTS(QL_ROW)
#undef QL_ROW
};

// True if a code fills the bytes in which it lies.
template <class F>
constexpr bool is_whole = F::bits == 8 * int(sizeof(typename F::storage));

// The types of x and y: floats that are wider than a byte.
template <class F>
constexpr bool is_input = F::is_float && F::bits > 8;

// The number that is taken from a code of an integer format so that a signed byte holds it.
template <class F>
constexpr int excess = F::is_signed || F::max <= 127 ? 0 : 128;

// Bytes of n codes that begin with a byte.
template <class F>
QL_FN constexpr int64_t bytes_of(int64_t n) {
  return (n * int64_t(sizeof(typename F::storage)) + F::per_byte - 1) / F::per_byte;
}

// ---- values ---------------------------------------------------------------------------------------------------------

// A row at run time.
struct Row {
  int bits, bytes, per_byte;  // bytes: that a code lies in, or per_byte of them
  int log_per_byte;           // to base 2
  bool is_float, is_signed;   // is_signed: an integer format with negative codes
  uint32_t scale_max;         // bits of an FP32 value
  int32_t qmin, qmax;         // of an affine zero point
};

template <class F>
QL_FN constexpr Row row() {
  Row r = {F::bits, int(sizeof(typename F::storage)), F::per_byte, F::per_byte / 2, F::is_float, F::is_signed, 0, 0, 0};
  if constexpr (F::bits != 32) r.scale_max = F::scale_max;
  if constexpr (!F::is_float) r.qmin = F::affine_qmin, r.qmax = F::affine_qmax;
  return r;
}

// run(F{}) with the row of `type`.
template <class Run>
QL_HOST_FN auto visit(Type type, const Run& run) {
  switch (type) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return run(NAME{});
    QL_FLOATS(QL_CASE)
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return run(float32{});
  }
}

QL_HOST_FN Row row_of(Type type) {
  return visit(type, [](auto f) { return row<decltype(f)>(); });
}

// Bytes of a row of K codes.
QL_HOST_FN int64_t row_bytes(const Row& f, int64_t K) { return (K * f.bytes + f.per_byte - 1) >> f.log_per_byte; }

// Bytes before element (i, j) of an [M, K] matrix; j is a multiple of the codes that share a byte.
QL_HOST_FN int64_t byte_offset(const Row& f, int64_t K, int64_t i, int64_t j) {
  return f.per_byte == 1 ? (i * K + j) * f.bytes : i * row_bytes(f, K) + (j >> f.log_per_byte);
}

}  // namespace quantlib
