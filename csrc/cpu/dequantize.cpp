// y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]
#include "loops.h"

namespace quantlib {
namespace QL_ISA {
namespace {

struct Worker {
  const Dequantize& p;
  const Grid& grid;
  const Row format = row_of(p.format);
  const int y_bits = row_of(p.y_type).bits;
  const Store how = {false, streams(grid.M * grid.K * y_bits / 8)};
  const Decode decode = decoder(p.format);
  const Encode encode = encoder(p.y_type, true, false);
  alignas(64) float value[kChunk], s_eff[kChunk], zero_point[kChunk];

  Worker(const Dequantize& p, const Grid& grid) : p(p), grid(grid) {}

  void spread(int64_t I, int64_t j, int64_t n) {
    const int64_t row = I * grid.scale_cols();
    const Row f = format;
    QL_ISA::spread(p.scale + row, grid.bk, j, n, s_eff,
                   [=](float s) { return effective_scale(s, float_of(f.scale_max)); });
    if (p.zero_point)
      QL_ISA::spread(p.zero_point + row, grid.bk, j, n, zero_point,
                     [=](int32_t z) { return float(clamp_zero_point(z, f)); });
  }

  void row(int64_t i, int64_t j, int64_t n) {
    decode(static_cast<const char*>(p.codes) + byte_offset(format.bits, grid.K, i, j), false, value, n);
    // Codes and zero points are small integers: their difference is exact in FP32.
    if (p.zero_point)
      for (int64_t k = 0; k < n; ++k) value[k] = sub(value[k], zero_point[k]);
    encode(value, s_eff, nullptr, how, static_cast<char*>(p.y) + byte_offset(y_bits, grid.K, i, j), n);
  }
};

}  // namespace

void dequantize(const Dequantize& p, ParallelFor run) {
  const Grid grid = collapse(p.grid, row_of(p.format).bits < 8);
  const bool flat = grid.M == 1;
  parallel_pieces(run, grid, flat ? 1 : 64, flat ? kGrain : kChunk,
                  [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
                    Worker worker(p, grid);
                    walk(grid, i0, i1, j0, j1, worker);
                  });
}

}  // namespace QL_ISA
}  // namespace quantlib
