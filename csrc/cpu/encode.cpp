// codes[j] = encode(x[j] * r[j]), r = 1 / s_eff
#include "loops.h"

namespace quantlib {
namespace QL_ISA {
namespace {

template <class F, bool AFFINE>
void encode(const float* __restrict__ x, const float* __restrict__ r, const int32_t* __restrict__ zero_point,
            bool saturate, void* __restrict__ codes, int64_t n) {
  const auto code = [=](int64_t j) {
    const float t = mul(x[j], r[j]);
    if constexpr (F::is_float) return encode_float<F>(t, saturate);
    else if constexpr (AFFINE) return uint32_t(encode_int<F, true>(t, clamp_zero_point<F, true>(zero_point[j])));
    else return uint32_t(encode_int<F, false>(t, 0));
  };
  auto* out = static_cast<typename F::storage*>(codes);
  if constexpr (F::bits < 8) {
    for (int64_t j = 0; j < n / 2; ++j) out[j] = pack(code(2 * j), code(2 * j + 1));
    if (n % 2) out[n / 2] = pack(code(n - 1), 0);
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = typename F::storage(code(j));
  }
}

void encode_float32(const float* __restrict__ x, const float* __restrict__ r, const int32_t*, bool,
                    void* __restrict__ codes, int64_t n) {
  auto* out = static_cast<float*>(codes);
  for (int64_t j = 0; j < n; ++j) out[j] = canonical(mul(x[j], r[j]));
}

}  // namespace

Encode encoder(Type format, bool affine) {
  switch (format) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return encode<NAME, false>;
    QL_FLOATS(QL_CASE)
#undef QL_CASE
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return affine ? encode<NAME, true> : encode<NAME, false>;
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return encode_float32;
  }
}

}  // namespace QL_ISA
}  // namespace quantlib
