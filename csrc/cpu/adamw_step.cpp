// parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits
#include "../ops/adamw_step.h"

#include "fake_quantize.h"

namespace quantlib {
namespace QL_ISA {
namespace {

using U = Bits<Floats>;
using I = Ints<Floats>;
constexpr int kStepRegisters = kStep / kLanes;  // registers of a step

QL_FN Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  for (int l = 0; l < kLanes; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

QL_FN Floats magnitude(Floats x) { return same_bits<Floats>(bits_of(x) & 0x7fffffffu); }

// A permutation of 32 bits
template <class T>
QL_FN T mixed(T x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Random bits that round the elements of one row: 16 for each, by its row and its column.
struct Random {
  uint32_t a = 0, b = 0;
  QL_MEMBER U at(uint32_t column) const {
    U columns;
    for (int l = 0; l < kLanes; ++l) columns[l] = uint32_t(l);
    return mixed(mixed((columns + column) ^ b) + a) >> 16;
  }
};

QL_FN Random random_of(const int32_t* key, int64_t row) {
  const uint32_t a = mixed(uint32_t(key[0]) ^ uint32_t(row));
  return {a, mixed(a ^ uint32_t(key[1]))};
}

// The codes of X of a, then of b: up or down AT_RANDOM, else the nearest
template <class X, bool AT_RANDOM>
QL_FN void put_pair(char* to, Floats a, Floats b, const Random& random, uint32_t column) {
  if constexpr (X::bits == 32) {
    store(to, canonical(a));
    store(to + sizeof a, canonical(b));
  } else if constexpr (AT_RANDOM) {
    const auto rounded = [&](Floats x, uint32_t column) QL_INLINE {
      return x == x ? bits_of(x) + random.at(column) : splat<U>(uint32_t(X::nan_code) << 16);
    };
    store(to, upper_halves(rounded(a, column), rounded(b, column + kLanes)));
  } else {
    store(to, encode_pair<X>(a, b));
  }
}

// The constants of a call
struct Constants {
  Floats decay, l2, beta1, rest1, beta2, rest2, rate, correction, eps;
  bool coupled;  // whether l2 is not 0

  explicit Constants(const float* c)
      : decay(splat<Floats>(c[0])),
        l2(splat<Floats>(c[1])),
        beta1(splat<Floats>(c[2])),
        rest1(splat<Floats>(c[3])),
        beta2(splat<Floats>(c[4])),
        rest2(splat<Floats>(c[5])),
        rate(splat<Floats>(c[6])),
        correction(splat<Floats>(c[7])),
        eps(splat<Floats>(c[8])),
        coupled(c[1] != 0.0f) {}
};

// One block, or a part of it: where its elements lie
struct Place {
  const char *parameter, *gradient, *m, *v;
  char *parameter_out, *m_out, *v_out;
  uint32_t column;
};

// m and sqrt(v) of some blocks of a row; the step of a block that is shorter than one ends after it
struct Values {
  alignas(64) float m[kMostBlock + kStep], u[kMostBlock + kStep];
};

// The bits of their largest magnitudes
struct Largest {
  I m = {}, u = {};

  QL_MEMBER void count(Floats of_m, Floats of_u) {
    const I m_bits = same_bits<I>(magnitude(of_m)), u_bits = same_bits<I>(magnitude(of_u));
    m = m_bits > m ? m_bits : m;
    u = u_bits > u ? u_bits : u;
  }
};

// q |q| * scale of the codes at p
template <class F>
QL_FN Floats decode(const char* p, Floats scale) {
  const Floats q = Lanes<Floats>::of(widen<F::is_signed>(p));
  return mul(mul(q, F::is_signed ? magnitude(q) : q), scale);
}

// kStep elements. KEPT: the states are codes of the scales s_m and s_v, and their new values stay in `values`, from its
// element k on
template <class X, bool KEPT, bool AT_RANDOM>
QL_FN void step(const Place& p, const Constants& c, Floats s_m, Floats s_v, const Random& random, Values& values,
                Largest& largest, int64_t k) {
  Floats x[kStepRegisters];
  for (int r = 0; r < kStepRegisters; ++r) {
    const int64_t at = r * kLanes;
    const Floats before = load_values<X>(p.parameter + bytes_of<X>(at));
    Floats g = load_values<X>(p.gradient + bytes_of<X>(at)), m, v;
    if constexpr (KEPT) {
      m = decode<MCodes>(p.m + at, s_m);
      const Floats u = decode<VCodes>(p.v + at, s_v);
      v = mul(u, u);
    } else {
      m = load<Floats>(p.m + at * 4), v = load<Floats>(p.v + at * 4);
    }
    if (c.coupled) g = add(g, mul(c.l2, before));
    m = add(mul(c.beta1, m), mul(c.rest1, g));
    v = add(mul(c.beta2, v), mul(c.rest2, mul(g, g)));
    const Floats u = square_root(v);
    x[r] = sub(mul(before, c.decay), div(mul(c.rate, m), add(mul(u, c.correction), c.eps)));
    if constexpr (KEPT) {
      store(values.m + k + at, m);
      store(values.u + k + at, u);
      largest.count(m, u);
    } else {
      store(p.m_out + at * 4, canonical(m));
      store(p.v_out + at * 4, canonical(v));
    }
  }
  for (int r = 0; r < kStepRegisters; r += 2)
    put_pair<X, AT_RANDOM>(p.parameter_out + bytes_of<X>(r * kLanes), x[r], x[r + 1], random,
                           p.column + uint32_t(r * kLanes));
}

QL_FN uint32_t largest_of(I lanes) {
  int32_t largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
  return uint32_t(largest);
}

// The low bytes of four registers of codes
template <class F>
QL_FN void narrow(const I (&q)[kStepRegisters], char* codes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i low = _mm256_packs_epi32(__m256i(q[0]), __m256i(q[1]));
  const __m256i high = _mm256_packs_epi32(__m256i(q[2]), __m256i(q[3]));
  const __m256i bytes = F::is_signed ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
  store(codes, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
  alignas(64) int32_t wide[kStep];
  for (int r = 0; r < kStepRegisters; ++r) store(wide + r * kLanes, q[r]);
  for (int64_t k = 0; k < kStep; ++k) codes[k] = char(wide[k]);
#endif
}

// About the root of y, above by no more than a fifth and never below less a fifth more, for y up to 256^2
QL_FN Floats about_root(Floats y) {
#if defined(__AVX512F__)
  return mul(y, _mm512_maskz_rsqrt14_ps(0xffff, y));
#elif defined(__AVX2__)
  return mul(y, _mm256_rsqrt_ps(y));
#elif defined(__x86_64__)
  return mul(y, _mm_rsqrt_ps(y));
#else
  return square_root(y);
#endif
}

// kStep codes: the number of squares (n + 1/2)^2 below |value| * r, with the sign of the value
template <class F>
QL_FN void encode_step(const float* values, Floats r, char* codes) {
  constexpr float least = 0.01f, most = (F::most + 0.25f) * (F::most + 0.25f);  // beyond, codes are those of these
  I q[kStepRegisters];
  for (int k = 0; k < kStepRegisters; ++k) {
    const Floats value = load<Floats>(values + k * kLanes);
    const Floats y = min(max(mul(magnitude(value), r), splat<Floats>(least)), splat<Floats>(most));
    // This is the code, or one less: the instruction errs by 0.1 at most.
    q[k] = Lanes<Floats>::nearest(sub(about_root(y), splat<Floats>(0.1f)));
    const Floats half = add(Lanes<Floats>::of(q[k]), splat<Floats>(0.5f));
    q[k] -= y > mul(half, half);  // -1 where true
    if constexpr (F::is_signed) {
      const I negative = same_bits<I>(value) >> 31;
      q[k] = (q[k] ^ negative) - negative;
    }
  }
  narrow<F>(q, codes);
}

// The codes of n values
template <class F>
QL_FN void encode(const float* values, float scale, int64_t n, char* codes) {
  const Floats r = splat<Floats>(reciprocal(scale));
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) encode_step<F>(values + k, r, codes + k);
  if (k == n) return;
  char rest[kStep];
  encode_step<F>(values + k, r, rest);
  __builtin_memcpy(codes + k, rest, size_t(n - k));
}

template <class F>
QL_FN float scale_of(uint32_t largest) {
  return effective_scale(div(float_of(largest), float(F::most * F::most)), F::scale_max);
}

// The place n elements further on
template <class X, bool KEPT>
QL_FN Place advanced(Place p, int64_t n) {
  const int64_t x = bytes_of<X>(n), state = KEPT ? n : 4 * n;
  return {p.parameter + x,     p.gradient + x,  p.m + state,     p.v + state,
          p.parameter_out + x, p.m_out + state, p.v_out + state, p.column + uint32_t(n)};
}

// n elements that share a scale; those of a step that is not whole pass through memory of its own
template <class X, bool KEPT, bool AT_RANDOM>
QL_FN Largest steps(Place p, const Constants& c, float m_scale, float v_scale, const Random& random, Values& values,
                    int64_t k, int64_t n) {
  constexpr int64_t state = KEPT ? 1 : 4;  // bytes
  const Floats s_m = splat<Floats>(m_scale), s_v = splat<Floats>(v_scale);
  Largest largest;
  for (; n >= kStep; n -= kStep, k += kStep, p = advanced<X, KEPT>(p, kStep))
    step<X, KEPT, AT_RANDOM>(p, c, s_m, s_v, random, values, largest, k);
  if (n == 0) return largest;
  char x[4 * kStep] = {}, g[4 * kStep] = {}, m[4 * kStep] = {}, v[4 * kStep] = {};
  const auto bytes = size_t(bytes_of<X>(n)), some = size_t(n * state);
  __builtin_memcpy(x, p.parameter, bytes);
  __builtin_memcpy(g, p.gradient, bytes);
  __builtin_memcpy(m, p.m, some);
  __builtin_memcpy(v, p.v, some);
  Largest whole = largest;
  step<X, KEPT, AT_RANDOM>({x, g, m, v, x, m, v, p.column}, c, s_m, s_v, random, values, largest, k);
  __builtin_memcpy(p.parameter_out, x, bytes);
  if constexpr (KEPT) {  // what follows the last element counts for nothing, be it NaN
    for (int64_t pad = k + n; pad < k + kStep; ++pad) values.m[pad] = values.u[pad] = 0.0f;
    for (int64_t at = k; at < k + kStep; at += kLanes)
      whole.count(load<Floats>(values.m + at), load<Floats>(values.u + at));
  } else {
    __builtin_memcpy(p.m_out, m, some);
    __builtin_memcpy(p.v_out, v, some);
  }
  return whole;
}

// n elements of a row, at most kMostBlock: every block of them, then every scale, then every code, so that no block
// waits for the divisions of the one before.
template <class X, bool KEPT, bool AT_RANDOM>
void chunk(const Place p, const Constants c, const AdamwStep& of, int64_t first_block, const Random& random,
           int64_t n) {
  Values values;
  if constexpr (!KEPT) {
    steps<X, false, AT_RANDOM>(p, c, 0.0f, 0.0f, random, values, 0, n);
  } else {
    float m_scale[kMostBlock / kLeastBlock], v_scale[kMostBlock / kLeastBlock];
    int64_t b = 0;
    for (int64_t k = 0; k < n; k += of.block, ++b) {
      const float s_m = effective_scale(of.m_scale[first_block + b], MCodes::scale_max);
      const float s_v = effective_scale(of.v_scale[first_block + b], VCodes::scale_max);
      const Largest largest =
          steps<X, true, AT_RANDOM>(advanced<X, true>(p, k), c, s_m, s_v, random, values, k, least(of.block, n - k));
      m_scale[b] = scale_of<MCodes>(largest_of(largest.m)), v_scale[b] = scale_of<VCodes>(largest_of(largest.u));
    }
    b = 0;
    for (int64_t k = 0; k < n; k += of.block, ++b) {
      const int64_t some = least(of.block, n - k);
      encode<MCodes>(values.m + k, m_scale[b], some, p.m_out + k);
      encode<VCodes>(values.u + k, v_scale[b], some, p.v_out + k);
      of.m_scale_out[first_block + b] = m_scale[b], of.v_scale_out[first_block + b] = v_scale[b];
    }
  }
}

template <class X, bool KEPT, bool AT_RANDOM>
void rows(const AdamwStep& p, ParallelFor run) {
  constexpr int64_t wide = bytes_of<X>(1), state = KEPT ? 1 : 4;
  const bool alone = !KEPT && !AT_RANDOM;  // no element has a row
  const int64_t M = alone ? 1 : p.M, K = alone ? p.M * p.K : p.K, across = (K + kMostBlock - 1) / kMostBlock;
  const int64_t blocks = KEPT ? Grid{M, K, 1, p.block}.scale_cols() : 0;  // of a row
  parallel(run, M * across, QL_ISA::most(1, kGrain / least(kMostBlock, K)), [&](int64_t begin, int64_t end) {
    const Constants c(p.constants);
    Random random;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n / across, j = n % across * kMostBlock, first = i * K + j;
      if (AT_RANDOM && (n == begin || j == 0)) random = random_of(p.key, p.row + i);
      const auto from = [&](const void* x, int64_t bytes) { return static_cast<const char*>(x) + first * bytes; };
      const auto to = [&](void* x, int64_t bytes) { return static_cast<char*>(x) + first * bytes; };
      const Place place = {from(p.parameter, wide), from(p.gradient, wide),    from(p.m, state),
                           from(p.v, state),        to(p.parameter_out, wide), to(p.m_out, state),
                           to(p.v_out, state),      uint32_t(p.column + j)};
      const int64_t first_block = KEPT ? i * blocks + j / p.block : 0;
      chunk<X, KEPT, AT_RANDOM>(place, c, p, first_block, random, least(kMostBlock, K - j));
    }
  });
}

}  // namespace

void adamw_step(const AdamwStep& p, ParallelFor run) {
  visit(p.x_type, [&](auto x) {
    using X = decltype(x);
    if constexpr (is_input<X>) {
      if constexpr (X::type == Type::bfloat16)
        if (p.key) return p.block ? rows<X, true, true>(p, run) : rows<X, false, true>(p, run);
      p.block ? rows<X, true, false>(p, run) : rows<X, false, false>(p, run);
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
