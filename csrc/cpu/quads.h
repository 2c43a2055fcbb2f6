// The values of the four bytes that each of sixteen rows has in a register, for AVX-512: codes of 4 or 8 bits, a unit
// of each row at a time, which is a float, or two BF16 that are multiplied and added together.
//
// Word p of the units of 32 columns is the code with the index order(p), an order in which few instructions leave them.
// The values of x that they meet are packed in the same order.
#pragma once
#include "pairs.h"

#ifdef __AVX512F__
#define QL_QUADS
namespace quantlib {
namespace QL_ISA {

// What a part of the columns has, of each row
struct RowsShare {
  Floats scale;
  Ints<Floats> zero_point;
};

// The codes of F that fill four bytes
template <class F>
constexpr int kQuadCodes = 4 * F::per_byte;

QL_FN __m512i shift_right(__m512i quads, unsigned bits) { return _mm512_maskz_srli_epi32(0xffff, quads, bits); }
QL_FN __m512i shift_left(__m512i quads, unsigned bits) { return _mm512_maskz_slli_epi32(0xffff, quads, bits); }

// ---- the weight in FP32 ---------------------------------------------------------------------------------------------

// Units are values times their scale, in the order of the columns.
template <class F, bool AFFINE>
struct FloatQuads {
  static constexpr int units = kQuadCodes<F>;  // of a register
  static constexpr int order(int p) { return p; }
  Floats table, scale, zero_point;

  QL_MEMBER FloatQuads() {
    if constexpr (F::per_byte == 2) {
      Ints<Floats> q;
      for (int code = 0; code < 16; ++code) q[code] = unpack<F>(uint8_t(code), 0);
      table = value(q);
    }
  }
  QL_MEMBER void begin(const RowsShare& part) {
    scale = part.scale;
    if constexpr (AFFINE) zero_point = Lanes<Floats>::of(part.zero_point);
  }
  static QL_MEMBER __m512i prepared(__m512i quads) { return quads; }
  QL_MEMBER Floats unit(__m512i quads, int j) const {
    Floats v;
    if constexpr (F::per_byte == 2) {
      const __m512i index = shift_right(quads, unsigned(4 * j));  // of which the lowest four bits count
      v = _mm512_maskz_permutexvar_ps(0xffff, index, table);
    } else {
      const __m512i high = shift_left(quads, unsigned(24 - 8 * j));
      if constexpr (!F::is_float && F::is_signed) v = value(Ints<Floats>(_mm512_maskz_srai_epi32(0xffff, high, 24)));
      else v = value(Ints<Floats>(shift_right(high, 24)));
    }
    if constexpr (AFFINE) v = sub(v, zero_point);
    return mul(v, scale);
  }

 private:
  static QL_MEMBER Floats value(Ints<Floats> q) {
    if constexpr (F::is_float) return decode_float<F, Floats>(same_bits<Bits<Floats>>(q));
    else return Lanes<Floats>::of(q);
  }
};

#ifdef __AVX512BF16__
// ---- pairs of BF16 --------------------------------------------------------------------------------------------------

// Two codes a byte: looked up by the five lowest bits of a word. Nibble j of the lower half of a register shares a unit
// with that of the upper half.
template <class F, bool AFFINE>
struct NibbleQuads {
  static constexpr int units = 4;
  static constexpr int order(int p) { return p / 8 * 8 + p / 2 % 4 + p % 2 * 4; }
  // A zero point leaves integers of five bits with a sign; else the table holds all values twice.
  __m512i table, zero_point;

  QL_MEMBER NibbleQuads() {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      if constexpr (F::is_float) values[i] = upper_half(decode_float<F>(uint32_t(i % 16)));
      else if constexpr (AFFINE) values[i] = upper_half(float(i < 16 ? i : i - 32));
      else values[i] = upper_half(float(unpack<F>(uint8_t(i % 16), 0)));
    }
    table = load_words(values);
  }
  QL_MEMBER void begin(const RowsShare& part) {
    if constexpr (AFFINE) {
      const auto words = (part.zero_point + excess_) & 0xffff;
      zero_point = __m512i(words | words << 16);
    }
  }
  static QL_MEMBER __m512i prepared(__m512i quads) {
    if constexpr (AFFINE && F::is_signed) return _mm512_xor_si512(quads, _mm512_set1_epi8(int8_t(0x88)));
    return quads;
  }
  QL_MEMBER Floats unit(__m512i quads, int j) const {
    __m512i index = _mm512_maskz_srli_epi16(0xffffffff, quads, unsigned(4 * j));
    if constexpr (AFFINE) index = _mm512_sub_epi16(_mm512_and_si512(index, _mm512_set1_epi16(15)), zero_point);
    return same_bits<Floats>(_mm512_maskz_permutexvar_epi16(0xffffffff, index, table));
  }

 private:
  static constexpr int excess_ = F::is_signed ? 8 : 0;  // of what `prepared` leaves
};

// A byte shares a unit with that two bytes behind it.
struct ByteOrder {
  static constexpr int units = 2;
  static constexpr int order(int p) { return p / 4 * 4 + p / 2 % 2 + p % 2 * 2; }
};

// Bytes less their zero points: by FP32, whose lower half they leave empty
template <class F>
struct AffineByteQuads : ByteOrder {
  Ints<Floats> zero_point;

  QL_MEMBER void begin(const RowsShare& part) { zero_point = part.zero_point; }
  static QL_MEMBER __m512i prepared(__m512i quads) { return quads; }
  QL_MEMBER Floats unit(__m512i quads, int j) const {
    const auto low = bits_of(value(quads, j)) >> 16, high = bits_of(value(quads, j + 2));
    return same_bits<Floats>(_mm512_mask_blend_epi16(0xaaaaaaaa, same_bits<__m512i>(low), same_bits<__m512i>(high)));
  }

 private:
  QL_MEMBER Floats value(__m512i quads, int byte) const {
    const __m512i high = shift_left(quads, unsigned(24 - 8 * byte));
    const auto q = Ints<Floats>(F::is_signed ? _mm512_maskz_srai_epi32(0xffff, high, 24) : shift_right(high, 24));
    return Lanes<Floats>::of(q - zero_point);
  }
};

// Bytes of any format: both bytes of their values are looked up, those of 128 codes at a time.
template <class F>
struct ByteQuads : ByteOrder {
  struct Bytes {
    __m512i lower, upper;
  };
  __m512i table[2][4];  // the lower bytes of 256 values, the upper ones

  QL_MEMBER ByteQuads() {
    alignas(64) uint8_t bytes[2][256];
    for (int code = 0; code < 256; ++code) {
      const uint16_t half = upper_half(value(code));
      bytes[0][code] = uint8_t(half), bytes[1][code] = uint8_t(half >> 8);
    }
    for (int b = 0; b < 2; ++b)
      for (int i = 0; i < 4; ++i) table[b][i] = load<__m512i>(bytes[b] + 64 * i);
  }
  QL_MEMBER void begin(const RowsShare&) {}
  QL_MEMBER Bytes prepared(__m512i quads) const {
    const __mmask64 is_upper = _mm512_movepi8_mask(quads);
    const auto look_up = [&](const __m512i(&t)[4]) __attribute__((always_inline)) {
      const __m512i low = _mm512_permutex2var_epi8(t[0], quads, t[1]);
      return _mm512_mask_blend_epi8(is_upper, low, _mm512_permutex2var_epi8(t[2], quads, t[3]));
    };
    return {look_up(table[0]), look_up(table[1])};
  }
  static QL_MEMBER Floats unit(const Bytes& bytes, int j) {
    constexpr int select = 0xca;  // of bits: the second where the first is 1, else the third
    const __m512i is_upper = _mm512_set1_epi16(int16_t(0xff00));
    const __m512i lower = j ? _mm512_maskz_srli_epi16(0xffffffff, bytes.lower, 8) : bytes.lower;
    const __m512i upper = j ? bytes.upper : _mm512_maskz_slli_epi16(0xffffffff, bytes.upper, 8);
    return same_bits<Floats>(_mm512_ternarylogic_epi32(is_upper, upper, lower, select));
  }

 private:
  static QL_MEMBER float value(int code) {
    if constexpr (F::is_float) return decode_float<F>(uint32_t(code));
    else return float(F::is_signed ? int8_t(code) : code);
  }
};
#endif

template <class F>
constexpr bool in_quads = F::bits == 4 || F::bits == 8;

static inline bool has_quads(Type format) {
  return visit(format, [](auto f) { return in_quads<decltype(f)>; });
}

// How rows of F become units of E.
template <class E, class F, bool AFFINE>
QL_FN auto quads_of() {
  if constexpr (sizeof(E) == 4) return FloatQuads<F, AFFINE>();
#ifdef __AVX512BF16__
  else if constexpr (F::per_byte == 2) return NibbleQuads<F, AFFINE>();
  else if constexpr (AFFINE) return AffineByteQuads<F>();
  else return ByteQuads<F>();
#endif
}

}  // namespace QL_ISA
}  // namespace quantlib
#endif
