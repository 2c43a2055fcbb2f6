// Shared by the products with a float x: x as it is multiplied, how codes are decoded, which kernel multiplies.
//
// All 32 bits of what is multiplied are one unit: a float, or two BF16 that are multiplied and added together. In BF16,
// and in FP32 by AVX2, codes are multiplied as they are, and sums by the scale.
#pragma once
#include "../ops/dequant_matmul.h"
#include "matmul.h"
#include "pairs.h"
#include "values.h"

#if defined(__AVX512BF16__) || defined(QL_VALUES)
#define QL_CODES
#endif

namespace quantlib {
namespace QL_ISA {

constexpr int64_t kUnits = 16;  // of a row of the weight in a step: 64 bytes
constexpr int64_t kGroup = 16;  // rows of the weight whose steps lie together, a step of each in turn: a tile
constexpr int64_t kTileFloats = kUnits * kGroup;
template <class E>
constexpr int64_t kStepColumns = kUnits * 4 / int64_t(sizeof(E));

// True if codes are multiplied, false if the weight in FP32 is.
template <class E>
constexpr bool scales_sums = true;
template <>
constexpr bool scales_sums<float> = false;
// Columns that are decoded together
template <class E>
constexpr int64_t kWhole = scales_sums<E> ? 32 : kStepColumns<E>;
#ifdef __AVX512BF16__
using Unit = uint16_t;
#elif defined(QL_VALUES)
using Unit = Value;
#else
using Unit = float;
#endif

// The value in all lanes: splat adds it to zeros, which may turn -0 into +0.
QL_FN Floats everywhere(const float& value) {
#if defined(__AVX512F__)
  return Floats(_mm512_set1_ps(value));
#else
  return splat<Floats>(value);
#endif
}

template <class E>
QL_FN Floats multiply_add(Floats x, Floats w, Floats sum) {
#ifdef __AVX512BF16__
  // The instruction takes subnormals for zeros: what it is given has none, nor have its sums.
  if constexpr (sizeof(E) == 2) return _mm512_dpbf16_ps(sum, same_bits<__m512bh>(x), same_bits<__m512bh>(w));
#endif
  return fma(x, w, sum);
}

// ---- x --------------------------------------------------------------------------------------------------------------

// The rows of x in a chunk: row r of it is row `list[m0 + r]` of x, or m0 + r.
struct Source {
  const void* x;
  Type type;
  int64_t K;
  const int64_t* list;
  const Decode decode = decoder(type);
  const Row row = row_of(type);

  const char* at(int64_t m, int64_t k) const {
    return static_cast<const char*>(x) + byte_offset(row, K, list ? list[m] : m, k);
  }
  // out[j] = x[m, k + j] for j < n, zeros up to `whole`
  void floats(int64_t m, int64_t k, int64_t n, int64_t whole, float* out) const {
    if (decode) decode(at(m, k), false, out, n);
    else __builtin_memcpy(out, at(m, k), size_t(n) * 4);
    for (int64_t j = n; j < whole; ++j) out[j] = 0.0f;
  }
};

#ifdef QL_CODES
// True if a value of x is no zero and not within [2^-80, 2^80): a product or sum might underflow or overflow.
template <class U>
bool is_odd(const U* x, int64_t K) {
  constexpr int shift = sizeof(U) == 2 ? 7 : 23;
  U odd = 0;
  for (int64_t k = 0; k < K; ++k) {
    const U magnitude = x[k] & U(U(~U(0)) >> 1);
    odd |= U(magnitude != 0) & U(U(magnitude - (U(127 - 80) << shift)) >= (U(160) << shift));
  }
  return odd;
}

#endif

#ifdef __AVX512BF16__
// 32 floats of x as BF16, or what is left of them
QL_FN __m512i part_of(const float* x, int part) {
  Floats a = load<Floats>(x), b = load<Floats>(x + 16);
  const auto rounded = [](Floats a, Floats b) {
    return same_bits<__m512i>(_mm512_cvtne2ps_pbh(same_bits<__m512>(b), same_bits<__m512>(a)));
  };
  const __m512i high = rounded(a, b);
  if (!part) return high;
  const auto widened = [](__m256i words) {
    return same_bits<Floats>(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, words), 16));
  };
  a = a - widened(_mm512_maskz_extracti64x4_epi64(0xf, high, 0));
  b = b - widened(_mm512_maskz_extracti64x4_epi64(0xf, high, 1));
  return rounded(a, b);
}

// Row m of x in BF16, `order` for each 32 columns, and what it lacks where x has more bits; whether it is odd
static inline bool pack_row(const Source& from, int64_t m, const uint16_t (&order)[32], float* high, float* low) {
  const __m512i places = load_words(order);
  const bool direct = from.type == Type::bfloat16;
  bool odd = false;
  for (int64_t k = 0; k < from.K; k += 32) {
    const int64_t n = least(32, from.K - k);
    alignas(64) float x[32] = {};
    if (direct) {
      __builtin_memcpy(x, from.at(m, k), size_t(n) * 2);
      odd |= is_odd(reinterpret_cast<const uint16_t*>(x), n);
    } else {
      from.floats(m, k, n, 32, x);
      odd |= is_odd(reinterpret_cast<const uint32_t*>(x), n);
      store(low + k / 2, _mm512_maskz_permutexvar_epi16(0xffffffff, places, part_of(x, 1)));
    }
    store(high + k / 2, _mm512_maskz_permutexvar_epi16(0xffffffff, places, direct ? load<__m512i>(x) : part_of(x, 0)));
  }
  return odd;
}
#elif defined(QL_VALUES)
// Row m of x, `order` for each 32 columns; whether it is odd
static inline bool pack_row(const Source& from, int64_t m, const uint16_t (&order)[32], float* to) {
  constexpr int64_t part = 512;
  alignas(64) float x[part];
  bool in_order = true;
  for (int p = 0; p < 32; ++p) in_order &= order[p] == p;
  bool odd = false;
  for (int64_t k = 0; k < from.K; k += part) {
    const int64_t n = least(part, from.K - k), whole = round_up(n, 32);
    float* const out = in_order ? to + k : x;
    from.floats(m, k, n, whole, out);
    odd |= is_odd(reinterpret_cast<const uint32_t*>(out), n);
    for (int64_t j = 0; !in_order && j < whole; j += 32)
      for (int p = 0; p < 32; ++p) to[k + j + p] = x[j + order[p]];
  }
  return odd;
}
#endif

// ---- codes ----------------------------------------------------------------------------------------------------------

#ifdef __AVX512BF16__
// out[r] = the values of `columns` codes of row r less z, a step of kTileFloats after the other; whole steps. Rows of
// codes are `stride` bytes apart. What lies `ahead` bytes behind them is fetched, to the first level: a Zen 5 does not
// follow the hint for the second in time.
template <class F, bool AFFINE, int ROWS>
void decode_pairs(const char* codes, int64_t stride, int64_t ahead, int32_t z, int64_t columns, float* out) {
  const auto pairs = pairs_of<F, AFFINE>(z);
  for (; columns >= 32; columns -= 32, codes += bytes_of<F>(32), out += kTileFloats)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      if (ahead) __builtin_prefetch(codes + r * stride + ahead, 0, 3);
      store(out + r * kUnits, pairs(codes + r * stride));
    }
  if (!columns) return;
  for (int r = 0; r < ROWS; ++r) {
    char rest[32] = {};
    __builtin_memcpy(rest, codes + r * stride, size_t(bytes_of<F>(columns)));
    store(out + r * kUnits, pairs(rest));
  }
}

template <class F, bool AFFINE, int ROWS>
constexpr auto decode_codes = decode_pairs<F, AFFINE, ROWS>;
template <class F>
using CodesOf = decltype(pairs_of<F, true>(0));
template <class F>
constexpr bool in_units = in_pairs<F>;
#elif defined(QL_VALUES)
// The same in FP32, 32 columns at a time
template <class F, bool AFFINE, int ROWS>
void decode_values(const char* codes, int64_t stride, int64_t ahead, int32_t z, int64_t columns, float* out) {
  const auto values = values_of<F, AFFINE>(z);
  const auto two_steps = [&](const char* codes, float* out) __attribute__((always_inline)) {
    Floats v[4];
    values(codes, v);
    store(out, v[0]), store(out + kLanes, v[1]);
    store(out + kTileFloats, v[2]), store(out + kTileFloats + kLanes, v[3]);
  };
  for (; columns >= 32; columns -= 32, codes += bytes_of<F>(32), out += 2 * kTileFloats)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      if (ahead) __builtin_prefetch(codes + r * stride + ahead, 0, 3);
      two_steps(codes + r * stride, out + r * kUnits);
    }
  if (!columns) return;
  for (int r = 0; r < ROWS; ++r) {
    char rest[32] = {};
    __builtin_memcpy(rest, codes + r * stride, size_t(bytes_of<F>(columns)));
    two_steps(rest, out + r * kUnits);
  }
}

template <class F, bool AFFINE, int ROWS>
constexpr auto decode_codes = decode_values<F, AFFINE, ROWS>;
template <class F>
using CodesOf = decltype(values_of<F, true>(0));
template <class F>
constexpr bool in_units = in_values<F>;
#else
template <class F>
constexpr bool in_units = false;
#endif

constexpr int kTogether = 4;  // rows whose steps are stored side by side

struct CodeKernels {
  using Rows = void (*)(const char* codes, int64_t stride, int64_t ahead, int32_t z, int64_t columns, float* out);
  Rows decode, decode_together;  // a row; kTogether rows that have no zero points
  uint16_t order[32];
};

#ifdef QL_CODES
// The kernels that decode codes of a format whose values are units; null for others.
static inline CodeKernels code_kernels(Type format, bool affine) {
  return visit(format, [&](auto f) -> CodeKernels {
    using F = decltype(f);
    if constexpr (!in_units<F>) return {};
    else {
      CodeKernels kernels = {decode_codes<F, false, 1>, decode_codes<F, false, kTogether>, {}};
      if constexpr (!F::is_float)
        if (affine) kernels.decode = decode_codes<F, true, 1>, kernels.decode_together = nullptr;
      for (int p = 0; p < 32; ++p) kernels.order[p] = uint16_t(CodesOf<F>::order(p));
      return kernels;
    }
  });
}
#endif

// ---- the kernel -----------------------------------------------------------------------------------------------------

constexpr int64_t kLeastSplit = 64;  // columns from which on two parts of BF16 stand for a float: docs/contract.md, C11
// Rows of x, at most, whose products with a weight in FP32 are made by dots
constexpr int64_t kFew = kLanes == 16 ? 10 : 6;

struct Plan {
  enum Way { dots, columns, blocks };
  bool by_codes;  // as E of scales_sums; or the weight in FP32
  Way way;
  int64_t parts;       // of BF16 that add up to a value of x
  int64_t MC, NC, KC;  // rows of x, of the weight, columns
  bool tiles;          // AMX
  CodeKernels codes;
  const char* why;  // that way: matmul_choice.h
};

}  // namespace QL_ISA
}  // namespace quantlib
