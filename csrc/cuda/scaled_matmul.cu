// y[m, n] = activation(fl(fl(d[m, n] * x_scale[m]) * scale[n]) + bias[n]), d the exact integer product of the codes
//
// Everything is int8 to the matrix instructions: uint8 codes and their zero points less 128, narrow codes widened.
// Zeros fill what is missing on every side. With zero points, d = sum a q - z_x sum q - z sum a + K z_x z, modulo 2^32,
// where a product with ones gives the sums, in the registers that have d.
#include "../ops/scaled_matmul.h"
#include "scaled_rows.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kTile = 64;            // rows of x, rows of the weight, columns of both: 64 bytes
constexpr int kStride = 20;          // words from a row to the next: no two of a fragment's in one bank
constexpr int kScaledThreads = 128;  // four warps, each 32 by 32 of a tile of y

// Codes [k, k + 16) of a row as int8, zero from `end` on.
QL_DEVICE Vector<uint32_t, 4> load_codes(const CodesArgs& c, int64_t row, int64_t k, int64_t end) {
  auto codes = Vector<uint32_t, 4>::zero();
  if (row >= c.rows || k >= end) return codes;
  const uint8_t* p = c.codes + row * c.row_bytes;
  if (!c.vector || k % 16 || k + 16 > end) {
#pragma unroll 1
    for (int e = 0; e < 16; ++e) {
      if (k + e >= end) continue;
      const uint32_t code = c.code(p, k + e);
#pragma unroll
      for (int w = 0; w < 4; ++w) codes.word[w] |= w == e / 4 ? (code & 0xff) << (8 * (e % 4)) : 0;
    }
  } else if (c.packed) {
    const auto bytes = Vector<uint32_t, 2>::load(reinterpret_cast<const uint32_t*>(p + k / 2));
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t even = bytes.word[w] & 0x0f0f0f0fu, odd = bytes.word[w] >> 4 & 0x0f0f0f0fu;
      codes.word[2 * w] = widen(permute(even, odd, 0x5140));
      codes.word[2 * w + 1] = widen(permute(even, odd, 0x7362));
    }
  } else {
    codes = Vector<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(p + k));
#pragma unroll
    for (uint32_t& word : codes.word) word ^= c.flip * kOnes;
  }
  return codes;
}

template <bool AFFINE>
__global__ void __launch_bounds__(kScaledThreads) scaled_matmul_kernel(const ScaledArgs a) {
  alignas(16) __shared__ uint32_t x[kTile][kStride], w[kTile][kStride];
  __shared__ float sums[kTile][kTile + 1];
  const int thread = int(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int row = thread / 64 * 32, column = thread / 32 % 2 * 32;  // of this warp in the tile of y
  const int64_t m0 = blockIdx.x % a.row_blocks * kTile, n0 = blockIdx.x / a.row_blocks * kTile;

  float x_scale[2][2];  // of rows g and g + 8 of each 16 that a lane has of d
  int32_t x_zero[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = m0 + row + 16 * i + 8 * h + g, at = m < a.x.rows ? m : 0;
      x_scale[i][h] = a.scale_of_x(at);
      x_zero[i][h] = a.zero_of_x(at);
    }

  // A thread brings two times 16 codes of either side, from rows r and r + 32.
  const int r = thread / 4, word = thread % 4 * 4;
  Vector<uint32_t, 4> x_next[2], w_next[2];
  const auto load = [&](int64_t k, int64_t end) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x_next[h] = load_codes(a.x, m0 + r + 32 * h, k + 4 * word, end);
      w_next[h] = load_codes(a.w, n0 + r + 32 * h, k + 4 * word, end);
    }
  };

  int32_t d[2][4][4] = {}, x_sum[2][4] = {}, w_sum[4][4] = {};
  float total[2][4][4] = {};
  int64_t k = 0, end = a.bk < a.K ? a.bk : a.K, first = 0, group = 0;  // of a tile's columns; of those of one scale
  load(k, end);
  while (k < a.K) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x_next[h].store(&x[r + 32 * h][word]);
      w_next[h].store(&w[r + 32 * h][word]);
    }
    __syncthreads();
    k = k + kTile < end ? k + kTile : end;
    const bool last = k == end;  // of its scale
    const int64_t size = end - first;
    if (last) first = end, end = end + a.bk < a.K ? end + a.bk : a.K;
    load(k, end);
#pragma unroll
    for (int s = 0; s < 16; s += 8) {
      uint32_t left[2][4], right[4][2];
#pragma unroll
      for (int f = 0; f < 4; ++f) {
#pragma unroll
        for (int i = 0; i < 2; ++i) left[i][f] = x[row + 16 * i + f % 2 * 8 + g][s + f / 2 * 4 + t];
#pragma unroll
        for (int h = 0; h < 2; ++h) right[f][h] = w[column + 8 * f + g][s + 4 * h + t];
      }
      constexpr uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma(int8{}, d[i][j], left[i], right[j]);
        if constexpr (AFFINE) mma(int8{}, w_sum[j], ones, right[j]);
      }
      if constexpr (AFFINE)
#pragma unroll
        for (int i = 0; i < 2; ++i) mma(int8{}, x_sum[i], left[i], {kOnes, kOnes});
    }
    __syncthreads();
    if (!last) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t n = n0 + column + 8 * j + 2 * t + c % 2;
        const int64_t block = n < a.w.rows ? a.br.divide(n) * a.groups + group : 0;
        const float scale = a.scale_of(block);
        const int32_t z = a.zero_of(block);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t exact = uint32_t(d[i][j][c]);
          if constexpr (AFFINE) {
            const int32_t z_x = x_zero[i][c / 2];
            exact -= uint32_t(z_x) * uint32_t(w_sum[j][c]) + uint32_t(z) * uint32_t(x_sum[i][c]);
            exact += uint32_t(size) * uint32_t(z_x * z);
          }
          const float product = float(int32_t(exact));
          if (a.groups == 1) total[i][j][c] = mul(mul(product, x_scale[i][c / 2]), scale);
          else total[i][j][c] = add(total[i][j][c], mul(product, scale));
          d[i][j][c] = 0;
        }
        w_sum[j][c] = 0;
      }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int32_t& sum : x_sum[i]) sum = 0;
    ++group;
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float sum = a.groups == 1 ? total[i][j][c] : mul(total[i][j][c], x_scale[i][c / 2]);
        sums[row + 16 * i + c / 2 * 8 + g][column + 8 * j + 2 * t + c % 2] = sum;
      }
  __syncthreads();
#pragma unroll 1
  for (int e = thread; e < kTile * kTile; e += kScaledThreads) {
    const int64_t m = m0 + e / kTile, n = n0 + e % kTile;
    if (m < a.x.rows && n < a.w.rows)
      finish(a.y, a.y_type, m * a.w.rows + n, sums[e / kTile][e % kTile], a.epilogue, n);
  }
}

CodesArgs codes_of(const void* codes, const Row& f, int64_t rows, int64_t K) {
  const bool whole = f.bits == 8, packed = f.is_signed && f.bits == 4 && f.per_byte == 2;
  const int64_t row_bytes = quantlib::row_bytes(f, K);
  const int bytes = packed ? 8 : 16;
  return {static_cast<const uint8_t*>(codes),
          rows,
          row_bytes,
          packed,
          (whole || packed) && is_aligned(codes, bytes) && row_bytes % bytes == 0,
          uint8_t(whole && !f.is_signed ? 128 : 0),
          uint8_t(f.bits),
          uint8_t(f.log_per_byte),
          uint8_t(f.is_signed && !whole ? 1 << (f.bits - 1) : 0)};
}

}  // namespace

void scaled_matmul(const ScaledMatmul& p, Stream stream) {
  const Grid& g = p.weight.grid;
  const Row x = row_of(p.x_format), w = row_of(p.weight.format);
  const ScaledArgs a{codes_of(p.x_codes, x, p.M, g.K),
                     codes_of(p.weight.codes, w, g.M, g.K),
                     p.x_scale,
                     p.weight.scale,
                     p.x_zero_point,
                     p.weight.zero_point,
                     p.x_per_row,
                     x.qmin,
                     w.qmin,
                     w.qmax,
                     float_of(x.scale_max),
                     float_of(w.scale_max),
                     g.K,
                     g.bk,
                     g.scale_cols(),
                     Divisor(g.br),
                     p.epilogue,
                     p.y,
                     p.y_type,
                     ceil_div(p.M, kTile)};
  const bool affine = p.x_zero_point || p.weight.zero_point || a.x.flip || a.w.flip;
  if (takes_rows(a)) return multiply_rows(a, affine, stream);
  launch("scaled_matmul", affine ? scaled_matmul_kernel<true> : scaled_matmul_kernel<false>,
         a.row_blocks * ceil_div(g.M, kTile), kScaledThreads, stream, a);
}

}  // namespace cuda
}  // namespace quantlib
