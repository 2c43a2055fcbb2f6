// A thread's share of a matrix: V elements side by side, in 16 bytes of the wider side wherever alignment permits.
#pragma once
#include "../packing.h"
#include "launch.cuh"

namespace quantlib {
namespace cuda {

#define QL_DEVICE __device__ __forceinline__
constexpr int kThreads = 256;
constexpr int kWidth = 16;  // bytes of the widest load and store

// The unit in which one code lies, or kPerUnit of them: an unsigned integer, the bits of an FP32 value too.
template <class F>
struct unit_of {
  using type = typename F::storage;
};
template <>
struct unit_of<float32> {
  using type = uint32_t;
};
template <class F>
using Unit = typename unit_of<F>::type;
template <class F>
constexpr int kPerUnit = F::per_byte;

// V of an op whose x (or y) is X.
template <class X>
constexpr int kElements = kWidth / int(sizeof(Unit<X>));

// The word a GPU moves `bytes` bytes with.
template <int BYTES>
struct word_of;
template <>
struct word_of<16> {
  using type = ::uint4;  // a format may have the name of a type of CUDA's
};
template <>
struct word_of<8> {
  using type = ::uint2;
};
template <>
struct word_of<4> {
  using type = uint32_t;
};
template <>
struct word_of<2> {
  using type = uint16_t;
};
template <>
struct word_of<1> {
  using type = uint8_t;
};

// V units side by side, held as they lie in memory: an array of bytes would take a register each.
template <class T, int V>
struct Vector {
  using Access = typename word_of<sizeof(T) * V>::type;
  static constexpr int per_word = sizeof(T) * V < 4 ? V : 4 / sizeof(T), bits = 8 * sizeof(T);
  uint32_t word[V / per_word];

  QL_DEVICE T operator[](int e) const { return T(word[e / per_word] >> (e % per_word * bits)); }
  // Sets an element that is zero.
  QL_DEVICE void put(int e, uint32_t unit) { word[e / per_word] |= unit << (e % per_word * bits); }

  QL_DEVICE static Vector zero() {
    Vector v;
#pragma unroll
    for (uint32_t& w : v.word) w = 0;
    return v;
  }
  QL_DEVICE static Vector load(const T* p) {
    const Access a = *reinterpret_cast<const Access*>(p);
    if constexpr (sizeof(Access) == 16) return {a.x, a.y, a.z, a.w};
    else if constexpr (sizeof(Access) == 8) return {a.x, a.y};
    else return {a};
  }
  QL_DEVICE void store(T* p) const {
    Access& a = *reinterpret_cast<Access*>(p);
    if constexpr (sizeof(Access) == 16) a = make_uint4(word[0], word[1], word[2], word[3]);
    else if constexpr (sizeof(Access) == 8) a = make_uint2(word[0], word[1]);
    else a = Access(word[0]);
  }
  // Store to global memory in one instruction for certain: of an assignment the compiler may make several.
  QL_DEVICE void store_whole(T* p) const {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Access) == 16)
      asm("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
          : "memory");
    else if constexpr (sizeof(Access) == 8)
      asm("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(word[0]), "r"(word[1]) : "memory");
    else
#endif
      store(p);
  }
};

inline bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// n / d for 0 <= n < 2^63 by a multiplication; n < 2^31 takes the short way.
struct Divisor {
  int64_t d;
  uint64_t wide;    // ceil(2^(63 + shift) / d)
  uint32_t narrow;  // ceil(2^(31 + shift) / d), or 0 where d >= 2^31 leaves no quotient
  int shift;        // ceil(log2(d))

  explicit Divisor(int64_t d) : d(d), shift(0) {
    while ((uint64_t(1) << shift) < uint64_t(d)) ++shift;
    const auto magic = [&](int bits) {
      return (((unsigned __int128)1 << (bits + shift)) + uint64_t(d) - 1) / uint64_t(d);
    };
    wide = uint64_t(magic(63));
    narrow = d <= INT32_MAX ? uint32_t(magic(31)) : 0;
  }

  QL_DEVICE int64_t divide(int64_t n) const {
    if (n <= INT32_MAX) return __umulhi(uint32_t(n) << 1, narrow) >> (shift & 31);
    return int64_t(__umul64hi(uint64_t(n) << 1, wide) >> shift);
  }
};

// An [M, K] matrix of blocks (br, bk) that share a scale; `columns` scales a row of blocks.
struct Blocks {
  int64_t M, K, columns;
  Divisor br, bk;

  explicit Blocks(const Grid& g) : M(g.M), K(g.K), columns(ceil_div(g.K, g.bk)), br(g.br), bk(g.bk) {}
};

// The same elements, per_byte of which share a byte, as one long row where every block is a contiguous run of them. It
// leaves alone a matrix whose rows end inside of a byte.
inline Grid collapse(Grid g, int per_byte = 1) {
  g.br = g.br < g.M ? g.br : g.M;
  g.bk = g.bk < g.K ? g.bk : g.K;
  const bool padded = g.K % per_byte && g.M > 1;
  const bool contiguous = g.bk == g.K || (g.br == 1 && g.K % g.bk == 0);
  return padded || !contiguous ? g : Grid{1, g.M * g.K, 1, g.br * g.bk};
}

// Elements [first, last) of the V from (i, j) on; j is a multiple of V.
struct Chunk {
  int64_t i, j;
  int first, last;
};

// The chunks of a matrix: each lies in one row.
struct Chunks {
  int64_t M, K, count;
  Divisor per_row;

  Chunks(const Grid& g, int V) : M(g.M), K(g.K), count(g.M * ceil_div(g.K, V)), per_row(ceil_div(g.K, V)) {}

  template <int V>
  QL_DEVICE Chunk at(int64_t c) const {
    const int64_t i = M == 1 ? 0 : per_row.divide(c), j = (c - i * per_row.d) * V;
    return {i, j, 0, c >= count ? 0 : K - j < V ? int(K - j) : V};
  }
};

// Elements of the row-i chunk at j that share a scale: from `first` on, up to the next run's first.
struct Run {
  int64_t block, left;  // the block's index in scale; columns from the chunk's start to the block's end
  int first;

  QL_DEVICE Run(const Blocks& b, int64_t i, int64_t j) : first(0) {
    const int64_t J = b.bk.divide(j);
    block = (b.M == 1 ? 0 : b.br.divide(i)) * b.columns + J;
    left = (J + 1) * b.bk.d - j;
  }
  QL_DEVICE void next(const Blocks& b) {
    first = left < kWidth ? int(left) : kWidth;
    left += b.bk.d;
    ++block;
  }
};

// True if whole chunks may be read or written at once: base aligned, and every row's first element with it.
inline bool is_vector(const void* p, int bytes, const Grid& g, int V) {
  return is_aligned(p, bytes) && (g.M == 1 || g.K % V == 0);
}

// ---- x and y --------------------------------------------------------------------------------------------------------

// x[0 .. V), zero outside [first, last). Nothing waits for what is loaded here.
template <int V, class T>
QL_DEVICE Vector<T, V> load(const T* x, int first, int last, bool vector) {
  if (vector && first == 0 && last == V) return Vector<T, V>::load(x);
  auto some = Vector<T, V>::zero();
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (first <= e && e < last) some.put(e, x[e]);
  return some;
}

template <int V, class T>
QL_DEVICE void store(T* y, const Vector<T, V>& value, int first, int last, bool vector) {
  if (vector && first == 0 && last == V) return value.store_whole(y);
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (first <= e && e < last) y[e] = value[e];
}

template <class F>
QL_DEVICE float decode(Unit<F> unit) {
  if constexpr (F::bits == 32) return float_of(unit);
  else return decode_float<F>(unit);
}

template <class F>
QL_DEVICE uint32_t encode(float value, bool saturate) {
  if constexpr (F::bits == 32) return bits_of(canonical(value));
  else return encode_float<F>(value, saturate);
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// Units before element (i, j), which begins one.
template <class F>
QL_DEVICE int64_t offset(int64_t K, int64_t i, int64_t j) {
  constexpr int P = kPerUnit<F>;
  if constexpr (P > 1) return i * ((K + P - 1) / P) + j / P;
  else return i * K + j;
}

// effective_scale for a kernel without registers to spare: these bounds give 0x7fffffff for a NaN, which saves the
// instructions that select it.
QL_DEVICE float tight_scale(float s, float scale_max) {
#ifdef __CUDA_ARCH__
  float clamped;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(fabsf(s)), "f"(float_of(QL_SCALE_MIN)));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(clamped), "f"(scale_max));
  return s < 0.0f ? -clamped : clamped;
#else
  return effective_scale(s, scale_max);
#endif
}

// Turn x into codes in one block of the scale (C5, C6). It is made once a block, for a division is in it.
template <class F, bool AFFINE>
struct Encoder {
  float r;
  int32_t z;

  QL_DEVICE Encoder(float scale, int32_t zero_point) : r(reciprocal(effective_scale<F>(scale))), z(0) {
    if constexpr (AFFINE) z = clamp_zero_point<F, AFFINE>(zero_point);
  }
  QL_DEVICE uint32_t operator()(float x) const {
    if constexpr (F::is_float) return encode_float<F>(mul(x, r), true);
    else return uint32_t(encode_int<F, AFFINE>(mul(x, r), z));
  }
};

// Turn codes into y in one block of the scale (C7).
template <class F, bool AFFINE>
struct Decoder {
  float s;
  int32_t z;

  QL_DEVICE Decoder(float scale, int32_t zero_point) : s(effective_scale<F>(scale)), z(0) {
    if constexpr (AFFINE) z = clamp_zero_point<F, AFFINE>(zero_point);
  }
  QL_DEVICE float operator()(int32_t code) const {
    if constexpr (F::is_float) return mul(decode_float<F>(uint32_t(code)), s);
    else return decode_int(code, s, z);
  }
};

template <class F, int V>
QL_DEVICE void store_codes(Unit<F>* codes, const uint32_t (&code)[V], int first, int last, bool vector) {
  constexpr int P = kPerUnit<F>;
  auto units = Vector<Unit<F>, V / P>::zero();
#pragma unroll
  for (int u = 0; u < V / P; ++u) {
    if constexpr (is_whole<F>) units.put(u, Unit<F>(code[u]));
    else units.put(u, pack<F>([&](int i) { return P * u + i < last ? code[P * u + i] : 0; }));  // 0 past a row's end
  }
  store(codes, units, first / P, (last + P - 1) / P, vector);
}

// Code e of a vector of units.
template <class F, int V>
QL_DEVICE int32_t code_at(const Vector<Unit<F>, V>& units, int e) {
  constexpr int P = kPerUnit<F>;
  if constexpr (!is_whole<F>) return unpack<F>(units[e / P], e % P);
  else if constexpr (F::is_float) return units[e];
  else return F::is_signed ? int8_t(units[e]) : units[e];
}

}  // namespace cuda
}  // namespace quantlib
