// y[r, j] = decode(codes[i, j]) * scale[i / br, j / bk], i = indices[r]
#include "../ops/dequantize_rows.h"

#include "dequantize.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kAhead = 2;  // rows from the one that is decoded to the one whose codes are fetched meanwhile

struct Lookup {
  const DequantizeRows& p;
  const Weight& table = p.table;
  const WeightRows weight = WeightRows(table);
  const int64_t K = table.grid.K;
  DequantizeRow decode = DequantizeRow(table.format, p.y_type, table.is_affine(), K, weight.bk, p.R);
  const int64_t row = row_bytes(decode.format, K);
  alignas(64) float scale[kChunk + 1];
  int32_t zero_point[kChunk + 1];

  explicit Lookup(const DequantizeRows& p) : p(p) {}

  const char* codes(int64_t i) const { return static_cast<const char*>(table.codes) + i * row; }

  // Always inlined: GCC drops calls of a function that does nothing but fetch.
  QL_MEMBER void fetch(int64_t r) const {
    const char* next = codes(p.index(r));
    for (int64_t at = 0; at < least(row, 1024); at += 64) __builtin_prefetch(next + at);
  }

  void operator()(int64_t r) {
    const int64_t i = p.index(r), bk = weight.bk;
    char* y = static_cast<char*>(p.y) + byte_offset(decode.y_row, K, r, 0);
    for (int64_t j = 0; j < K; j += kChunk) {
      const int64_t n = least(kChunk, K - j), J = j / bk, blocks = (j + n - 1) / bk - J + 1;
      weight.row_scales(i, J, blocks, scale);
      if (table.is_affine()) weight.row_zero_points(i, J, blocks, zero_point);
      decode.spread(scale, zero_point, j, n);
      decode(codes(i) + byte_offset(decode.format, K, 0, j), scale, zero_point, j, n, y + j * decode.y_row.bytes);
    }
  }
};

}  // namespace

void dequantize_rows(const DequantizeRows& p, ParallelFor run) {
  parallel(run, p.R, most(1, kGrain / p.table.grid.K), [&](int64_t begin, int64_t end) {
    Lookup lookup(p);
    for (int64_t r = begin; r < end; ++r) {
      if (r + kAhead < end) lookup.fetch(r + kAhead);
      lookup(r);
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
