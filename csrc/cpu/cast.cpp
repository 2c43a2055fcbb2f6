// y[n] = encode(decode(x[n]))
#include "loops.h"

namespace quantlib {
namespace QL_ISA {

void cast(const Cast& p, ParallelFor run) {
  const Encode encode = encoder(p.y_type, false);
  const Decode decode = decoder(p.x_type);
  const int x_bits = row_of(p.x_type).bits, y_bits = row_of(p.y_type).bits;
  parallel(run, (p.n + kChunk - 1) / kChunk, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kChunk], ones[kChunk];
    const float one = 1;
    spread(&one, kChunk, 0, least(kChunk, p.n), ones, [](float r) { return r; });
    for (int64_t j = begin * kChunk; j < least(end * kChunk, p.n); j += kChunk) {
      const int64_t n = least(kChunk, p.n - j);
      const char* x = static_cast<const char*>(p.x) + j * (x_bits / 8);
      if (p.x_type != Type::float32) decode(x, buffer, n);
      encode(p.x_type == Type::float32 ? reinterpret_cast<const float*>(x) : buffer, ones, nullptr, p.saturate,
             static_cast<char*>(p.y) + j * (y_bits / 8), n);
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
