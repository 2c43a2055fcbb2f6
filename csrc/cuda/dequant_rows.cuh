// y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]) of a few rows of x, on matrix instructions
//
// A few rows of x wait for memory to bring the codes, so what counts is that a code costs few instructions. The weight
// stands on the left of mma.sync: a warp takes 32 rows of it and 16 rows of x, and a lane reads its codes 16 bytes at a
// time, as they lie, into fragments. Which column is which in an instruction is free as long as x follows.
// More rows of x are as many thread blocks, which read the weight from the cache; each row's sum is the same in all.
#pragma once
#include "../ops/dequant_matmul.h"
#include "matmul.cuh"
#include "operand.cuh"

namespace quantlib {
namespace cuda {

// Warps of a thread block, each of which sums its share of the columns: registers are enough for two blocks of eight an
// SM, but where the weight has few rows there is one, and it has as many warps as that.
constexpr int kWarps = 8;
constexpr int64_t kSmallWeight = 4096;
template <class F, bool TILED>
constexpr int kMostWarps = F::per_byte == 2 && !TILED ? kWarps : 2 * kWarps;
constexpr int kBands = 2;  // of 16 rows of the weight
constexpr int kBandRows = 16 * kBands;
constexpr int kBatch = 16;  // rows of x

template <class X>
struct DecodeArgs {
  const uint8_t* codes;       // [N, row_bytes], or tiles
  const Unit<X>* x;           // [M, K]
  const float* scale;         // [ceil(N / br), groups]
  const int32_t* zero_point;  // the same shape, or null
  void* y;                    // [M, N]
  Type y_type;
  Epilogue epilogue;
  int64_t M, N, K, row_bytes;
  int groups;
  Divisor br;
  int warps, tiles, per_group, chunks;  // tiles of 64 bytes a row; of them that share a scale; chunks of x's rows
  uint32_t flip;                        // see Operand
  int32_t lowest, highest;              // zero point
};

// The codes of a lane in a tile of each band: rows g and g + 8.
struct Codes {
  Vector<uint32_t, 4> of[kBands][2];
};

// y[m0 .. m0 + kBatch, n0 .. n0 + kBandRows), by the whole thread block
template <class F, class X, bool TILED>
QL_DEVICE void multiply_band(const DecodeArgs<X>& a, int64_t n0, int64_t m0) {
  using Order = Columns<F, TILED>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int begin = a.tiles * warp / a.warps, end = a.tiles * (warp + 1) / a.warps;

  // A lane has rows n0 + 16 i + 8 r + g of the weight and m0 + 8 b + g of x; zeros where one, or its end, is missing.
  const int rows = at_most(a.N - n0 - g, kBandRows), batch = at_most(a.M - m0 - g, kBatch);
  const int K = int(a.K) - t * Order::lane - begin * Order::tile;
  int ends[2] = {0 < batch ? K : 0, 8 < batch ? K : 0};  // columns that there are from the next tile's first on
  const int last = TILED ? end : at_most((a.row_bytes - t * 16 + 63) / 64, end);  // tile past its codes
  const uint8_t* codes = a.codes + n0 * a.row_bytes + (TILED ? lane * 32 : g * a.row_bytes + t * 16);
  const uint8_t* next_codes[kBands] = {codes + int64_t(begin) * Order::bytes,
                                       codes + 16 * a.row_bytes + int64_t(begin) * Order::bytes};
  const Unit<X>* x = a.x + (m0 + g) * a.K + t * Order::lane + int64_t(begin) * Order::tile;
  const Unit<X>* next_x[2] = {x, x + 8 * a.K};

  Codes next;  // on their way while those before them are multiplied
  const auto load_codes = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kBands; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        next.of[i][r] = tile < last && 16 * i + (TILED ? 0 : 8 * r) < rows
                            ? load_once(next_codes[i] + r * (TILED ? 16 : 8 * a.row_bytes))
                            : Vector<uint32_t, 4>::zero();
#pragma unroll
    for (const uint8_t*& of_band : next_codes) of_band += Order::bytes;
  };
  load_codes(begin);

  int row[kBands][2];  // of scale, its first index
  SplitScale<X> scale[kBands][2];
  uint32_t zero[kBands][2];
#pragma unroll
  for (int i = 0; i < kBands; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      row[i][r] = 16 * i + 8 * r < rows ? int(a.br.divide(n0 + 16 * i + 8 * r + g)) * a.groups : 0;
  const auto load_scale = [&](int group) {
#pragma unroll
    for (int i = 0; i < kBands; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[i][r] = SplitScale<X>(tight_scale(a.scale[row[i][r] + group], float_of(F::scale_max)));
        const int32_t z = a.zero_point ? a.zero_point[row[i][r] + group] : 0;
        zero[i][r] = uint32_t((z < a.lowest ? a.lowest : z > a.highest ? a.highest : z) - a.lowest);
      }
  };

  float total[kBands][2][4] = {};
  for (int tile = begin, group = begin / a.per_group; tile < end; ++group) {
    load_scale(group);
    const int past = (group + 1) * a.per_group < end ? (group + 1) * a.per_group : end;
    float sum[kBands][2][4] = {};
    for (; tile < past; ++tile) {
      const Codes now = next;
      load_codes(tile + 1);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < Order::halves; ++h) {
          uint32_t right[2][2];
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const int k = j * Order::word + h * Order::half;
            const auto four = k < ends[b] ? Vector<Unit<X>, 4>::load(next_x[b] + k) : Vector<Unit<X>, 4>::zero();
            right[b][0] = four.word[0], right[b][1] = four.word[1];
          }
#pragma unroll
          for (int i = 0; i < kBands; ++i) {
            uint32_t left[4];
#pragma unroll
            for (int f = 0; f < 4; ++f) {
              const int r = f % 2, pair = 2 * h + f / 2;
              left[f] = Operand<F, X>(zero[i][r], scale[i][r].power)(now.of[i][r].word[j], pair, Order::selector(pair),
                                                                     a.flip);
            }
#pragma unroll
            for (int b = 0; b < 2; ++b) mma(X{}, sum[i][b], left, right[b]);
          }
        }
#pragma unroll
      for (int b = 0; b < 2; ++b) next_x[b] += Order::tile, ends[b] -= Order::tile;
    }
#pragma unroll
    for (int i = 0; i < kBands; ++i)
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int c = 0; c < 4; ++c) total[i][b][c] = add(total[i][b][c], mul(sum[i][b][c], scale[i][c / 2].rest));
  }

  // The warps' sums, in their order.
  __shared__ float sums[kMostWarps<F, TILED>][kBatch][kBandRows + 4];
#pragma unroll
  for (int i = 0; i < kBands; ++i)
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[warp][8 * b + 2 * t + c % 2][16 * i + 8 * (c / 2) + g] = total[i][b][c];
  __syncthreads();
#pragma unroll 1
  for (int e = int(threadIdx.x); e < kBatch * kBandRows; e += 32 * a.warps) {
    const int64_t m = m0 + e / kBandRows, n = n0 + e % kBandRows;
    float y = 0.0f;
#pragma unroll 1
    for (int first = 0; first < a.warps; first += kWarps)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) y = add(y, sums[first + w][e / kBandRows][e % kBandRows]);
    if (m < a.M && n < a.N) finish(a.y, a.y_type, m * a.N + n, y, a.epilogue, n);
  }
}

// True if lanes find their codes and values of x at whole vectors, and no scale changes inside of a tile.
inline bool has_operands(const DequantMatmul& p) {
  const Grid& g = p.weight.grid;
  const int P = row_of(p.weight.format).per_byte;
  return is_operand(p.weight.format, p.x_type) && g.K > 0 && g.K % 4 == 0 && g.K <= INT32_MAX - 512 &&
         (p.tiled || g.K % (16 * P) == 0) && (g.bk >= g.K || g.bk % (64 * P) == 0) &&
         g.scale_rows() * g.scale_cols() <= INT32_MAX && is_aligned(p.weight.codes, 16) && is_aligned(p.x, 8);
}

// The arguments of a product whose blocks take `chunks` parts of the rows of x
template <class F, class X, bool TILED>
DecodeArgs<X> decode_args(const DequantMatmul& p, const Row& format, int64_t chunks) {
  const Weight& w = p.weight;
  const Grid& g = w.grid;
  constexpr int columns = Columns<F, TILED>::tile;
  return {static_cast<const uint8_t*>(w.codes),
          static_cast<const Unit<X>*>(p.x),
          w.scale,
          w.zero_point,
          p.y,
          p.x_type,
          p.epilogue,
          p.M,
          g.M,
          g.K,
          TILED ? ceil_div(g.K, columns) * 64 : bytes_of<F>(g.K),
          int(g.scale_cols()),
          Divisor(g.br),
          g.M <= kSmallWeight ? kMostWarps<F, TILED> : kWarps,
          int(ceil_div(g.K, columns)),
          int(ceil_div(g.bk, columns)),
          int(chunks),
          Operand<F, X>::flip(format.is_signed),
          format.qmin,
          format.qmax};
}

}  // namespace cuda
}  // namespace quantlib
