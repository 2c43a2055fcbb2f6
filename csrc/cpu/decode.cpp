// y[j] = the value of codes[j]
#include "loops.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// The value of a code that fills its storage, or of one that unpack() made.
template <class F>
QL_FN float value(int32_t code) {
  if constexpr (F::is_float) return decode_float<F>(uint32_t(code));
  else if constexpr (F::is_signed) return float(int8_t(code));
  else return float(code);
}

template <class F>
void decode(const void* __restrict__ codes, float* __restrict__ y, int64_t n) {
  if constexpr (F::bits < 8) {
    const auto* in = static_cast<const uint8_t*>(codes);
    for (int64_t j = 0; j < n / 2; ++j) {
      y[2 * j] = value<F>(unpack<F>(in[j], 0));
      y[2 * j + 1] = value<F>(unpack<F>(in[j], 1));
    }
    if (n % 2) y[n - 1] = value<F>(unpack<F>(in[n / 2], 0));
  } else {
    const auto* in = static_cast<const typename F::storage*>(codes);
    for (int64_t j = 0; j < n; ++j) y[j] = value<F>(in[j]);
  }
}

void decode_float32(const void* __restrict__ codes, float* __restrict__ y, int64_t n) {
  const auto* in = static_cast<const float*>(codes);
  for (int64_t j = 0; j < n; ++j) y[j] = in[j];
}

}  // namespace

Decode decoder(Type format) {
  switch (format) {
#define QL_CASE(NAME, ...) \
  case Type::NAME:         \
    return decode<NAME>;
    QL_FLOATS(QL_CASE)
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      return decode_float32;
  }
}

}  // namespace QL_ISA
}  // namespace quantlib
