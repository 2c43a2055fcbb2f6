// codes[j] = encode(x[j] * r[j]), r = 1 / s_eff
#include "loops.h"
#include "narrow.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// codes[0 .. kStep) = encode(x[0 .. kStep))
template <class F, bool SCALED, bool AFFINE>
QL_FN void encode_step(const float* x, const float* r, const int32_t* zero_point, bool saturate, void* codes) {
#ifdef QL_NARROW
  if constexpr (is_upper_byte<F>) {
    Words halves[2];
    for (int64_t k = 0; k < 2; ++k) {
      Floats t[2];
      for (int64_t h = 0; h < 2; ++h) {
        const int64_t j = (2 * k + h) * kLanes;
        t[h] = load<Floats>(x + j);
        if constexpr (SCALED) t[h] = mul(t[h], load<Floats>(r + j));
        t[h] = round_to_upper_byte<F>(t[h], saturate);
      }
      halves[k] = Words(halves_of(t[0], t[1]));
    }
    return store_upper_bytes(halves[0], halves[1], codes);
  }
#endif
  alignas(64) uint32_t wide[kStep];
  auto* out = static_cast<typename F::storage*>(codes);
  for (int64_t j = 0; j < kStep; j += kLanes) {
    Floats t = load<Floats>(x + j);
    if constexpr (SCALED) t = mul(t, load<Floats>(r + j));
    if constexpr (F::bits == 32) store(wide + j, canonical(t));
    else if (in_hardware<F> && !saturate) store_half(out + j, canonical(t));
    else if constexpr (F::is_float) store(wide + j, encode_float<F>(t, saturate));
    else store(wide + j, encode_int<F, AFFINE>(t, AFFINE ? load<Ints<Floats>>(zero_point + j) : Ints<Floats>{}));
  }
  if constexpr (F::bits == 32) __builtin_memcpy(codes, wide, sizeof wide);
  else if constexpr (F::bits < 8) {
    uint8_t narrow[kStep];
    for (int64_t j = 0; j < kStep; ++j) narrow[j] = uint8_t(wide[j] & ((1u << F::bits) - 1u));
    for (int64_t j = 0; j < kStep / F::per_byte; ++j)
      out[j] = pack<F>([&](int i) { return uint32_t(narrow[F::per_byte * j + i]); });
  } else if (!in_hardware<F> || saturate)
    for (int64_t j = 0; j < kStep; ++j) out[j] = typename F::storage(wide[j]);
}

template <class F, bool SCALED, bool AFFINE>
void encode(const float* __restrict__ x, const float* __restrict__ r, const int32_t* __restrict__ zero_point,
            const Store& how, void* __restrict__ codes, int64_t n) {
  constexpr int64_t bytes = bytes_of<F>(kStep), line = sizeof(Floats);
  const bool past_caches = how.stream && bytes % line == 0 && uintptr_t(codes) % sizeof(Floats) == 0;
  alignas(64) char step[kStep * 4];
  auto* out = static_cast<char*>(codes);
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep, out += bytes) {
    for (int64_t k = 0; k < kStep * how.next_bytes; k += 64)
      __builtin_prefetch(how.next + j * how.next_bytes + k, 0, 2);
    encode_step<F, SCALED, AFFINE>(x + j, r + j, zero_point + j, how.saturate, past_caches ? step : out);
    if (past_caches) stream(step, out, bytes);
  }
  if (j == n) return;
  // The rest as part of a step of zeros. What follows the last code in its byte is 0, as most formats' code of 0 is.
  float x_rest[kStep] = {}, r_rest[kStep] = {};
  int32_t zero_point_rest[kStep] = {};
  for (int64_t k = 0; k < n - j; ++k) {
    x_rest[k] = x[j + k];
    if (SCALED) r_rest[k] = r[j + k];
    if (AFFINE) zero_point_rest[k] = zero_point[j + k];
  }
  encode_step<F, SCALED, AFFINE>(x_rest, r_rest, zero_point_rest, how.saturate, step);
  if constexpr (F::is_book) {
    if (const int64_t codes_of_last = (n - j) % F::per_byte)
      step[(n - j) / F::per_byte] &= char((1 << (codes_of_last * F::bits)) - 1);
  }
  __builtin_memcpy(out, step, size_t(bytes_of<F>(n - j)));
}

}  // namespace

Encode encoder(Type format, bool scaled, bool affine) {
  return visit(format, [&](auto f) -> Encode {
    using F = decltype(f);
    if constexpr (F::is_float) return scaled ? encode<F, true, false> : encode<F, false, false>;
    else return affine ? encode<F, true, true> : encode<F, true, false>;
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
