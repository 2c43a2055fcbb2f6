// codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])
#include "quantize.h"

#include "fake_quantize.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// ---- x that becomes codes in registers ------------------------------------------------------------------------------

#ifdef QL_NARROW
// The lowest bytes of the lanes of t[0], then of t[1] .. t[3]
template <bool SIGNED>
QL_FN Floats lowest_bytes(const Ints<Floats> (&t)[4]) {
#ifdef __AVX512BW__
  const auto pack = [](Ints<Floats> a, Ints<Floats> b) { return _mm512_packs_epi32(__m512i(a), __m512i(b)); };
  const __m512i low = pack(t[0], t[1]), high = pack(t[2], t[3]);
  const __m512i bytes = SIGNED ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return Floats(_mm512_maskz_permutexvar_epi32(0xffff, order, bytes));
#else
  const __m256i low = _mm256_packs_epi32(__m256i(t[0]), __m256i(t[1]));
  const __m256i high = _mm256_packs_epi32(__m256i(t[2]), __m256i(t[3]));
  const __m256i bytes = SIGNED ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
  return Floats(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#endif
}

// Half a register: the lowest four bits of the bytes of v, two a byte
QL_FN void store_nibbles(Floats v, char* to) {
#ifdef __AVX512BW__
  const __m512i nibbles = _mm512_and_si512(__m512i(v), _mm512_set1_epi8(15));
  const __m512i pairs = _mm512_maddubs_epi16(nibbles, _mm512_set1_epi16(0x1001));
  store(to, _mm512_maskz_cvtepi16_epi8(0xffffffff, pairs));
#else
  const __m256i nibbles = _mm256_and_si256(__m256i(v), _mm256_set1_epi8(15));
  const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  store(to, _mm256_castsi256_si128(bytes));
#endif
}

// The values at p, but for the bits of a NaN: no code depends on them
template <class X>
QL_FN Floats load_input(const char* p) {
  if constexpr (X::bits == 16) {
    if constexpr (X::bias == 127) {
#ifdef __AVX512BW__
      return Floats(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(p)), 16));
#else
      return Floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16));
#endif
    }
  }
  return load_values<X>(p);
}

// codes of kStep elements of x: the first half of them times r[0], the second times r[1]
template <class F, class X, bool AFFINE>
QL_FN void quantize_step(const char* x, const Floats (&r)[2], const Ints<Floats> (&z)[2], bool past_caches,
                         char* codes) {
  Ints<Floats> code[4];
#pragma GCC unroll 4
  for (int h = 0; h < 4; ++h) {
    const Floats t = mul(load_input<X>(x + bytes_of<X>(h * kLanes)), r[h / 2]);
    if constexpr (F::is_float) code[h] = Ints<Floats>(encode_float<F>(t, true));
    else code[h] = encode_int<F, AFFINE>(t, AFFINE ? z[h / 2] : Ints<Floats>{});
  }
  bool is_signed = false;
  if constexpr (!F::is_float) is_signed = F::is_signed;
  const Floats bytes = is_signed ? lowest_bytes<true>(code) : lowest_bytes<false>(code);
  if constexpr (F::per_byte == 2) store_nibbles(bytes, codes);
  else put(codes, bytes, past_caches);
}

template <class F, class X, bool AFFINE>
void quantize_blocks(const char* __restrict__ x, const float* r, const int32_t* zero_point, int64_t first, int64_t bk,
                     const Store& how, char* __restrict__ codes, int64_t n) {
  const bool past_caches = how.stream && uintptr_t(codes) % sizeof(Floats) == 0;
  int64_t left = first;  // elements of the block r[0]
  Floats factor[2] = {};
  Ints<Floats> z[2] = {};
  const auto next = [&](int h) QL_INLINE {
    if (left <= 0) left = bk, ++r, zero_point += AFFINE;
    factor[h] = same_bits<Floats>(splat<Bits<Floats>>(load<uint32_t>(r)));  // g++ 12 adds zero to a float first
    if constexpr (AFFINE) z[h] = splat<Ints<Floats>>(*zero_point);
    left -= kPair;
  };
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    for (int64_t k = 0; k < kStep * how.next_bytes; k += 64)
      __builtin_prefetch(how.next + j * how.next_bytes + k, 0, 2);
    next(0), next(1);
    quantize_step<F, X, AFFINE>(x + bytes_of<X>(j), factor, z, past_caches, codes + bytes_of<F>(j));
  }
  if (j == n) return;
  next(0), next(1);
  char x_rest[kStep * 4] = {}, rest[kStep] = {};
  __builtin_memcpy(x_rest, x + bytes_of<X>(j), size_t(bytes_of<X>(n - j)));
  quantize_step<F, X, AFFINE>(x_rest, factor, z, false, rest);
  if (F::per_byte == 2 && (n - j) % 2) rest[(n - j) / 2] &= 15;  // zero may have the code of a zero point, or a sign
  __builtin_memcpy(codes + bytes_of<F>(j), rest, size_t(bytes_of<F>(n - j)));
}

template <class F, bool AFFINE>
QuantizeBlocks of_input(Type x_type) {
  return x_type == Type::bfloat16  ? quantize_blocks<F, bfloat16, AFFINE>
         : x_type == Type::float16 ? quantize_blocks<F, float16, AFFINE>
                                   : quantize_blocks<F, float32, AFFINE>;
}
#endif

}  // namespace

QuantizeBlocks quantize_blocks([[maybe_unused]] Type format, [[maybe_unused]] Type x_type,
                               [[maybe_unused]] bool affine) {
#ifdef QL_NARROW
  return visit(format, [&](auto f) -> QuantizeBlocks {
    using F = decltype(f);
    if constexpr (F::bits > 8 || F::per_byte > 2 || is_upper_byte<F>) return nullptr;
    else if constexpr (!F::is_float) return affine ? of_input<F, true>(x_type) : of_input<F, false>(x_type);
    else if constexpr (F::is_book) return nullptr;
    else return of_input<F, false>(x_type);
  });
#else
  return nullptr;
#endif
}

void quantize(const Quantize& p, ParallelFor run) {
  QuantizeRows rows(p);
  // A flat problem in pieces of one row, a matrix in pieces that reuse the
  // scales of a chunk from row to row.
  const bool flat = rows.grid.M == 1;
  if (!flat) rows.ahead = rows.grid.K;  // hardware looks ahead along a row only
  parallel_pieces(run, rows.grid, flat ? 1 : 64, flat ? kGrain : kChunk,
                  [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) { rows(i0, i1, j0, j1); });
}

}  // namespace QL_ISA
}  // namespace quantlib
