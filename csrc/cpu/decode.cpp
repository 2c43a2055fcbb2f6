// y[j] = the value of codes[j]
#include "loops.h"
#include "narrow.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// y[0 .. kStep) = the values of codes[0 .. kStep)
template <class F>
QL_FN void decode_step(const void* codes, float* y) {
  alignas(64) int32_t wide[kStep];
  auto* in = static_cast<const typename F::storage*>(codes);
  if constexpr (F::bits <= 8 && has_narrow && narrow_in_pairs<F>) {
    for (int64_t j = 0; j < kStep; j += kPair) {
      Floats t[2];
      decode_pair<F>(static_cast<const char*>(codes) + bytes_of<F>(j), t);
      for (int64_t h = 0; h < 2; ++h) store(y + j + h * kLanes, canonical(mul(t[h], splat<Floats>(float_of(unit<F>)))));
    }
    return;
  }
  if constexpr (in_hardware<F>) {
    for (int64_t j = 0; j < kStep; j += kLanes) store(y + j, canonical(load_half(in + j)));
    return;
  }
  if constexpr (F::bits < 8) {
    int8_t narrow[kStep];
    for (int64_t j = 0; j < kStep / F::per_byte; ++j)
      for (int i = 0; i < F::per_byte; ++i) narrow[F::per_byte * j + i] = int8_t(unpack<F>(in[j], i));
    for (int64_t j = 0; j < kStep; ++j) wide[j] = narrow[j];
  } else {
    for (int64_t j = 0; j < kStep; ++j) wide[j] = F::is_signed ? int8_t(in[j]) : in[j];
  }
  for (int64_t j = 0; j < kStep; j += kLanes) {
    if constexpr (F::is_float) store(y + j, decode_float<F, Floats>(load<Bits<Floats>>(wide + j)));
    else store(y + j, Lanes<Floats>::of(load<Ints<Floats>>(wide + j)));
  }
}

template <class F>
void decode(const void* __restrict__ codes, bool past_caches, float* __restrict__ y, int64_t n) {
  alignas(64) float step[kStep];
  auto* in = static_cast<const char*>(codes);
  past_caches = past_caches && uintptr_t(y) % sizeof(Floats) == 0;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    decode_step<F>(in + bytes_of<F>(j), past_caches ? step : y + j);
    if (past_caches) stream(step, reinterpret_cast<char*>(y + j), sizeof step);
  }
  if (j == n) return;
  char in_rest[kStep * 2] = {};
  __builtin_memcpy(in_rest, in + bytes_of<F>(j), size_t(bytes_of<F>(n - j)));
  decode_step<F>(in_rest, step);
  __builtin_memcpy(y + j, step, (n - j) * 4);
}

}  // namespace

Decode decoder(Type format) {
  return visit(format, [](auto f) -> Decode {
    using F = decltype(f);
    if constexpr (F::bits == 32) return nullptr;  // it is read where it lies
    else return decode<F>;
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
