// The floats of one register of this instruction set, for the functions of numerics.h.
#pragma once
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../numerics.h"

namespace quantlib {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr int64_t kStep = 4 * kLanes;  // four registers of 32 bits make one of bytes

typedef float Floats __attribute__((vector_size(4 * kLanes)));

template <>
struct Lanes<Floats> {
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

  // The conversion rounds as DefaultFloats of loops.h sets it: to nearest, ties to even.
#if defined(__AVX512F__)  // masked, as g++ 12 warns about its own unmasked ones
  static QL_MEMBER Floats max(Floats a, Floats b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  static QL_MEMBER Floats min(Floats a, Floats b) { return _mm512_maskz_min_ps(0xffff, a, b); }
  static QL_MEMBER Ints nearest(Floats a) { return Ints(_mm512_maskz_cvtps_epi32(0xffff, a)); }
#elif defined(__AVX2__)
  static QL_MEMBER Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static QL_MEMBER Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static QL_MEMBER Ints nearest(Floats a) { return Ints(_mm256_cvtps_epi32(a)); }
#elif defined(__x86_64__)
  static QL_MEMBER Floats max(Floats a, Floats b) { return _mm_max_ps(a, b); }
  static QL_MEMBER Floats min(Floats a, Floats b) { return _mm_min_ps(a, b); }
  static QL_MEMBER Ints nearest(Floats a) { return Ints(_mm_cvtps_epi32(a)); }
#else
  static QL_MEMBER Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static QL_MEMBER Floats min(Floats a, Floats b) { return a < b ? a : b; }
  static QL_MEMBER Ints nearest(Floats a) { return same_bits<Ints>(a + 12582912.0f) - 0x4b400000; }
#endif
  static QL_MEMBER Floats of(Ints a) { return __builtin_convertvector(a, Floats); }
};

// Memory at any address.
template <class V>
QL_FN V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
QL_FN void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

#if defined(__AVX2__)
// A table of sixteen values fills one register of AVX-512, or two of AVX2.
template <>
struct LookUp<Floats> {
  template <class F>
  static QL_MEMBER Floats of(Bits<Floats> code) {
    const auto low = load<Floats>(Book<F>::table), high = load<Floats>(Book<F>::table + kLanes % 16);
    return __builtin_shuffle(low, high, Ints<Floats>(code & uint32_t(F::max_code)));
  }
};
#endif

// The registers of `from` to `to`, past the caches: for results too large to be found there again.
QL_FN void stream(const void* from, char* to, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += int64_t(sizeof(Floats))) {
    const auto* source = static_cast<const char*>(from) + k;
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float*>(to + k), load<Floats>(source));
#elif defined(__AVX2__)
    _mm256_stream_ps(reinterpret_cast<float*>(to + k), load<Floats>(source));
#elif defined(__x86_64__)
    _mm_stream_ps(reinterpret_cast<float*>(to + k), load<Floats>(source));
#else
    store(to + k, load<Floats>(source));
#endif
  }
}

// One register; what goes past the caches must be aligned.
QL_FN void put(char* to, Floats v, bool past_caches) {
  if (past_caches) stream(&v, to, sizeof v);
  else store(to, v);
}

// Bytes at p, one a lane
template <bool SIGNED>
QL_FN Ints<Floats> widen(const void* p) {
#if defined(__AVX512F__)
  const __m128i bytes = load<__m128i>(p);
  return Ints<Floats>(SIGNED ? _mm512_maskz_cvtepi8_epi32(0xffff, bytes) : _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return Ints<Floats>(SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__x86_64__)
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  const __m128i bytes = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(bytes, bytes);
  const __m128i upper = _mm_unpacklo_epi16(twice, twice);  // each byte four times in its lane
  return Ints<Floats>(SIGNED ? _mm_srai_epi32(upper, 24) : _mm_srli_epi32(upper, 24));
#else
  Ints<Floats> lanes;
  const auto* bytes = static_cast<const uint8_t*>(p);
  for (int l = 0; l < kLanes; ++l) lanes[l] = SIGNED ? int8_t(bytes[l]) : bytes[l];
  return lanes;
#endif
}

// The formats that every machine of this instruction set converts in hardware, to nearest and with subnormals.
template <class F>
constexpr bool in_hardware = false;
#ifdef __F16C__
template <>
constexpr bool in_hardware<float16> = true;
#endif

QL_FN void store_half([[maybe_unused]] void* p, [[maybe_unused]] Floats v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
#endif
}

QL_FN Floats load_half([[maybe_unused]] const void* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  return Floats{};
#endif
}

// The float16 of a, then of b
QL_FN Floats halves_of([[maybe_unused]] Floats a, [[maybe_unused]] Floats b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_castsi256_si512(_mm512_maskz_cvtps_ph(0xffff, a, 0));
  return Floats(_mm512_maskz_inserti64x4(0xff, low, _mm512_maskz_cvtps_ph(0xffff, b, 0), 1));
#elif defined(__F16C__)
  return Floats(_mm256_set_m128i(_mm256_cvtps_ph(b, 0), _mm256_cvtps_ph(a, 0)));
#else
  return Floats{};
#endif
}

// The upper 16 bits of the lanes of a, then of b
QL_FN Floats upper_halves(Bits<Floats> a, Bits<Floats> b) {
#if defined(__AVX512BW__)
  typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));
  Halves upper;
  for (int l = 0; l < 2 * kLanes; ++l) upper[l] = uint16_t(2 * l + 1);
  return Floats(__builtin_shuffle(Halves(a), Halves(b), upper));
#elif defined(__AVX2__)
  return Floats(_mm256_permute4x64_epi64(_mm256_packus_epi32(__m256i(a >> 16), __m256i(b >> 16)), 0xd8));
#elif defined(__x86_64__)
  return Floats(_mm_packs_epi32(_mm_srai_epi32(__m128i(a), 16), _mm_srai_epi32(__m128i(b), 16)));
#else
  uint16_t halves[2 * kLanes];
  for (int l = 0; l < kLanes; ++l) halves[l] = uint16_t(a[l] >> 16), halves[kLanes + l] = uint16_t(b[l] >> 16);
  return load<Floats>(halves);
#endif
}

// encode_float<F>(x, false) of a, then of b, for the formats of 16 bits
template <class F>
QL_FN Floats encode_pair(Floats a, Floats b) {
  if constexpr (F::bias == 127) {  // the upper half of FP32: rounding may carry into the exponent, and into infinity
    const auto rounded = [](Floats x) {
      const Bits<Floats> bits = bits_of(x);
      return x == x ? bits + (bits >> 16 & 1u) + 0x7fffu : splat<Bits<Floats>>(uint32_t(F::nan_code) << 16);
    };
    return upper_halves(rounded(a), rounded(b));
  } else if constexpr (in_hardware<F>) {
    return halves_of(canonical(a), canonical(b));
  } else {
    return upper_halves(encode_float<F>(a, false) << 16, encode_float<F>(b, false) << 16);
  }
}

}  // namespace quantlib
