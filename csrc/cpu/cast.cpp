// y[n] = encode(decode(x[n]))
#include "../ops/cast.h"
#include "loops.h"

namespace quantlib {
namespace QL_ISA {

void cast(const Cast& p, ParallelFor run) {
  const Encode encode = encoder(p.y_type, false, false);
  const Decode decode = decoder(p.x_type);
  const Row x_row = row_of(p.x_type), y_row = row_of(p.y_type);
  const Store how = {p.saturate, streams(p.n * y_row.bytes)};
  parallel(run, (p.n + kChunk - 1) / kChunk, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kChunk];
    for (int64_t j = begin * kChunk; j < least(end * kChunk, p.n); j += kChunk) {
      const int64_t n = least(kChunk, p.n - j);
      const char* x = static_cast<const char*>(p.x) + j * x_row.bytes;
      char* y = static_cast<char*>(p.y) + j * y_row.bytes;
      if (decode && p.y_type == Type::float32) {
        decode(x, how.stream, reinterpret_cast<float*>(y), n);
      } else {
        if (decode) decode(x, false, buffer, n);
        encode(decode ? buffer : reinterpret_cast<const float*>(x), nullptr, nullptr, how, y, n);
      }
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
