// dx[m, k] = sum over n of dy[m, n] * w[n, k], w = (codes - zero_point) * scale
//
// Lanes lie along k; every sum takes its n in ascending order, whatever the other rows are.
#include "../ops/dequant_matmul_backward.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kColumns = 256;  // columns of the weight whose sums are kept
constexpr int64_t kDepth = 64;     // rows of the weight decoded together: those of kRegisters fit a first-level cache
constexpr int kRegisters = 4;      // of columns, for kRowTile rows

// sums[r, k] += dy[r, n] * w[n, k] for R rows, the n of a slab in order, kRegisters registers of columns
template <int R>
QL_FN void multiply(const float* dy, int64_t stride, const float* w, int64_t count, float* sums, CodesAhead& ahead) {
  Floats sum[R][kRegisters];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kRegisters; ++c) sum[r][c] = load<Floats>(sums + r * kColumns + c * kLanes);
  for (int64_t n = 0; n < count; ++n) {
    ahead.fetch();
    Floats row[kRegisters];
    for (int c = 0; c < kRegisters; ++c) row[c] = load<Floats>(w + n * kColumns + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // as bits, or g++ 12 adds zero to the float before it fills the lanes
      const auto factor = same_bits<Floats>(splat<Bits<Floats>>(load<uint32_t>(dy + r * stride + n)));
#pragma GCC unroll 4
      for (int c = 0; c < kRegisters; ++c) sum[r][c] = fma(factor, row[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kRegisters; ++c) store(sums + r * kColumns + c * kLanes, sum[r][c]);
}

// The same for any number of rows, at most MOST at once
template <int MOST>
QL_FN void multiply_rows(const float* dy, int64_t stride, const float* w, int64_t count, float* sums, int64_t rows,
                         CodesAhead& ahead) {
  for (; rows >= MOST; rows -= MOST, dy += MOST * stride, sums += MOST * kColumns)
    multiply<MOST>(dy, stride, w, count, sums, ahead);
  if constexpr (MOST > 1) {
    if (rows) multiply_rows<MOST - 1>(dy, stride, w, count, sums, rows, ahead);
  }
}

struct Gradient {
  const DequantMatmulBackward& p;
  const Rows<float> dy;
  int64_t m0;
  const WeightRows weight = WeightRows(p.weight);
  const int64_t N = p.weight.grid.M, K = p.weight.grid.K;
  const Row dx_row = row_of(p.dy_type);
  const Encode encode = encoder(p.dy_type, false, false);

  Gradient(const DequantMatmulBackward& p, Rows<float> dy, int64_t m0) : p(p), dy(dy), m0(m0) {}

  // Rows r0 .. r1, at most kXRows, and columns k0 .. k1 of dx, at most kColumns
  void operator()(int64_t r0, int64_t r1, int64_t k0, int64_t k1) const {
    alignas(64) float sums[kXRows * kColumns], slab[kDepth * kColumns];
    const int64_t width = round_up(k1 - k0, kRegisters * kLanes);
    for (int64_t at = 0; at < (r1 - r0) * kColumns; ++at) sums[at] = 0.0f;
    for (int64_t at = 0; at < kDepth * kColumns; ++at) slab[at] = 0.0f;
    for (int64_t n0 = 0; n0 < N; n0 += kDepth) {
      const int64_t count = least(kDepth, N - n0);
      for (int64_t n = 0; n < count; ++n) weight.row(n0 + n, k0, k1 - k0, slab + n * kColumns);
      const char* below = static_cast<const char*>(p.weight.codes) + byte_offset(weight.format, K, n0 + count, k0);
      const int64_t lines = r1 - r0 < 3 * kRowTile ? 2 : 1;  // with each step: few rows make few of them
      CodesAhead ahead = {below, row_bytes(weight.format, K), least(kDepth, N - n0 - count),
                          row_bytes(weight.format, k1 - k0), lines};
      for (int64_t k = 0; k < width; k += kRegisters * kLanes)
        multiply_rows<kRowTile>(dy.data + r0 * dy.stride + n0, dy.stride, slab + k, count, sums + k, r1 - r0, ahead);
    }
    for (int64_t r = r0; r < r1; ++r) {
      float* row = sums + (r - r0) * kColumns;
      for (int64_t k = 0; k < k1 - k0; ++k) row[k] = add(row[k], 0.0f);  // an underflow may be -0, a sum never is
      encode(row, nullptr, nullptr, kAsIs, static_cast<char*>(p.dx) + byte_offset(dx_row, K, m0 + r, k0), k1 - k0);
    }
  }
};

}  // namespace

void dequant_matmul_backward(const DequantMatmulBackward& p, ParallelFor run) {
  const int64_t N = p.weight.grid.M, K = p.weight.grid.K;
  if (!K) return;
  constexpr int64_t bytes = int64_t(8) << 20;  // of dy at a time, in FP32
  const int64_t chunk = round_up(bytes / (4 * most(1, N)) + 1, kXRows);
  const bool direct = p.dy_type == Type::float32;
  for (int64_t m = 0; m < p.M; m += chunk) {
    const int64_t count = least(chunk, p.M - m);
    const Scratch scratch(direct ? 0 : count * N * 4);
    auto* gathered = static_cast<float*>(scratch.data());
    if (!direct) gather_rows(run, p.dy, p.dy_type, N, nullptr, m, count, gathered, N);
    const Gradient gradient(p, {direct ? static_cast<const float*>(p.dy) + m * N : gathered, N}, m);
    const int64_t across = (K + kColumns - 1) / kColumns, down = (count + kXRows - 1) / kXRows;
    const int64_t work = least(kColumns, K) * least(kXRows, count) * most(1, N);
    parallel(run, across * down, most(1, 4 * kGrain / work), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t r = piece / across * kXRows, k = piece % across * kColumns;
        gradient(r, least(r + kXRows, count), k, least(k + kColumns, K));
      }
    });
  }
}

}  // namespace QL_ISA
}  // namespace quantlib
