// out[i, j] = code j of row i of the codes as int32, or its value as float32 where codes are E8M0
#include "../ops/widen.h"
#include "../packing.h"
#include "launch.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct WidenArgs {
  int64_t M, K, row_bytes;
  const uint8_t* codes;
  Row format;
  bool is_scale;
  uint32_t* out;
};

__global__ void __launch_bounds__(kThreads) widen_kernel(const WidenArgs a) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= a.M * a.K) return;
  const int64_t i = n / a.K, j = n - i * a.K;
  const uint8_t* row = a.codes + i * a.row_bytes;
  a.out[n] = a.is_scale ? exponent_bits(row[j]) : uint32_t(integer_of(row, j, a.format));
}

}  // namespace

void widen(const Widen& p, Stream stream) {
  const Row format = row_of(p.format);
  const bool is_scale = p.format == Type::float32;
  const WidenArgs args{p.M,
                       p.K,
                       is_scale ? p.K : row_bytes(format, p.K),
                       static_cast<const uint8_t*>(p.codes),
                       format,
                       is_scale,
                       static_cast<uint32_t*>(p.out)};
  launch("widen", widen_kernel, ceil_div(p.M * p.K, kThreads), kThreads, stream, args);
}

}  // namespace cuda
}  // namespace quantlib
