// The values of 32 codes of at most eight bits, less a zero point, as registers of FP32, for AVX2: they are multiplied
// as they are, and the scale is for the sum.
//
// Lane l of register r is the code with the index order(8 r + l): an order in which few instructions leave them. The
// values of x that they meet are packed in the same order.
#pragma once
#include "lanes.h"
#include "loops.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define QL_VALUES
namespace quantlib {
namespace QL_ISA {

// A factor: a float that stands for a code.
struct Value {
  float value;
};

// True if no value of F, if it is no zero, lies below 2^-20 or from 2^20 on.
template <class F>
constexpr bool in_values = [] {
  if constexpr (F::bits > 8) return false;
  else if constexpr (!F::is_float) return true;
  else if constexpr (F::is_book) {
    for (uint32_t code = 0; code <= F::max_code; ++code) {
      const uint32_t exponent = Book<F>::bits(code) >> 23 & 0xff;
      if (Book<F>::bits(code) && (exponent < 127 - 20 || exponent >= 127 + 20)) return false;
    }
    return true;
  } else return F::bias + F::fraction_bits <= 21 && F::max < uint32_t(127 + 20) << 23;
}();

// Integers of a byte.
template <class F, bool AFFINE>
struct ByteValues {
  static constexpr bool by_quarters = true;  // or all 32 codes at once
  static constexpr int order(int p) { return p; }
  Ints<Floats> zero_point;

  QL_MEMBER explicit ByteValues(int32_t z) : zero_point(splat<Ints<Floats>>(z)) {}
  QL_MEMBER void operator()(const char* codes, Floats (&out)[4]) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) out[r] = quarter(codes, r);
  }
  QL_MEMBER Floats quarter(const char* codes, int r) const {
    Ints<Floats> q = widen<F::is_signed>(codes + kLanes * r);
    if constexpr (AFFINE) q = q - zero_point;
    return Lanes<Floats>::of(q);
  }
};

// The upper halves of the integers -15 .. 15 as floats, which hold them exactly: of byte i of a table
constexpr uint16_t half_of_integer(int n) {
  const int magnitude = n < 0 ? -n : n;
  if (!magnitude) return 0;
  int exponent = 0;
  while (magnitude >> (exponent + 1)) ++exponent;
  return uint16_t((n < 0) << 15 | (127 + exponent) << 7 | ((magnitude << (7 - exponent)) & 0x7f));
}

// Bytes 2 and 3 of the values of the sixteen codes less each zero point
template <class F>
struct IntegerTables {
  alignas(32) uint8_t bytes[16][2][16];
  constexpr IntegerTables() : bytes() {
    for (int i = 0; i < 16; ++i)
      for (int code = 0; code < 16; ++code) {
        const uint16_t half = half_of_integer((F::is_signed && code >= 8 ? code - 16 : code) - (i - zero));
        bytes[i][0][code] = uint8_t(half), bytes[i][1][code] = uint8_t(half >> 8);
      }
  }
  static constexpr int zero = F::is_signed ? 8 : 0;  // the table of zero point 0
};
template <class F>
static constexpr IntegerTables<F> kIntegerTables;

// Two codes a byte: the bytes of their values are looked up, the upper two where the lower two are zeros. Tables of
// many zero points stay in memory: registers would not hold those of several rows.
template <class F, bool AFFINE>
struct NibbleValues {
  static constexpr bool by_quarters = false;
  static constexpr bool halves = [] {
    if constexpr (F::is_book)
      for (uint32_t code = 0; code <= F::max_code; ++code)
        if (Book<F>::bits(code) & 0xffff) return false;
    return true;
  }();
  // Even codes are in the lower half of a register, odd ones in the upper.
  static constexpr int order(int p) {
    const int r = p / 8, i = p % 4, byte = halves ? r / 2 * 8 + 2 * i + r % 2 : 4 * r + i;
    return 2 * byte + p / 4 % 2;
  }
  __m256i byte[AFFINE ? 1 : 4];
  const uint8_t (*table)[16];

  QL_MEMBER explicit NibbleValues(int32_t z) {
    if constexpr (AFFINE) {
      table = kIntegerTables<F>.bytes[z + IntegerTables<F>::zero];
    } else if constexpr (F::is_float) {
      alignas(16) uint8_t table[4][16];
      Ints<Floats> place;
      for (int l = 0; l < kLanes; ++l) place[l] = l;
      for (int half = 0; half < 2; ++half) {
        const auto bits = bits_of(decode_float<F, Floats>(same_bits<Bits<Floats>>(place + half * kLanes)));
        for (int l = 0; l < kLanes; ++l)
          for (int b = 0; b < 4; ++b) table[b][half * kLanes + l] = uint8_t(bits[l] >> (8 * b));
      }
      for (int b = 0; b < 4; ++b) byte[b] = twice(table[b]);
    } else {
      const auto& table = kIntegerTables<F>.bytes[z + IntegerTables<F>::zero];
      byte[2] = twice(table[0]), byte[3] = twice(table[1]);
    }
  }
  QL_MEMBER void operator()(const char* codes, Floats (&out)[4]) const {
    const __m256i shifts = _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0), low = _mm256_set1_epi8(15);
    const __m256i n = _mm256_and_si256(_mm256_srlv_epi32(twice(codes), shifts), low);
    const __m256i a = _mm256_shuffle_epi8(upper(0), n), b = _mm256_shuffle_epi8(upper(1), n);
    const __m256i high[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
    if constexpr (halves) {
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        out[2 * r] = Floats(_mm256_slli_epi32(high[r], 16));
        out[2 * r + 1] = Floats(_mm256_and_si256(high[r], _mm256_set1_epi32(int32_t(0xffff0000))));
      }
    } else {
      const __m256i c = _mm256_shuffle_epi8(byte[0], n), d = _mm256_shuffle_epi8(byte[1], n);
      const __m256i lower[2] = {_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)};
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        out[2 * r] = Floats(_mm256_unpacklo_epi16(lower[r], high[r]));
        out[2 * r + 1] = Floats(_mm256_unpackhi_epi16(lower[r], high[r]));
      }
    }
  }

 private:
  // The bytes of the values that are never all zeros: the third, the fourth
  QL_MEMBER __m256i upper(int b) const {
    if constexpr (AFFINE) return twice(table[b]);
    else return byte[2 + b];
  }
  static QL_MEMBER __m256i twice(const void* bytes) { return _mm256_broadcastsi128_si256(load<__m128i>(bytes)); }
};

// Codes of any format.
template <class F>
struct DecodedValues {
  static constexpr bool by_quarters = false;
  static constexpr int order(int p) { return p; }
  Ints<Floats> zero_point;

  QL_MEMBER explicit DecodedValues(int32_t z) : zero_point(splat<Ints<Floats>>(z)) {}
  QL_MEMBER void operator()(const char* codes, Floats (&out)[4]) const {
    alignas(32) int32_t q[32];
    if constexpr (is_whole<F>) {
      for (int r = 0; r < 4; ++r) store(q + kLanes * r, widen<F::is_signed>(codes + kLanes * r));
    } else {
      for (int j = 0; j < 32 / F::per_byte; ++j)
        for (int i = 0; i < F::per_byte; ++i) q[F::per_byte * j + i] = unpack<F>(uint8_t(codes[j]), i);
    }
    for (int r = 0; r < 4; ++r) {
      const auto code = load<Ints<Floats>>(q + kLanes * r);
      if constexpr (F::is_float) out[r] = decode_float<F, Floats>(same_bits<Bits<Floats>>(code));
      else out[r] = Lanes<Floats>::of(code - zero_point);
    }
  }
};

template <class F, bool AFFINE>
QL_FN auto values_of(int32_t z) {
  if constexpr (F::per_byte == 2) return NibbleValues < F, AFFINE && !F::is_float > (z);
  else if constexpr (is_whole<F> && !F::is_float) return ByteValues<F, AFFINE>(z);
  else return DecodedValues<F>(z);
}

}  // namespace QL_ISA
}  // namespace quantlib
#endif
