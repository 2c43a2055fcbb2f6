// y[j] = decode(codes[j]) * scale[j / bk] of some columns of a row, for dequantize and dequantize_rows
#pragma once
#include "../ops/dequantize.h"
#include "loops.h"
#include "narrow.h"

namespace quantlib {
namespace QL_ISA {

// n elements, of which the first block has `first`; blocks begin at multiples of kPair
using DequantizeBlocks = void (*)(const char* codes, const float* scale, const int32_t* zero_point, const Row& format,
                                  int64_t first, int64_t bk, bool stream, char* y, int64_t n);
// Null where values lie in memory before they are scaled.
DequantizeBlocks blocks_of(Type format, Type y_type, bool affine);

struct DequantizeRow {
  const Row format, y_row;
  const bool affine;
  const int64_t bk;
  const Store how;
  const Decode decode;
  const Encode encode;
  const DequantizeBlocks blocks;
  alignas(64) float value[kChunk], s_eff[kChunk], zero_point[kChunk];

  // For rows of K columns, of which `rows` are written.
  DequantizeRow(Type format, Type y_type, bool affine, int64_t K, int64_t bk, int64_t rows)
      : format(row_of(format)),
        y_row(row_of(y_type)),
        affine(affine),
        bk(bk),
        how{false, streams(rows * K * y_row.bytes)},
        decode(decoder(format)),
        encode(encoder(y_type, true, false)),
        blocks(bk % kPair && bk < K ? nullptr : blocks_of(format, y_type, affine)) {}

  // The scales and zero points of columns j .. j + n, the first of which has the block `scale[0]`.
  void spread(const float* scale, const int32_t* z, int64_t j, int64_t n) {
    if (blocks) return;
    const Row f = format;
    QL_ISA::spread(scale, bk, j % bk, n, s_eff, [=](float s) { return effective_scale(s, float_of(f.scale_max)); });
    if (affine) QL_ISA::spread(z, bk, j % bk, n, zero_point, [=](int32_t z) { return float(clamp_zero_point(z, f)); });
  }

  // y[0 .. n): columns j .. j + n, at most kChunk of them, once their scales are spread
  void operator()(const char* codes, const float* scale, const int32_t* z, int64_t j, int64_t n, char* y) {
    if (blocks) return blocks(codes, scale, z, format, bk - j % bk, bk, how.stream, y, n);
    decode(codes, false, value, n);
    // Codes and zero points are small integers: their difference is exact in FP32.
    if (affine)
      for (int64_t k = 0; k < n; ++k) value[k] = sub(value[k], zero_point[k]);
    encode(value, s_eff, nullptr, how, y, n);
  }
};

}  // namespace QL_ISA
}  // namespace quantlib
