// The values of 32 codes of at most eight bits, less a zero point, as a register of BF16, which holds them exactly.
//
// Word p of the register is the code with the index order(p): an order in which few instructions leave them. The values
// of x that they meet are packed in the same order.
#pragma once
#include "lanes.h"
#include "loops.h"

#ifdef __AVX512BF16__
namespace quantlib {
namespace QL_ISA {

QL_FN __m512i load_words(const uint16_t (&words)[32]) { return load<__m512i>(words); }
QL_FN uint16_t upper_half(float value) { return uint16_t(bits_of(value) >> 16); }

// The upper halves of low and high, 32 words
QL_FN __m512i upper_halves(Floats low, Floats high) {
  uint16_t place[32];
  for (int k = 0; k < 32; ++k) place[k] = uint16_t(2 * k + 1);
  return _mm512_permutex2var_epi16(same_bits<__m512i>(low), load_words(place), same_bits<__m512i>(high));
}

struct NaturalOrder {
  static constexpr int order(int p) { return p; }
};

// Integers of a byte: by FP32, whose lower half they leave empty. A code shares 32 bits with that 16 places behind it.
template <class F, bool AFFINE>
struct BytePairs {
  static constexpr int order(int p) { return p / 2 + p % 2 * 16; }
  __m512i zero_point;

  QL_MEMBER explicit BytePairs(int32_t z) : zero_point(_mm512_set1_epi32(z)) {}
  QL_MEMBER Floats operator()(const char* codes) const {
    const auto low = bits_of(sixteen(codes)) >> 16, high = bits_of(sixteen(codes + 16));
    return same_bits<Floats>(_mm512_mask_blend_epi16(0xaaaaaaaa, same_bits<__m512i>(low), same_bits<__m512i>(high)));
  }

 private:
  QL_MEMBER Floats sixteen(const char* codes) const {
    const __m128i bytes = load<__m128i>(codes);
    __m512i q = F::is_signed ? _mm512_maskz_cvtepi8_epi32(0xffff, bytes) : _mm512_maskz_cvtepu8_epi32(0xffff, bytes);
    if constexpr (AFFINE) q = _mm512_sub_epi32(q, zero_point);
    return _mm512_maskz_cvtepi32_ps(0xffff, q);
  }
};

// True if BF16 holds every value of F, none of them, if it is no zero, below 2^-20 or from 2^20 on.
template <class F>
constexpr bool in_pairs = [] {
  if constexpr (!F::is_float) return true;
  else if constexpr (F::bits > 8) return false;
  else if constexpr (F::is_book) {
    for (uint32_t code = 0; code <= F::max_code; ++code) {
      const uint32_t bits = Book<F>::bits(code), exponent = bits >> 23 & 0xff;
      if (bits & 0xffff || (bits && (exponent < 127 - 20 || exponent >= 127 + 20))) return false;
    }
    return true;
  } else return F::fraction_bits <= 7 && F::bias + F::fraction_bits <= 21 && F::max < uint32_t(127 + 20) << 23;
}();

// Two codes a byte: looked up. 16 bytes hold every fourth code in the lowest bits of a word, and so they do shifted by
// 4, 8 and 12. The instruction takes the five lowest bits of a word, so the table holds all twice.
template <class F>
struct NibblePairs {
  static constexpr int order(int p) { return p % 8 * 4 + p / 8; }
  __m512i value, shift;

  QL_MEMBER explicit NibblePairs(int32_t z) {
    Ints<Floats> q;
    for (int code = 0; code < 16; ++code) q[code] = unpack<F>(uint8_t(code), 0);
    Floats values;
    if constexpr (F::is_float) values = decode_float<F, Floats>(same_bits<Bits<Floats>>(q));
    else values = Lanes<Floats>::of(q - z);
    value = upper_halves(values, values);
    uint16_t shifts[32];
    for (int p = 0; p < 32; ++p) shifts[p] = uint16_t(p / 8 * 4);
    shift = load_words(shifts);
  }
  QL_MEMBER Floats operator()(const char* codes) const {
    const __m512i four_times = _mm512_maskz_broadcast_i32x4(0xffff, load<__m128i>(codes));
    const __m512i nibbles = _mm512_srlv_epi16(four_times, shift);
    return same_bits<Floats>(_mm512_maskz_permutexvar_epi16(0xffffffff, nibbles, value));
  }
};

// Floats of a byte: the exponent is moved to BF16's bias; subnormals, infinity and NaN are looked up by five bits.
template <class F>
struct FloatPairs : NaturalOrder {
  static constexpr int first = 1 << F::fraction_bits;  // normal
  // No two of what is looked up share five bits, and it has the sign of its code.
  static constexpr bool serves = F::max_code >= uint32_t(96 + first) && F::has_negative_zero;
  __m512i special;

  QL_MEMBER explicit FloatPairs(int32_t) {
    uint16_t table[32];
    for (uint32_t code = 0; code < 32; ++code)
      table[code] = upper_half(decode_float<F>(code < uint32_t(first) ? code : code + 96));
    special = load_words(table);
  }
  QL_MEMBER Floats operator()(const char* codes) const {
    const __m512i code = _mm512_maskz_cvtepu8_epi16(0xffffffff, load<__m256i>(codes));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    __m512i bits = _mm512_add_epi16(_mm512_maskz_slli_epi16(0xffffffff, magnitude, 7 - F::fraction_bits),
                                    _mm512_set1_epi16((127 - F::bias) << 7));
    const __m512i place = _mm512_sub_epi16(magnitude, _mm512_set1_epi16(first));
    const __mmask32 is_special = _mm512_cmpgt_epu16_mask(place, _mm512_set1_epi16(int16_t(F::max_code) - first));
    bits = _mm512_mask_permutexvar_epi16(bits, is_special, magnitude, special);
    const __m512i sign =
        _mm512_and_si512(_mm512_maskz_slli_epi16(0xffffffff, code, 8), _mm512_set1_epi16(int16_t(0x8000)));
    return same_bits<Floats>(_mm512_or_si512(bits, sign));
  }
};

// Codes of any format, by FP32.
template <class F>
struct DecodedPairs : NaturalOrder {
  Ints<Floats> zero_point;

  QL_MEMBER explicit DecodedPairs(int32_t z) : zero_point(splat<Ints<Floats>>(z)) {}
  QL_MEMBER Floats operator()(const char* codes) const {
    alignas(64) int32_t q[32];
    for (int j = 0; j < 32 / F::per_byte; ++j)
      for (int i = 0; i < F::per_byte; ++i) q[F::per_byte * j + i] = unpack<F>(uint8_t(codes[j]), i);
    return same_bits<Floats>(upper_halves(value(load<Ints<Floats>>(q)), value(load<Ints<Floats>>(q + 16))));
  }

 private:
  QL_MEMBER Floats value(Ints<Floats> q) const {
    if constexpr (F::is_float) return decode_float<F, Floats>(same_bits<Bits<Floats>>(q));
    else return Lanes<Floats>::of(q - zero_point);
  }
};

template <class F, bool AFFINE>
QL_FN auto pairs_of(int32_t z) {
  if constexpr (F::per_byte == 2) return NibblePairs<F>(z);
  else if constexpr (!is_whole<F>) return DecodedPairs<F>(z);
  else if constexpr (!F::is_float) return BytePairs<F, AFFINE>(z);
  else if constexpr (FloatPairs<F>::serves) return FloatPairs<F>(z);
  else return DecodedPairs<F>(z);
}

}  // namespace QL_ISA
}  // namespace quantlib
#endif
