// Shared by the matmuls: registers that multiply and add, squares of lanes, rows of x as they are multiplied, rows of
// a decoded weight.
#pragma once
#include <new>

#include "../packing.h"
#include "lanes.h"
#include "loops.h"
#include "narrow.h"

namespace quantlib {
namespace QL_ISA {

constexpr int64_t kXRows = 128;  // rows of x that meet one decoded piece of the weight
#ifdef __AVX512F__
constexpr int kRowTile = 6;  // of them at once: with four registers a row, 24 of 32 are sums
#else
constexpr int kRowTile = 3;
#endif

// a * b + c, rounded once where the instruction set can
QL_FN Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Lane c of register r becomes lane r of register c.
template <class V>
QL_FN void transpose(V (&v)[kLanes]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = _mm256_unpacklo_ps(__m256(v[r]), __m256(v[r + 1]));
    pairs[r + 1] = _mm256_unpackhi_ps(__m256(v[r]), __m256(v[r + 1]));
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      fours[r + 2 * i] = _mm256_shuffle_ps(pairs[r + i], pairs[r + 2 + i], 0x44);
      fours[r + 2 * i + 1] = _mm256_shuffle_ps(pairs[r + i], pairs[r + 2 + i], 0xee);
    }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    v[r] = V(_mm256_permute2f128_ps(fours[r], fours[r + 4], 0x20));
    v[r + 4] = V(_mm256_permute2f128_ps(fours[r], fours[r + 4], 0x31));
  }
#elif defined(__AVX512F__)
  // Shuffles that need no register of places: g++ 12 makes one lane by lane.
  __m512 t[kLanes];
#pragma GCC unroll 4
  for (int r = 0; r < kLanes; r += 4) {
    const auto a = __m512(v[r]), b = __m512(v[r + 1]), c = __m512(v[r + 2]), d = __m512(v[r + 3]);
    const auto ab = __m512d(_mm512_maskz_unpacklo_ps(0xffff, a, b)),
               cd = __m512d(_mm512_maskz_unpacklo_ps(0xffff, c, d));
    const auto AB = __m512d(_mm512_maskz_unpackhi_ps(0xffff, a, b)),
               CD = __m512d(_mm512_maskz_unpackhi_ps(0xffff, c, d));
    t[r] = __m512(_mm512_maskz_unpacklo_pd(0xff, ab, cd)), t[r + 1] = __m512(_mm512_maskz_unpackhi_pd(0xff, ab, cd));
    t[r + 2] = __m512(_mm512_maskz_unpacklo_pd(0xff, AB, CD)),
          t[r + 3] = __m512(_mm512_maskz_unpackhi_pd(0xff, AB, CD));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto even = [](__m512 a, __m512 b) { return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88); };
    const auto odd = [](__m512 a, __m512 b) { return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd); };
    const __m512 low = even(t[i], t[4 + i]), high = even(t[8 + i], t[12 + i]);
    const __m512 LOW = odd(t[i], t[4 + i]), HIGH = odd(t[8 + i], t[12 + i]);
    v[i] = V(even(low, high)), v[8 + i] = V(odd(low, high));
    v[4 + i] = V(even(LOW, HIGH)), v[12 + i] = V(odd(LOW, HIGH));
  }
#else
#pragma GCC unroll 4
  for (int half = 1; half < kLanes; half *= 2) {
    Ints<Floats> low, high;
    for (int l = 0; l < kLanes; ++l) {
      low[l] = l & half ? l - half + kLanes : l;
      high[l] = l & half ? l + kLanes : l + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & half)) {
        const V a = v[i], b = v[i + half];
        v[i] = __builtin_shuffle(a, b, low), v[i + half] = __builtin_shuffle(a, b, high);
      }
  }
#endif
}

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory for one call, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(::operator new(size_t(bytes), std::align_val_t(64))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

// Codes that are fetched while others are multiplied, some lines with each step: so many bytes of each of some rows.
// All at once, as codes are decoded, would be more than a core can ask for: it would wait.
struct CodesAhead {
  const char* row;
  int64_t stride, rows, bytes, lines;  // lines: a step
  int64_t at = 0;                      // of the row

  QL_MEMBER void fetch() {
    for (int64_t l = 0; l < lines && rows > 0; ++l) {
      __builtin_prefetch(row + at, 0, 3);
      at += 64;
      if (at >= bytes) row += stride, --rows, at = 0;
    }
  }
};

// Row m of x is data[m * stride .. + K), zeros behind it up to a whole register.
template <class E>
struct Rows {
  const E* data;
  int64_t stride;
};

// out[r, k] = x[rows[r], k] in FP32, for r < n and k < stride; rows r are m0 + r where there is no list
static inline void gather_rows(ParallelFor run, const void* x, Type type, int64_t K, const int64_t* rows, int64_t m0,
                               int64_t n, float* out, int64_t stride) {
  const Decode decode = decoder(type);
  const Row row = row_of(type);
  parallel(run, n, most(1, kGrain / most(1, stride)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* in = static_cast<const char*>(x) + byte_offset(row, K, rows ? rows[r] : m0 + r, 0);
      float* to = out + r * stride;
      if (decode) decode(in, false, to, K);
      else __builtin_memcpy(to, in, size_t(K) * 4);
      for (int64_t k = K; k < stride; ++k) to[k] = 0.0f;
    }
  });
}

// out[j] = code J + j of a row of integers
static inline void integers(const uint8_t* row, int64_t J, int64_t count, const Row& f, int32_t* __restrict__ out) {
  int64_t j = 0;
  if (f.per_byte == 2 && J % 2 == 0) {
    const int32_t sign = f.is_signed ? 8 : 0;
    const uint8_t* bytes = row + J / 2;
#ifdef QL_NARROW
    for (; j + kLanes <= count; j += kLanes)
      store(out + j, ((Ints<Floats>(nibble_lanes(bytes + j / 2)) & 15) ^ sign) - sign);
#endif
    for (; j + 1 < count; j += 2) {
      out[j] = ((bytes[j / 2] & 15) ^ sign) - sign;
      out[j + 1] = ((bytes[j / 2] >> 4) ^ sign) - sign;
    }
  }
  for (; j < count; ++j) out[j] = integer_of(row, J + j, f);
}

// ---- the weight -----------------------------------------------------------------------------------------------------

// A weight [N, K] with what its type says looked up.
struct WeightRows {
  const Weight& w;
  const Row format = row_of(w.format);
  const Decode decode = decoder(w.format);
  const int64_t K = w.grid.K, br = most(1, least(w.grid.br, w.grid.M)), bk = most(1, least(w.grid.bk, K));
  const int64_t cols = (K + bk - 1) / bk;

  explicit WeightRows(const Weight& w) : w(w) {}

  float scale(int64_t n, int64_t J) const {
    float s;
    row_scales(n, J, 1, &s);
    return s;
  }
  // out[j] = scale(n, J + j) for j < count
  void row_scales(int64_t n, int64_t J, int64_t count, float* __restrict__ out) const {
    const int64_t at = (br == 1 ? n : n / br) * cols + J;
    const float largest = float_of(format.scale_max);
    if (!w.narrow_scale) {
      for (int64_t j = 0; j < count; ++j) out[j] = effective_scale(w.scale[at + j], largest);
      return;
    }
    const auto* narrow = static_cast<const uint16_t*>(w.narrow_scale) + at;
    if (w.narrow_type == NarrowScale::e8m0) {
      const auto* codes = static_cast<const uint8_t*>(w.narrow_scale) + at;
      for (int64_t j = 0; j < count; ++j) out[j] = effective_scale(float_of(exponent_bits(codes[j])), largest);
    } else if (w.narrow_type == NarrowScale::bfloat16)
      for (int64_t j = 0; j < count; ++j) out[j] = effective_scale(float_of(uint32_t(narrow[j]) << 16), largest);
    else
      for (int64_t j = 0; j < count; ++j) out[j] = effective_scale(decode_float<float16>(narrow[j]), largest);
  }
  int32_t zero_point(int64_t n, int64_t J) const {
    int32_t z = 0;
    if (w.is_affine()) row_zero_points(n, J, 1, &z);
    return z;
  }
  // out[j] = zero_point(n, J + j) for j < count, of a weight that has some
  void row_zero_points(int64_t n, int64_t J, int64_t count, int32_t* __restrict__ out) const {
    const int64_t I = br == 1 ? n : n / br;
    if (w.zero_codes) return integers(w.zero_codes + I * row_bytes(format, cols), J, count, format, out);
    const int32_t* from = w.zero_point + I * cols + J;
    for (int64_t j = 0; j < count; ++j) out[j] = clamp_zero_point(from[j], format);
  }

  // Calls body(begin, end, J) for the parts of columns k0 .. k0 + n that have one scale, counted from k0.
  template <class Body>
  void blocks(int64_t k0, int64_t n, const Body& body) const {
    for (int64_t J = k0 / bk, begin = 0; begin < n; ++J) {
      const int64_t end = least(n, (J + 1) * bk - k0);
      body(begin, end, J);
      begin = end;
    }
  }

  // out[k] = w[n, k0 + k] for k < count
  void row(int64_t n, int64_t k0, int64_t count, float* out) const {
    decode(static_cast<const char*>(w.codes) + byte_offset(format, K, n, k0), false, out, count);
    blocks(k0, count, [&](int64_t begin, int64_t end, int64_t J) {
      const float s = scale(n, J), z = float(zero_point(n, J));
      for (int64_t k = begin; k < end; ++k) out[k] = canonical(mul(sub(out[k], z), s));
    });
  }
};

}  // namespace QL_ISA
}  // namespace quantlib
