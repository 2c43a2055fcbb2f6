// Codes of 8 and of 4 bits to FP32, a register of 16-bit words at a time, and FP32 to E5M2, in few instructions of AVX2
// and F16C or of AVX-512: the same bits as numerics.h, which serves every other format and instruction set.
#pragma once
#include "../packing.h"
#include "lanes.h"

namespace quantlib {

constexpr int64_t kPair = 2 * kLanes;  // elements: two registers of FP32, one of 16 bits

#if defined(__AVX2__) && defined(__F16C__) && (defined(__AVX512BW__) || !defined(__AVX512F__))
#define QL_NARROW
constexpr bool has_narrow = true;
#else
constexpr bool has_narrow = false;
#endif

// Formats of 8 bits whose magnitude, shifted to the fraction of float16, is a float16 but for the bias: the processor
// knows its subnormals then.
template <class F>
constexpr bool find_short_half() {
  if constexpr (has_narrow && F::is_float && F::bits == 8)
    return F::has_negative_zero && (F::exponent_bits < 5 ? !F::has_inf : F::has_inf && F::bias == 15);
  else return false;
}
template <class F>
constexpr bool is_short_half = find_short_half<F>();

// True if the codes of F are the upper byte of a float16.
template <class F>
constexpr bool find_upper_byte() {
  if constexpr (is_short_half<F>) return F::exponent_bits == 5;
  else return false;
}
template <class F>
constexpr bool is_upper_byte = find_upper_byte<F>();

// Float formats of 4 bits, whose values are float16 with a lower byte of 0.
template <class F>
constexpr bool find_short_float() {
  if constexpr (has_narrow && F::is_float && F::bits == 4) return !F::is_book && F::has_negative_zero && !F::has_nan;
  else return false;
}
template <class F>
constexpr bool is_short_float = find_short_float<F>();

// Codes that decode_pair takes from their bytes to a register.
template <class F>
constexpr bool narrow_in_pairs = is_short_half<F> || (has_narrow && F::bits == 4) || (!F::is_float && is_whole<F>);

// decode_pair(codes) * unit<F> is what the codes are worth.
template <class F>
constexpr uint32_t find_unit() {
  if constexpr (is_short_half<F>) return uint32_t(127 + 15 - F::bias) << 23;
  else return 127u << 23;
}
template <class F>
constexpr uint32_t unit = find_unit<F>();

// A NaN that rounding to bfloat16 makes its one NaN: no carry reaches the exponent.
constexpr uint32_t kRoundedNaN = 0x7fff0000u;

// The upper byte of each value of F as float16.
template <class F>
struct UpperBytes {
  uint8_t of[16];
  constexpr UpperBytes() : of() {
    constexpr int magnitudes = 1 << (F::bits - 1), fractions = 1 << F::fraction_bits, up = 2 - F::fraction_bits;
    for (int code = 0; code < magnitudes; ++code) {
      int exponent = code / fractions, fraction = code % fractions;
      if (!exponent) {  // a subnormal, which has a leading one in float16
        for (exponent = 1; fraction && fraction < fractions; fraction *= 2) --exponent;
        if (!fraction) exponent = F::bias - 15;
      }
      of[code] = uint8_t((exponent + 15 - F::bias) << 2 | (fraction % fractions) << up);
      of[code + magnitudes] = uint8_t(of[code] | 0x80);
    }
  }
};

#ifdef QL_NARROW

// True if the sixteen results that the nibbles of a block can have are looked up, in Y.
template <class Y>
constexpr bool has_table = Y::bits == 16 || kLanes == 16;
constexpr uint8_t kEveryNibble[] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe,  // kPair of them
                                    0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe};

typedef int16_t Words __attribute__((vector_size(2 * kPair)));

// kPair bytes, one a word
QL_FN Words widen_words(const void* p) {
#ifdef __AVX512BW__
  return Words(_mm512_maskz_cvtepu8_epi16(~0u, load<__m256i>(p)));
#else
  return Words(_mm256_cvtepu8_epi16(load<__m128i>(p)));
#endif
}

QL_FN void halves_to_floats(Words halves, Floats (&t)[2]) {
#ifdef __AVX512BW__
  const auto both = __m512i(halves);
  t[0] = _mm512_maskz_cvtph_ps(0xffff, _mm512_castsi512_si256(both));
  t[1] = _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(15, both, 1));
#else
  t[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(__m256i(halves)));
  t[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(__m256i(halves), 1));
#endif
}

// kLanes nibbles, the lower of a byte first, each the lowest four bits of a lane; the others are arbitrary
QL_FN Bits<Floats> nibble_lanes(const void* p) {
  typedef uint64_t Twos __attribute__((vector_size(4 * kLanes)));
#ifdef __AVX512BW__
  const auto bytes = Twos(_mm512_maskz_cvtepu8_epi64(0xff, _mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  const auto bytes = Twos(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load<int32_t>(p))));
#endif
  return Bits<Floats>(bytes | bytes << 28);
}

template <class F>
QL_FN void decode_short_half(const void* codes, Floats (&t)[2]) {
  constexpr int up = 10 - F::fraction_bits, highest = F::has_inf ? F::overflow_code : F::max_code;
  const Words code = widen_words(codes), magnitude = (code & 0x7f) << up;
  Words half = magnitude | (code & 0x80) << 8;
  if constexpr (F::has_nan) half = magnitude > int16_t(highest << up) ? Words{} + 0x7ff8 : half;  // kRoundedNaN
  halves_to_floats(half, t);
}

#ifdef __AVX512BW__

// Sixteen values for the nibbles that count them: a register of FP32, or of 16 bits, where each is there twice
struct Table {
  Floats values;
};

QL_FN Table table_of(const void* values) { return {load<Floats>(values)}; }

// A register of Y: the values of 16 nibbles, or of 32 where Y has 16 bits
template <class Y>
QL_FN Floats look_up(const Table& table, const void* codes) {
  if constexpr (Y::bits == 32) {
    return _mm512_maskz_permutexvar_ps(0xffff, __m512i(nibble_lanes(codes)), table.values);
  } else {  // the instruction takes the five lowest bits of a word
    const auto bytes = Bits<Floats>(widen<false>(codes));
    return Floats(_mm512_maskz_permutexvar_epi16(~0u, __m512i(bytes | bytes << 12), __m512i(table.values)));
  }
}

// The values of n nibbles, as far as they fill registers -> how many do
template <class Y>
QL_FN int64_t look_up(const Table& table, const char* codes, int64_t n, bool past_caches, char* y) {
  constexpr int64_t step = kLanes * 32 / Y::bits;
  int64_t j = 0;
  for (; j + step <= n; j += step) put(y + bytes_of<Y>(j), look_up<Y>(table, codes + j / 2), past_caches);
  return j;
}

template <class F>
QL_FN void decode_narrow(const void* codes, Floats (&t)[2]) {
  if constexpr (is_short_half<F>) {
    decode_short_half<F>(codes, t);
  } else {
    Ints<Floats> every;
    for (int code = 0; code < 16; ++code) every[code] = unpack<F>(uint8_t(code), 0);
    Table table;
    if constexpr (F::is_float) table.values = decode_float<F, Floats>(Bits<Floats>(every));
    else table.values = Lanes<Floats>::of(every);
    for (int h = 0; h < 2; ++h) t[h] = look_up<float32>(table, static_cast<const char*>(codes) + h * kLanes / 2);
  }
}

#else

// 8 bytes -> their 16 nibbles, the lower of a byte first
QL_FN __m128i nibbles(const void* p) {
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p)), four = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(bytes, four), _mm_and_si128(_mm_srli_epi16(bytes, 4), four));
}

template <class F>
QL_FN void decode_narrow(const void* codes, Floats (&t)[2]) {
  if constexpr (is_short_half<F>) {
    decode_short_half<F>(codes, t);
  } else if constexpr (is_short_float<F>) {
    static constexpr UpperBytes<F> table;
    const __m128i upper = _mm_shuffle_epi8(load<__m128i>(table.of), nibbles(codes)), zero = _mm_setzero_si128();
    halves_to_floats(Words(_mm256_set_m128i(_mm_unpackhi_epi8(zero, upper), _mm_unpacklo_epi8(zero, upper))), t);
  } else {
    __m128i code = nibbles(codes);
    if constexpr (F::is_signed) code = _mm_sub_epi8(_mm_xor_si128(code, _mm_set1_epi8(8)), _mm_set1_epi8(8));
    for (int h = 0; h < 2; ++h, code = _mm_srli_si128(code, 8)) {
      const auto wide = Ints<Floats>(F::is_signed ? _mm256_cvtepi8_epi32(code) : _mm256_cvtepu8_epi32(code));
      if constexpr (F::is_float) t[h] = decode_float<F, Floats>(Bits<Floats>(wide));
      else t[h] = Lanes<Floats>::of(wide);
    }
  }
}

// Sixteen values of 16 bits, for the nibbles that count them: their lower bytes and their upper ones
struct Table {
  __m128i lower, upper;
};

QL_FN Table table_of(const void* values) {
  const auto* v = static_cast<const __m128i*>(values);
  const __m128i a = _mm_loadu_si128(v), b = _mm_loadu_si128(v + 1), byte = _mm_set1_epi16(0xff);
  return {_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)),
          _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
}

// The values of 16 nibbles, which 8 bytes hold
QL_FN Floats look_up(const Table& table, const void* codes) {
  const __m128i code = nibbles(codes);
  const __m128i lower = _mm_shuffle_epi8(table.lower, code), upper = _mm_shuffle_epi8(table.upper, code);
  return Floats(_mm256_set_m128i(_mm_unpackhi_epi8(lower, upper), _mm_unpacklo_epi8(lower, upper)));
}

// The values of 64 nibbles, which 32 bytes hold: an instruction looks up a byte of 32 of them.
QL_FN void look_up(const Table& table, const void* codes, Floats (&y)[4]) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), four = _mm256_set1_epi8(15);
  const __m256i bytes = _mm256_permutevar8x32_epi32(load<__m256i>(codes), order);
  const __m256i lower = _mm256_broadcastsi128_si256(table.lower), upper = _mm256_broadcastsi128_si256(table.upper);
  __m256i part[2][2];  // of the even codes and of the odd ones
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    const __m256i code = _mm256_and_si256(odd ? _mm256_srli_epi16(bytes, 4) : bytes, four);
    const __m256i a = _mm256_shuffle_epi8(lower, code), b = _mm256_shuffle_epi8(upper, code);
    part[odd][0] = _mm256_unpacklo_epi8(a, b), part[odd][1] = _mm256_unpackhi_epi8(a, b);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    y[2 * h] = Floats(_mm256_unpacklo_epi16(part[0][h], part[1][h]));
    y[2 * h + 1] = Floats(_mm256_unpackhi_epi16(part[0][h], part[1][h]));
  }
}

// The values of n nibbles, as far as they fill registers -> how many do
template <class Y>
QL_FN int64_t look_up(const Table& table, const char* codes, int64_t n, bool past_caches, char* y) {
  int64_t j = 0;
  for (; j + 4 * kPair <= n; j += 4 * kPair) {
    Floats four[4];
    look_up(table, codes + j / 2, four);
    for (int64_t h = 0; h < 4; ++h) put(y + bytes_of<Y>(j + h * kPair), four[h], past_caches);
  }
  for (; j + kPair <= n; j += kPair) put(y + bytes_of<Y>(j), look_up(table, codes + j / 2), past_caches);
  return j;
}

#endif

// bfloat16 of a, then of b, in which no NaN is but kRoundedNaN, and nothing but zero below 2^-126
QL_FN Floats round_pair(Floats a, Floats b) {
#ifdef __AVX512BF16__
  return Floats(_mm512_cvtne2ps_pbh(b, a));
#else
  const auto rounded = [](Floats x) { return bits_of(x) + (bits_of(x) >> 16 & 1u) + 0x7fffu; };
  return upper_halves(rounded(a), rounded(b));
#endif
}

// The float16 whose upper byte is the code of x, rounded once, in FP32: x + m has its last place where that of the code
// is, m being 1.5 times a power of two above x.
template <class F>
QL_FN Floats round_to_upper_byte(Floats x, bool saturate) {
  constexpr int32_t smallest = (127 - 14) << 23, beyond = (127 + 16) << 23, up = 21 << 23 | 1 << 22;
  const auto exponent = Ints<Floats>(bits_of(x) & kInfinity);
  const Ints<Floats> least = exponent < smallest ? splat<Ints<Floats>>(smallest) : exponent;
  const Ints<Floats> within = least > beyond ? splat<Ints<Floats>>(beyond) : least;
  const Floats m = Floats(within + up);
  Floats y = sub(add(x, m), m);
  if (saturate) y = min(splat<Floats>(float_of(F::max)), max(splat<Floats>(-float_of(F::max)), y));  // a NaN stays
  y = Floats(Bits<Floats>(y) | (bits_of(x) & 0x80000000u));
  return y == y ? y : same_bits<Floats>(splat<Bits<Floats>>(0x7fe00000u));
}

// The upper bytes of 2 * kPair float16
QL_FN void store_upper_bytes(Words a, Words b, void* codes) {
  typedef uint16_t Unsigned __attribute__((vector_size(2 * kPair)));
  a = Words(Unsigned(a) >> 8), b = Words(Unsigned(b) >> 8);
#ifdef __AVX512BW__
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  store(codes, _mm512_maskz_permutexvar_epi64(0xff, order, _mm512_packus_epi16(__m512i(a), __m512i(b))));
#else
  store(codes, _mm256_permute4x64_epi64(_mm256_packus_epi16(__m256i(a), __m256i(b)), 0xd8));
#endif
}

#endif

// t = the values of kPair codes, in units of unit<F>; the integers of int8 and uint8 themselves.
template <class F>
QL_FN void decode_pair(const void* codes, Floats (&t)[2]) {
#ifdef QL_NARROW
  if constexpr (F::is_float || !is_whole<F>) return decode_narrow<F>(codes, t);
#endif
  for (int64_t h = 0; h < 2; ++h)
    t[h] = Lanes<Floats>::of(widen<F::is_signed>(static_cast<const char*>(codes) + h * kLanes));
}

}  // namespace quantlib
