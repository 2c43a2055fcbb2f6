// Shared by fake_quantize.cpp and fake_quantize_backward.cpp: registers of x's type, and the scales of a chunk.
#pragma once
#include "../fake_quantize.h"
#include "lanes.h"
#include "loops.h"

#define QL_INLINE __attribute__((always_inline))  // of a lambda: what is a register inside stays one

namespace quantlib {
namespace QL_ISA {
namespace {

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// The bits of a register's worth of X, in 32 bits each.
template <class X>
QL_FN Bits<Floats> load_bits(const void* p) {
  if constexpr (X::bits == 32) return load<Bits<Floats>>(p);
  else return __builtin_convertvector(load<Halves>(p), Bits<Floats>);
}
template <class X>
QL_FN void store_bits(void* p, Bits<Floats> bits) {
  if constexpr (X::bits == 32) store(p, bits);
  else store(p, __builtin_convertvector(bits, Halves));
}

template <class X>
QL_FN Floats load_values(const void* p) {
  if constexpr (X::bits == 32) return load<Floats>(p);
  else if constexpr (in_hardware<X>) return load_half(p);
  else return decode_float<X, Floats>(load_bits<X>(p));
}
template <class X>
QL_FN void store_values(void* p, Floats y) {
  if constexpr (X::bits == 32) store(p, y);
  else if constexpr (in_hardware<X>) store_half(p, y);
  else store_bits<X>(p, encode_float<X>(y, false));
}

// step(in, offset, j, to) for the elements j .. j + kStep of N rows `in` and of `out`, all of type X, up to n; they lie
// `offset` bytes behind `in`. The rest becomes part of a step of zeros.
template <class X, int N, class Step>
QL_FN void in_steps(const char* const (&in)[N], bool past_caches, char* out, int64_t n, const Step& step) {
  constexpr int64_t size = X::bits / 8, bytes = kStep * size;
  past_caches = past_caches && uintptr_t(out) % sizeof(Floats) == 0;
  alignas(64) char made[bytes];
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    step(in, j * size, j, past_caches ? made : out + j * size);
    if (past_caches) stream(made, out + j * size, bytes);
  }
  if (j == n) return;
  alignas(64) char rest[N][bytes] = {};
  const char* from[N];
  for (int k = 0; k < N; ++k) {
    __builtin_memcpy(rest[k], in[k] + j * size, (n - j) * size);
    from[k] = rest[k];
  }
  step(from, 0, j, made);
  __builtin_memcpy(out + j * size, made, (n - j) * size);
}

template <class Problem>
Limits limits_of(const Problem& p) {
  return {float(p.qmin), float(p.qmax)};
}

// The scales of up to kChunk elements that follow each other, one for each.
struct Spread {
  alignas(64) float r[kChunk] = {}, s[kChunk] = {}, z[kChunk] = {};

  template <class Problem>
  void fill(const Problem& p, const Grid& grid, int64_t I, int64_t j, int64_t n) {
    const int64_t row = I * grid.scale_cols();
    const float scale_max = float_of(row_of(p.format).scale_max);
    const Limits q = limits_of(p);
    spread(p.scale + row, grid.bk, j, n, s, [=](float value) { return effective_scale(value, scale_max); });
    spread(p.scale + row, grid.bk, j, n, r, [=](float value) { return reciprocal(effective_scale(value, scale_max)); });
    if (p.zero_point) spread(p.zero_point + row, grid.bk, j, n, z, [=](float value) { return code_of(value, q); });
  }
  QL_MEMBER Shared<Floats> at(int64_t k) const {
    return {load<Floats>(r + k), load<Floats>(s + k), load<Floats>(z + k)};
  }
};

// choose(F{}, X{}) with what the codes of the format are, and the type of x.
template <class Problem, class Choose>
auto with_types(const Problem& p, const Choose& choose) {
  const auto with_x = [&](auto f) {
    return p.x_type == Type::float32   ? choose(f, float32{})
           : p.x_type == Type::float16 ? choose(f, float16{})
                                       : choose(f, bfloat16{});
  };
  return visit(p.format, [&](auto f) {
    if constexpr (decltype(f)::is_float && decltype(f)::bits < 32) return with_x(f);
    else return with_x(Integer{});
  });
}

}  // namespace
}  // namespace QL_ISA
}  // namespace quantlib
