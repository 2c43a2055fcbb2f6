// parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits
#include "../ops/adamw_step.h"

#include "range.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int V = 4;  // elements of a thread

template <class X>
struct StepArgs {
  const Unit<X>*parameter, *gradient;  // [M, K]
  const void *m, *v;                   // [M, K] of 8 or 32 bits
  const float *m_scale, *v_scale;      // [M, K / block]
  const float* constants;
  const int32_t* key;
  int64_t row, column;
  Unit<X>* parameter_out;
  void *m_out, *v_out;
  float *m_scale_out, *v_scale_out;
  BlockChunks chunks;
  Sharing sharing;
  bool vector;
};

QL_DEVICE float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

QL_DEVICE float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

// A permutation of 32 bits (C9)
QL_DEVICE uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Code -> q |q| * s
template <class Q>
QL_DEVICE float decode_square(uint8_t code, float s) {
  const int32_t q = Q::is_signed ? int8_t(code) : code;
  return mul(float(Q::is_signed && q < 0 ? -q * q : q * q), s);
}

// The number of squares (n + 1/2)^2 below |x| * r, with the sign of x
template <class Q>
QL_DEVICE uint8_t encode_square(float x, float r) {
  constexpr float most = float(Q::most * Q::most);
  float y = mul(magnitude(x), r);
  y = y == y ? min(y, most) : 0.0f;
  // the nearest root, then one more or less where the border between two codes says so
  int32_t q = Lanes<float>::nearest(square_root(y));
  const float above = float(q) + 0.5f, below = float(q) - 0.5f;
  if (y > mul(above, above)) ++q;
  else if (q > 0 && y <= mul(below, below)) --q;
  return uint8_t(Q::is_signed && bits_of(x) >> 31 ? -q : q);
}

template <class Q>
QL_DEVICE float scale_of(int32_t amax_bits) {
  return effective_scale(div(float_of(uint32_t(amax_bits)), float(Q::most * Q::most)), Q::scale_max);
}

// KEPT: the states are codes of 8 bits
template <class X, bool KEPT, bool AT_RANDOM>
__global__ void __launch_bounds__(kThreads) adamw_step_kernel(const StepArgs<X> a) {
  using State = std::conditional_t<KEPT, uint8_t, uint32_t>;
  const Lane my(a.sharing);
  const Block block(a.chunks, my.block);
  const auto [i, j, first, last] = block.template at<V>(a.chunks, my.lane);
  const int64_t at = i * a.chunks.K + j;
  const auto x_units = load<V>(a.parameter + at, first, last, a.vector);
  const auto g_units = load<V>(a.gradient + at, first, last, a.vector);
  const auto m_units = load<V>(static_cast<const State*>(a.m) + at, first, last, a.vector);
  const auto v_units = load<V>(static_cast<const State*>(a.v) + at, first, last, a.vector);
  const float decay = a.constants[0], l2 = a.constants[1], beta1 = a.constants[2], rest1 = a.constants[3];
  const float beta2 = a.constants[4], rest2 = a.constants[5], rate = a.constants[6];
  const float correction = a.constants[7], eps = a.constants[8];
  const bool exists = my.block < a.chunks.count;
  float s_m = 0.0f, s_v = 0.0f;
  if constexpr (KEPT) {
    s_m = effective_scale(exists ? a.m_scale[my.block] : 0.0f, MCodes::scale_max);
    s_v = effective_scale(exists ? a.v_scale[my.block] : 0.0f, VCodes::scale_max);
  }
  uint32_t random_a = 0, random_b = 0;
  if constexpr (AT_RANDOM) {
    random_a = mixed(uint32_t(a.key[0]) ^ uint32_t(a.row + i));
    random_b = mixed(random_a ^ uint32_t(a.key[1]));
  }
  float m[V], u[V];
  auto x_out = Vector<Unit<X>, V>::zero();
  Range<true> range;  // high: of the magnitudes of m; low: of those of u, negated
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float before = decode<X>(x_units[e]);
    float g = decode<X>(g_units[e]), v;
    // 1. the states as float32
    if constexpr (KEPT) {
      m[e] = decode_square<MCodes>(m_units[e], s_m);
      u[e] = decode_square<VCodes>(v_units[e], s_v);
      v = mul(u[e], u[e]);
    } else {
      m[e] = float_of(m_units[e]), v = float_of(v_units[e]);
    }
    // 2. the moving averages
    if (l2 != 0.0f) g = add(g, mul(l2, before));
    m[e] = add(mul(beta1, m[e]), mul(rest1, g));
    v = add(mul(beta2, v), mul(rest2, mul(g, g)));
    u[e] = square_root(v);
    // 3. the parameter
    const float x = sub(mul(before, decay), div(mul(rate, m[e]), add(mul(u[e], correction), eps)));
    if constexpr (AT_RANDOM) {
      const uint32_t random = mixed(mixed(random_b ^ uint32_t(a.column + j + e)) + random_a) >> 16;
      x_out.put(e, x == x ? (bits_of(x) + random) >> 16 : X::nan_code);
    } else {
      x_out.put(e, encode<X>(x, false));
    }
    if constexpr (KEPT) {
      if (first <= e && e < last) range.merge({int32_t(bits_of(magnitude(m[e]))), -int32_t(bits_of(magnitude(u[e])))});
    } else {
      u[e] = v;
    }
  }
  store(a.parameter_out + at, x_out, first, last, a.vector);
  // 4. the states as they are kept
  auto m_out = Vector<State, V>::zero(), v_out = Vector<State, V>::zero();
  if constexpr (KEPT) {
    range = reduce(range, a.sharing.lanes);
    s_m = scale_of<MCodes>(range.high), s_v = scale_of<VCodes>(-range.low);
    if (my.lane == 0 && exists) a.m_scale_out[my.block] = s_m, a.v_scale_out[my.block] = s_v;
    const float r_m = reciprocal(s_m), r_v = reciprocal(s_v);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      m_out.put(e, encode_square<MCodes>(m[e], r_m));
      v_out.put(e, encode_square<VCodes>(u[e], r_v));
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) m_out.put(e, bits_of(canonical(m[e]))), v_out.put(e, bits_of(canonical(u[e])));
  }
  store(static_cast<State*>(a.m_out) + at, m_out, first, last, a.vector);
  store(static_cast<State*>(a.v_out) + at, v_out, first, last, a.vector);
}

template <class X, bool KEPT, bool AT_RANDOM>
void start(const AdamwStep& p, Stream stream) {
  Grid g = {p.M, p.K, 1, KEPT ? p.block : kMostBlock};
  if (!KEPT && !AT_RANDOM) g = {1, p.M * p.K, 1, kMostBlock};  // the elements stand alone
  const BlockChunks chunks(g, V);
  constexpr int x_bytes = V * int(sizeof(Unit<X>)), state_bytes = KEPT ? V : 4 * V;
  bool vector = g.M == 1 || g.K % V == 0;
  for (const void* x : {p.parameter, p.gradient, static_cast<const void*>(p.parameter_out)})
    vector = vector && is_aligned(x, x_bytes);
  for (const void* state : {p.m, p.v, static_cast<const void*>(p.m_out), static_cast<const void*>(p.v_out)})
    vector = vector && is_aligned(state, state_bytes);
  const StepArgs<X> args{static_cast<const Unit<X>*>(p.parameter),
                         static_cast<const Unit<X>*>(p.gradient),
                         p.m,
                         p.v,
                         p.m_scale,
                         p.v_scale,
                         p.constants,
                         p.key,
                         p.row,
                         p.column,
                         static_cast<Unit<X>*>(p.parameter_out),
                         p.m_out,
                         p.v_out,
                         p.m_scale_out,
                         p.v_scale_out,
                         chunks,
                         share(chunks, kThreads, 1),
                         vector};
  launch("adamw_step", adamw_step_kernel<X, KEPT, AT_RANDOM>, args.sharing.thread_blocks, args.sharing.threads, stream,
         args);
}

}  // namespace

void adamw_step(const AdamwStep& p, Stream stream) {
  visit_x(p.x_type, [&](auto x_row) {
    using X = decltype(x_row);
    if (p.M * p.K == 0) return;
    if constexpr (X::type == Type::bfloat16)
      if (p.key) return p.block ? start<X, true, true>(p, stream) : start<X, false, true>(p, stream);
    p.block ? start<X, true, false>(p, stream) : start<X, false, false>(p, stream);
  });
}

}  // namespace cuda
}  // namespace quantlib
