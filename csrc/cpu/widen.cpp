// out[i, j] = code j of row i of the codes as int32, or its value as float32 where codes are E8M0
#include "../ops/widen.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {

void widen(const Widen& p, ParallelFor run) {
  const Row format = row_of(p.format);
  const int64_t bytes = row_bytes(format, p.K);
  const bool is_scale = p.format == Type::float32;
  parallel(run, p.M, most(1, kGrain / most(1, p.K)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto* codes = static_cast<const uint8_t*>(p.codes) + i * (is_scale ? p.K : bytes);
      auto* out = static_cast<int32_t*>(p.out) + i * p.K;
      if (!is_scale) integers(codes, 0, p.K, format, out);
      else
        for (int64_t j = 0; j < p.K; ++j) out[j] = int32_t(exponent_bits(codes[j]));
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
