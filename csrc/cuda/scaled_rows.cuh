// scaled_matmul of a few rows of x, which wait for memory to bring the weight. It stands on the left of mma.sync: a
// warp takes 32 rows of it and 16 rows of x, and a lane reads codes 16 bytes at a time, as they lie. Which column is
// which in an instruction is free as long as x follows. The warps of a thread block share the columns; their sums are
// integers.
#pragma once
#include "scaled.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kRowsWarps = 8;   // of a thread block
constexpr int kRowsBands = 2;   // of 16 rows of the weight
constexpr int kRowsBatch = 16;  // rows of x
constexpr int kRowsWidth = 16 * kRowsBands;
constexpr int64_t kRowsMost = 32;  // of x: as many thread blocks as have 16 read the weight from the cache
constexpr int kStages = 2;         // tiles of codes on their way

// A lane's share of 64 bytes of each row of the weight: 16 bytes of rows g and g + 8 of a band, and of rows g and g +
// 8 of x the same columns, twice as many bytes where the weight has four bits.
template <bool PACKED>
struct RowsStage {
  Vector<uint32_t, 4> w[kRowsBands][2], x[2][1 + PACKED];
};

template <bool PACKED, bool AFFINE>
__global__ void __launch_bounds__(32 * kRowsWarps, PACKED || AFFINE ? 1 : 2) scaled_rows_kernel(const ScaledArgs a) {
  constexpr int per_lane = PACKED ? 32 : 16, tile_columns = 4 * per_lane;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int64_t n0 = blockIdx.x / a.row_blocks * kRowsWidth, m0 = blockIdx.x % a.row_blocks * kRowsBatch;
  const int tiles = int((a.K + tile_columns - 1) / tile_columns), K = int(a.K);
  const int begin = tiles * warp / kRowsWarps, end = tiles * (warp + 1) / kRowsWarps;

  // Rows that there are from this lane's first on; bytes from there fit in 31 bits.
  const int rows = at_most(a.w.rows - n0 - g, kRowsWidth), batch = at_most(a.x.rows - m0 - g, kRowsBatch);
  const int row_bytes = PACKED ? K / 2 : K;
  const uint8_t *w = a.w.codes + (n0 + g) * row_bytes, *x = a.x.codes + (m0 + g) * K;
  const auto missing = [](const CodesArgs& c) {  // becomes zero
    const uint32_t word = c.flip * kOnes;
    return Vector<uint32_t, 4>{word, word, word, word};
  };
  RowsStage<PACKED> stages[kStages];
  const auto load = [&](RowsStage<PACKED>& stage, int tile) {
    const int k = tile * tile_columns + t * per_lane;
    const bool inside = tile < end && k < K;
#pragma unroll
    for (int i = 0; i < kRowsBands; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        stage.w[i][h] = inside && 16 * i + 8 * h < rows
                            ? load_once(w + ((16 * i + 8 * h) * row_bytes + (PACKED ? k / 2 : k)))
                            : missing(a.w);
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int part = 0; part < 1 + PACKED; ++part)
        stage.x[b][part] =
            inside && 8 * b < batch
                ? Vector<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(x + (8 * b * K + k + 16 * part)))
                : missing(a.x);
  };

  int32_t d[kRowsBands][2][4] = {}, w_sum[kRowsBands][4] = {}, x_sum[2][4] = {};
  const auto multiply = [&](const uint32_t (&left)[kRowsBands][4], const uint32_t (&right)[2][2]) {
    constexpr uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int i = 0; i < kRowsBands; ++i) {
#pragma unroll
      for (int b = 0; b < 2; ++b) mma(int8{}, d[i][b], left[i], right[b]);
      if constexpr (AFFINE) mma(int8{}, w_sum[i], left[i], {kOnes, kOnes});
    }
    if constexpr (AFFINE)
#pragma unroll
      for (int b = 0; b < 2; ++b) mma(int8{}, x_sum[b], ones, right[b]);
  };
  // Words 2 j and 2 j + 1 of a lane's four to one product; of four bits each of them, even columns and odd.
  const auto multiply_stage = [&](const RowsStage<PACKED>& stage) {
#pragma unroll
    for (int j = 0; j < 2 + 2 * PACKED; ++j) {
      uint32_t left[kRowsBands][4], right[2][2];
#pragma unroll
      for (int i = 0; i < kRowsBands; ++i)
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const auto& words = stage.w[i][f % 2].word;
          if constexpr (PACKED) left[i][f] = widen((f < 2 ? words[j] : words[j] >> 4) & 0x0f0f0f0fu);
          else left[i][f] = words[2 * j + f / 2] ^ a.w.flip * kOnes;
        }
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (PACKED) {
            const auto& words = stage.x[b][j / 2].word;
            right[b][h] = permute(words[j % 2 * 2], words[j % 2 * 2 + 1], h ? 0x7531 : 0x6420);
          } else {
            right[b][h] = stage.x[b][0].word[2 * j + h];
          }
          right[b][h] ^= a.x.flip * kOnes;
        }
      multiply(left, right);
    }
  };
#pragma unroll
  for (int s = 0; s < kStages; ++s) load(stages[s], begin + s);
  for (int tile = begin; tile < end; tile += kStages)
#pragma unroll
    for (int s = 0; s < kStages; ++s) {  // past the end are zeros
      multiply_stage(stages[s]);
      load(stages[s], tile + s + kStages);
    }

  // The warps' sums, each with its share of what the zero points take away.
  __shared__ uint32_t sums[kRowsWarps][kRowsBatch][kRowsWidth + 4];
  const int64_t first = int64_t(begin) * tile_columns, past = int64_t(end) * tile_columns;
  const uint32_t size = first < past ? uint32_t((past < a.K ? past : a.K) - first) : 0;
#pragma unroll
  for (int i = 0; i < kRowsBands; ++i)
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = 16 * i + c / 2 * 8 + g, row = 8 * b + 2 * t + c % 2;  // in y
        uint32_t exact = uint32_t(d[i][b][c]);
        if constexpr (AFFINE) {
          const int64_t n = n0 + column < a.w.rows ? n0 + column : 0, m = m0 + row < a.x.rows ? m0 + row : 0;
          const int32_t z = a.zero_of(a.br.divide(n)), z_x = a.zero_of_x(m);
          exact -= uint32_t(z_x) * uint32_t(w_sum[i][c]) + uint32_t(z) * uint32_t(x_sum[b][c]);
          exact += size * uint32_t(z_x * z);
        }
        sums[warp][row][column] = exact;
      }
  __syncthreads();
#pragma unroll 1
  for (int e = int(threadIdx.x); e < kRowsBatch * kRowsWidth; e += 32 * kRowsWarps) {
    const int64_t m = m0 + e / kRowsWidth, n = n0 + e % kRowsWidth;
    uint32_t exact = 0;
#pragma unroll
    for (int other = 0; other < kRowsWarps; ++other) exact += sums[other][e / kRowsWidth][e % kRowsWidth];
    if (m >= a.x.rows || n >= a.w.rows) continue;
    const float y = mul(mul(float(int32_t(exact)), a.scale_of_x(m)), a.scale_of(a.br.divide(n)));
    finish(a.y, a.y_type, m * a.w.rows + n, y, a.epilogue, n);
  }
}

// True if the rows of x are few enough, and lanes find whole vectors, under one scale a row of the weight.
bool takes_rows(const ScaledArgs& a) {
  const auto vector = [](const CodesArgs& c) { return c.vector && is_aligned(c.codes, 16) && c.row_bytes % 16 == 0; };
  return a.x.rows <= kRowsMost && a.groups == 1 && a.K > 0 && vector(a.w) && vector(a.x) &&
         a.K % (a.w.packed ? 32 : 16) == 0 && a.K <= INT32_MAX / kRowsWidth;
}

void multiply_rows(ScaledArgs a, bool affine, Stream stream) {
  a.row_blocks = ceil_div(a.x.rows, kRowsBatch);
  const auto kernel = a.w.packed ? affine ? scaled_rows_kernel<true, true> : scaled_rows_kernel<true, false>
                      : affine   ? scaled_rows_kernel<false, true>
                                 : scaled_rows_kernel<false, false>;
  launch("scaled_matmul", kernel, a.row_blocks * ceil_div(a.w.rows, kRowsWidth), 32 * kRowsWarps, stream, a);
}

}  // namespace
}  // namespace cuda
}  // namespace quantlib
