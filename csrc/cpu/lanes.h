// As many floats as a register of this instruction set holds, for the functions of numerics.h.
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

}  // namespace quantlib
